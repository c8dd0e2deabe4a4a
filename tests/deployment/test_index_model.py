"""Whether an index holds a model's vectors: by its stamp, or by a sample that is embedded again."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import WrongIndexError
from llama_index_lora_embed.data import StoredVectors, read_vectors
from llama_index_lora_embed.deployment import stamp_index
from llama_index_lora_embed.deployment.index_model import verify_vectors
from tests.conftest import make_tiny_model


@pytest.fixture(scope="module")
def base(tiny_model: str) -> LoraEmbedding:
    return LoraEmbedding(base_model=tiny_model, device="cpu")


@pytest.fixture(scope="module")
def other(other_tiny_model: str) -> LoraEmbedding:
    return LoraEmbedding(base_model=other_tiny_model, device="cpu")


def test_metadata_is_embedded_with_the_text_as_indexing_does(base: LoraEmbedding, nodes: list[TextNode]) -> None:
    index = VectorStoreIndex(nodes, embed_model=base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify_vectors(index, read_vectors(index), base)


def test_an_index_of_another_model_is_refused_with_how_far_it_is(
    base: LoraEmbedding, other: LoraEmbedding, nodes: list[TextNode]
) -> None:
    index = VectorStoreIndex(nodes, embed_model=other)
    with pytest.raises(
        WrongIndexError, match=r"built by another model than .*of 12 .* 12 have.*median cosine"
    ) as caught:
        verify_vectors(index, read_vectors(index), base)
    assert base.model_name in str(caught.value)
    assert len(caught.value.problems) == 12


def test_the_stamp_decides_where_there_is_one(base: LoraEmbedding, other: LoraEmbedding, nodes: list[TextNode]) -> None:
    index = VectorStoreIndex(nodes, embed_model=base)
    stamp_index(index, base)
    verify_vectors(index, read_vectors(index), base)
    stamp_index(index, other, replace=True)
    with pytest.raises(WrongIndexError, match="was built on"):
        verify_vectors(index, read_vectors(index), base)


def test_another_class_over_the_same_model_is_recognised_by_the_vectors_in_spite_of_its_stamp(
    tiny_model: str, other_tiny_model: str, base: LoraEmbedding, nodes: list[TextNode]
) -> None:
    theirs = HuggingFaceEmbedding(model_name=str(tiny_model), device="cpu")
    index = VectorStoreIndex(nodes, embed_model=theirs)
    stamp_index(index, theirs)
    with pytest.warns(UserWarning, match="stamped with HuggingFaceEmbedding .* those of LoraEmbedding, too"):
        verify_vectors(index, read_vectors(index), base)
    with pytest.raises(WrongIndexError, match="was built on"):
        verify_vectors(index, read_vectors(index), LoraEmbedding(base_model=other_tiny_model, device="cpu"))
    stamp_index(index, base, replace=True)
    with pytest.warns(UserWarning, match="stamped with LoraEmbedding .* those of HuggingFaceEmbedding, too"):
        verify_vectors(index, read_vectors(index), theirs)
    prompted = HuggingFaceEmbedding(model_name=str(tiny_model), device="cpu", text_instruction="w9 w9 w9 w9 ")
    with pytest.raises(WrongIndexError, match="another model than"):
        verify_vectors(index, read_vectors(index), prompted)


def test_a_few_vectors_of_another_model_are_warned_of(
    base: LoraEmbedding, other: LoraEmbedding, nodes: list[TextNode]
) -> None:
    texts = [node.get_content(metadata_mode="embed") for node in nodes]  # type: ignore[arg-type]
    vectors = np.float32(base.get_text_embedding_batch(texts))
    vectors[:2] = other.get_text_embedding_batch(texts[:2])
    stored = StoredVectors(nodes, vectors)
    with pytest.warns(UserWarning, match=r"2 of 12 passages .*'n0': "):
        verify_vectors(stored, stored, base)


def test_another_number_of_dimensions_and_a_store_without_texts(
    base: LoraEmbedding, nodes: list[TextNode], tmp_path_factory: pytest.TempPathFactory
) -> None:
    wide = LoraEmbedding(base_model=make_tiny_model(tmp_path_factory.mktemp("wide"), width=64), device="cpu")
    index = VectorStoreIndex(nodes, embed_model=base)
    with pytest.raises(WrongIndexError, match=r"vectors of 32 dimensions, and .* with 64"):
        verify_vectors(index, read_vectors(index), wide)
    alone = read_vectors(index.vector_store)
    with pytest.warns(UserWarning, match="keeps no texts"):
        verify_vectors(index.vector_store, alone, base)
