"""A tiny model and a toy dataset, to try every contender in seconds; their figures mean nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [f"w{number}" for number in range(200)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_model(folder: Path) -> Path:
    """A two-layer BERT of width 32 with random weights, as a sentence-transformers folder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS, "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    plain = folder / "transformer"
    BertModel(config).save_pretrained(plain)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=16, **names)
    fast.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=16)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


def make_dataset(path: Path, passages: int, seed: int, queries_each: int = 2, words: int = 10) -> Path:
    """Write passages of random words; each query has three words of its passage."""
    rng = random.Random(seed)
    corpus, queries, relevant = {}, {}, {}
    for number in range(passages):
        drawn = rng.choices(WORDS, k=words)
        corpus[f"p{seed}-{number}"] = " ".join(drawn)
        for copy in range(queries_each):
            queries[f"q{seed}-{number}-{copy}"] = " ".join(rng.sample(drawn, 3)) + " ?"
            relevant[f"q{seed}-{number}-{copy}"] = [f"p{seed}-{number}"]
    data = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "mode": "text"}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
