"""Evaluate 1,000 queries on 100,000 passages, with this package and with sentence-transformers.

    python benchmarks/evaluation_at_scale.py
    python benchmarks/evaluation_at_scale.py --passages 100000 1000000
    python benchmarks/evaluation_at_scale.py --on-disk --passages 10000 100000 1000000

With --on-disk the passages are a memory-mapped file, and FAISS is compared with exact search: an inverted file of
sqrt(passages) lists, of which some are probed. The vectors lie around 2,000 centres then. Memory is what the process
holds beyond what it held before, without the pages of the file, which the system takes back when it needs them.

Otherwise the vectors are random, have 384 dimensions and are created before the clock starts. Each evaluation runs in
its own process, in turns. The output is the time of search and metrics, the peak memory of the process beyond the
vectors, and the largest difference between the metrics of both packages.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from memory import Measured

DIMENSIONS = 384


def data(queries: int, passages: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """(dataset, query vectors, passage vectors); each query is near its relevant passage."""
    from llama_index_lora_embed import EmbeddingQAFinetuneDataset

    rng = np.random.default_rng(0)
    far = rng.standard_normal((passages, DIMENSIONS), dtype=np.float32)
    far /= np.linalg.norm(far, axis=1, keepdims=True)
    near = far[:queries] + 0.22 * rng.standard_normal((queries, DIMENSIONS), dtype=np.float32)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    corpus = {f"p{i:07d}": f"passage {i}" for i in range(passages)}
    dataset = EmbeddingQAFinetuneDataset(
        queries={f"q{i}": f"query {i}" for i in range(queries)},
        corpus=corpus,
        relevant_docs={f"q{i}": [f"p{i:07d}"] for i in range(queries)},
    )
    return dataset, near, far


def ours(dataset: Any, near: np.ndarray, far: np.ndarray) -> dict[str, float]:
    """Metrics by this package."""
    from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders

    return evaluate_encoders(lambda texts: near, lambda texts: far, dataset).metrics


def theirs(dataset: Any, near: np.ndarray, far: np.ndarray) -> dict[str, float]:
    """The same metrics by sentence-transformers."""
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    class Lookup:
        """Returns the vector with the number at the end of a text."""

        similarity_fn_name = "cosine"

        def encode_query(self, texts: list[str], **kwargs: Any) -> torch.Tensor:
            return torch.from_numpy(near[[int(text.split()[1]) for text in texts]])

        def encode_document(self, texts: list[str], **kwargs: Any) -> torch.Tensor:
            return torch.from_numpy(far[[int(text.split()[1]) for text in texts]])

        def similarity(self, queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
            return queries @ passages.T

    relevant = {q: set(ids) for q, ids in dataset.relevant_docs.items()}
    evaluator = InformationRetrievalEvaluator(
        dataset.queries, dataset.corpus, relevant, accuracy_at_k=[1, 5, 10], precision_recall_at_k=[1, 5, 10]
    )
    evaluator.store_metrics_in_model_card_data = lambda *args: None  # type: ignore[method-assign]
    found = evaluator(Lookup())  # type: ignore[arg-type]
    return {name: found[f"cosine_{name.replace('hit', 'accuracy')}"] for name in
            ("hit@1", "hit@5", "hit@10", "mrr@10", "ndcg@10", "map@100", "recall@10", "precision@10")}  # fmt: skip


def write_clustered(folder: Path, queries: int, passages: int) -> None:
    """Passages around centres as `passages.npy`, and queries near the first of them as `queries.npy`."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, DIMENSIONS), dtype=np.float32)
    file = np.lib.format.open_memmap(folder / "passages.npy", "w+", np.float32, (passages, DIMENSIONS))
    for start in range(0, passages, 10_000):
        block = centres[rng.integers(0, len(centres), min(10_000, passages - start))]
        block = block + rng.standard_normal(block.shape, dtype=np.float32)
        file[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    near = file[:queries] + 0.06 * rng.standard_normal((queries, DIMENSIONS), dtype=np.float32)
    np.save(folder / "queries.npy", near / np.linalg.norm(near, axis=1, keepdims=True))


def on_disk(folder: Path) -> None:
    """Print times and memory of exact evaluation, and of FAISS with its recall of the ten nearest passages."""
    import faiss

    from llama_index_lora_embed import EmbeddingQAFinetuneDataset
    from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders

    faiss.omp_set_num_threads(1)
    near, far = np.load(folder / "queries.npy"), np.load(folder / "passages.npy", mmap_mode="r")
    with Measured() as measured:
        dataset = EmbeddingQAFinetuneDataset(
            queries={f"q{i}": f"query {i}" for i in range(len(near))},
            corpus={f"p{i:07d}": f"passage {i}" for i in range(len(far))},
            relevant_docs={f"q{i}": [f"p{i:07d}"] for i in range(len(near))},
        )
    say("ids and texts", **measured.figures)
    with Measured() as measured:
        evaluation = evaluate_encoders(lambda texts: near, lambda texts: far, dataset)
    say("exact evaluation", **measured.figures, **{"hit@1": evaluation.metrics["hit@1"]})
    exact = [{int(passage_id[1:]) for passage_id in ranking[:10]} for ranking in evaluation.rankings.values()]
    lists = int(math.sqrt(len(far)))
    with Measured() as measured:
        index = faiss.index_factory(DIMENSIONS, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        step = max(1, len(far) // (lists * 40))
        index.train(np.array(far[::step]))
        for start in range(0, len(far), 50_000):
            index.add(np.array(far[start : start + 50_000]))
    say("faiss build", **measured.figures)
    for probes in (1, 4, 16, 64):
        index.nprobe = probes
        with Measured() as measured:
            _, rows = index.search(near, 10)
        recall = np.mean([len(right & {*row}) / 10 for right, row in zip(exact, rows.tolist(), strict=True)])
        say(f"faiss, {probes} lists", **measured.figures, **{"recall@10": float(recall)})


def say(name: str, **figures: float) -> None:
    print(f"  {name:18}" + ", ".join(f"{key} {value:,.3f}" for key, value in figures.items()), flush=True)


def child(who: str, queries: int, passages: int) -> None:
    import torch  # noqa: F401  # imported before memory is measured

    given = data(queries, passages)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    metrics = {"ours": ours, "theirs": theirs}[who](*given)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "mb": (peak - before) / 1024, "metrics": metrics}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--passages", type=int, nargs="+", default=[100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--on-disk", action="store_true", help="passages in a file, and FAISS")
    parser.add_argument("--folder", help="where the file is made; None for the system's temporary folder")
    parser.add_argument("--child", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_disk:
        for passages in args.passages:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                write_clustered(Path(folder), args.queries, passages)
                print(f"{args.queries} queries, {passages} passages on disk:", flush=True)
                code = f"from evaluation_at_scale import *; on_disk(Path({folder!r}))"
                subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        return None
    if args.child:
        return child(args.child, args.queries, args.passages[0])
    for passages in args.passages:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        for _ in range(args.repeats):
            for who, found in runs.items():
                command = [sys.executable, __file__, "--child", who, "--queries", str(args.queries), "--passages"]
                done = subprocess.run([*command, str(passages)], capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{args.queries} queries, {passages} passages, medians of {args.repeats}:")
        for who, found in runs.items():
            seconds = sorted(run["seconds"] for run in found)
            print(f"  {who:7} {median(seconds):6.1f} s ({seconds[0]:.1f} to {seconds[-1]:.1f}), "
                  f"{max(run['mb'] for run in found):,.0f} MB beyond the vectors")  # fmt: skip
        mine, other = runs["ours"][0]["metrics"], runs["theirs"][0]["metrics"]
        ratio = median(r["seconds"] for r in runs["theirs"]) / median(r["seconds"] for r in runs["ours"])
        print(f"  {ratio:.2f} times as fast; metrics differ by {max(abs(mine[n] - v) for n, v in other.items()):.1e}")
    return None


if __name__ == "__main__":
    main()
