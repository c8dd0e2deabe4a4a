"""The softmax over a whole corpus: seconds of a step, and memory beyond the vectors.

    python benchmarks/full_corpus.py
    python benchmarks/full_corpus.py --passages 1000000 --batch 64

Steps of `EmbeddingAdapterFinetuneEngine`'s training (a linear map, its optimizer included) over random vectors of
length 1. Memory is the peak of the process during the steps, less what it held before them: passages, queries, targets
and all libraries (Linux only). A first step, whose time is not counted, loads torch's kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from speed.machine import load, machine

from llama_index_lora_embed import LinearLayer
from llama_index_lora_embed.config import EmbeddingAdapterSettings
from llama_index_lora_embed.training.embedding_adapter import FrozenVectors, run_steps
from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets

MIB = 1 << 20


def status(name: str) -> int:
    """An entry of /proc/self/status in bytes: "VmRSS" is memory now, "VmHWM" its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def unit(count: int, dimensions: int) -> torch.Tensor:
    vectors = torch.empty(count, dimensions).normal_(generator=torch.Generator().manual_seed(count))
    return vectors.div_(vectors.norm(dim=1, keepdim=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    before = load()
    count = args.batch * (args.steps + 1)
    targets = CorpusTargets(
        [f"q{row}" for row in range(count)],
        [(f"p{column}", "") for column in range(args.passages)],
        [[row * 7 % args.passages] for row in range(count)],
        [[1.0] for _ in range(count)],
        [[(row * 7 + other) % args.passages for other in range(1, 5)] for row in range(count)],
        [[] for _ in range(count)],
    )
    data = FrozenVectors(unit(count, args.dimensions), unit(args.passages, args.dimensions), targets)
    adapter = LinearLayer(args.dimensions, args.dimensions)
    settings = EmbeddingAdapterSettings(batch_size=args.batch, epochs=1)
    held = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    seconds, worked = [], []
    started, at = time.perf_counter(), time.process_time()
    for _ in run_steps(adapter, data, settings, torch.optim.AdamW(adapter.parameters(), lr=1e-3)):
        now, used = time.perf_counter(), time.process_time()
        seconds.append(now - started)
        worked.append(used - at)
        started, at = now, used
    report = {
        "passages": args.passages, "dimensions": args.dimensions, "batch": args.batch,
        "threads": torch.get_num_threads(), "machine": machine(), "load": before,
        "vectors_mb": data.passages.nbytes / MIB, "beyond_mb": (status("VmHWM") - held) / MIB,
        "step_s": {"median": statistics.median(seconds[1:]), "longest": max(seconds[1:])},
        "step_processor_s": {"median": statistics.median(worked[1:]), "longest": max(worked[1:])},
    }  # fmt: skip
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
