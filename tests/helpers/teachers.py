"""Teachers of distillations: tiny cross-encoders, and functions."""

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification


def save_cross_encoder(folder, tiny_model, labels=1, seed=3, **kwargs):
    """A one-layer cross-encoder with random weights and the vocabulary of the tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, num_labels=labels, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)
    return str(folder)


def shared_words(pairs):
    """A teacher that counts the words of the query that are in the passage."""
    return [float(len(set(query.split()) & set(passage.split()))) for query, passage in pairs]
