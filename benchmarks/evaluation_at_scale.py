"""Evaluate 1,000 queries on 100,000 passages, with this package and with sentence-transformers.

    python benchmarks/evaluation_at_scale.py
    python benchmarks/evaluation_at_scale.py --passages 100000 1000000

The vectors are random, have 384 dimensions and are created before the clock starts. Each evaluation runs in its own
process, in turns. The output is the time of search and metrics, the peak memory of the process beyond the vectors, and
the largest difference between the metrics of both packages.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np

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
    parser.add_argument("--child", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
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
