"""The process of one run: `python -m speed.child JOB.json`, started by `speed.py` in the contender's environment."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

from speed.contenders import CONTENDERS, Job
from speed.measure import Recorder, read_dataset


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if job.threads:
        torch.set_num_threads(job.threads)
    contender = importlib.import_module(f"speed.{CONTENDERS[job.contender].module}")
    contender.run(job, Recorder(job.events, read_dataset(job.test)))


if __name__ == "__main__":
    main()
