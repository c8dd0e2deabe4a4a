"""Vectors do not depend on the texts' order or on the size of a forward pass, and unusual inputs are handled."""

import numpy as np
import pytest
from llama_index.core.schema import TextNode
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.embedding.encode import encode
from llama_index_lora_embed.models.tokens import check_texts, longest_first
from tests.conftest import WORDS

TEXTS = [" ".join(WORDS[i : i + 1 + 7 * i % 15]) for i in range(50)]


@pytest.fixture(scope="module")
def model(adapter):
    return SentenceTransformer(str(adapter), device="cpu")


@pytest.fixture(scope="module")
def embed_model(adapter):
    return LoraEmbedding(adapter, device="cpu")


def passes_of(model, monkeypatch, **settings):
    """Shape of the tokens in each forward pass, and the vectors."""
    shapes = []
    hook = model[0].register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape)))
    try:
        return shapes, encode(model, TEXTS, "document", **settings)
    finally:
        hook.remove()


@pytest.mark.parametrize("task", ["query", "document"])
def test_vectors_are_those_of_sentence_transformers(model, task):
    expected = model.encode_query(TEXTS) if task == "query" else model.encode_document(TEXTS)
    made = encode(model, TEXTS, task)
    assert made.dtype == np.float32
    assert np.abs(made - expected).max() < 1e-5


@pytest.mark.parametrize("max_tokens", [1, 40, 200])
def test_a_forward_pass_has_no_more_tokens_than_asked_for(model, monkeypatch, max_tokens):
    shapes, vectors = passes_of(model, monkeypatch, max_tokens=max_tokens)
    assert all(rows == 1 or rows * width <= max_tokens for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == len(TEXTS)
    assert np.abs(vectors - model.encode_document(TEXTS)).max() < 1e-5


def test_passes_contain_little_padding(model, monkeypatch):
    shapes, _ = passes_of(model, monkeypatch, max_tokens=200)
    needed = sum(min(16, len(text.split()) + 2) for text in TEXTS)
    assert sum(rows * width for rows, width in shapes) < 1.25 * needed
    assert len(shapes) < needed / 100, "passes must be nearly full"


def test_another_script_does_not_make_a_pass_larger(model, monkeypatch):
    """The first texts have one token per three characters, the shorter ones one per character."""
    texts = [" ".join(WORDS[i : i + 14]) for i in range(8)] + [
        "? : . , ? : . , ?"[: 2 * n + 1] for n in range(1, 9)
    ] * 4
    shapes = []
    hook = model[0].register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape)))
    vectors = encode(model, texts, "document", max_tokens=48)
    hook.remove()
    assert all(rows == 1 or rows * width <= 48 for rows, width in shapes)
    assert np.abs(vectors - model.encode_document(texts)).max() < 1e-5


def test_the_tokens_of_all_windows_count(tiny_model):
    windowed = LoraEmbedding(base_model=tiny_model, window=16, device="cpu", tokens_per_pass=64)
    shapes = []
    windowed.sentence_transformer[0].register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape))
    )
    texts = [" ".join(WORDS[:40])] * 6
    windowed.get_text_embedding_batch(texts)
    assert all(rows * width <= 64 for rows, width in shapes)


def test_a_forward_pass_has_no_more_texts_than_asked_for(model, monkeypatch):
    shapes, _ = passes_of(model, monkeypatch, max_texts=3)
    assert {rows for rows, _ in shapes} <= {1, 2, 3}


def test_no_texts_give_no_vectors(model, embed_model):
    assert encode(model, [], "document").shape == (0, 32)
    assert embed_model.get_text_embedding_batch([]) == []


def test_vectors_come_in_the_order_of_the_texts(embed_model):
    small = embed_model.model_copy(update={"embed_batch_size": 7})
    expected = [embed_model.get_text_embedding(text) for text in TEXTS]
    assert np.abs(np.array(small.get_text_embedding_batch(TEXTS)) - expected).max() < 1e-5


async def _batch(embed_model):
    return await embed_model.aget_text_embedding_batch(TEXTS)


def test_all_texts_are_ordered_before_llama_index_cuts_them_into_batches(embed_model, monkeypatch):
    import asyncio

    small, seen = embed_model.model_copy(update={"embed_batch_size": 10}), []
    original = LoraEmbedding._get_text_embeddings

    def watched(self, texts):
        seen.append([len(text) for text in texts])
        return original(self, texts)

    monkeypatch.setattr(LoraEmbedding, "_get_text_embeddings", watched)
    small.get_text_embedding_batch(TEXTS)
    expected = sorted((len(text) for text in TEXTS), reverse=True)
    assert [length for lengths in seen for length in lengths] == expected
    seen.clear()
    asyncio.run(_batch(small))
    assert sorted((length for lengths in seen for length in lengths), reverse=True) == expected
    assert all(lengths == sorted(lengths, reverse=True) for lengths in seen)


def test_nodes_keep_their_own_vectors(embed_model):
    nodes = [TextNode(text=text) for text in TEXTS]
    for node, text in zip(embed_model(nodes), TEXTS, strict=True):
        assert np.abs(np.array(node.embedding) - embed_model.get_text_embedding(text)).max() < 1e-5


def test_longest_first_keeps_the_order_of_equals():
    assert longest_first(["a", "ccc", "bb", "dd"]) == [1, 2, 3, 0]


# unusual inputs


@pytest.mark.parametrize("text", ["", " ", "\n", "\x00", "é" * 30, "漢字" * 20, "😀" * 9, "w1 " * 350_000])
def test_odd_texts_have_vectors(embed_model, text):
    vectors = [embed_model.get_text_embedding(text), embed_model.get_query_embedding(text),
               *embed_model.get_text_embedding_batch(["w1 w2", text])]  # fmt: skip
    assert np.isfinite(vectors).all()
    assert np.abs(np.subtract(vectors[0], vectors[3])).max() < 1e-5


def test_lone_surrogates_are_replaced_and_pairs_are_joined(embed_model):
    assert check_texts(["a \ud83d b", "\ud83d\ude00", "plain", "é"]) == ["a \ufffd b", "\U0001f600", "plain", "é"]
    assert np.isfinite(embed_model.get_text_embedding("a \ud83d b")).all()
    assert np.isfinite(embed_model.get_text_embedding_batch(["\udc00", "w1"])).all()


@pytest.mark.parametrize("wrong", [None, 3, ["w1"], b"w1", float("nan"), {"text": "w1"}])
def test_inputs_that_are_not_strings_are_refused_with_their_index(embed_model, wrong):
    with pytest.raises(ConfigError, match=rf"texts\[1\] is of type {type(wrong).__name__}"):
        embed_model.get_text_embedding_batch(["w1", wrong])
    for embed in (embed_model.get_text_embedding, embed_model.get_query_embedding):
        with pytest.raises(ConfigError, match=rf"texts\[0\] is of type {type(wrong).__name__}"):
            embed(wrong)


@pytest.mark.parametrize("wrong", ["w1 w2", b"w1", None, 5])
def test_a_single_text_instead_of_a_list_is_refused(embed_model, wrong):
    with pytest.raises(ConfigError, match=f"texts of type {type(wrong).__name__}"):
        embed_model.get_text_embedding_batch(wrong)
