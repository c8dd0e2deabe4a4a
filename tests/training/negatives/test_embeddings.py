import logging

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Normalize

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError, NonFiniteLossError, OutputDirectoryError
from llama_index_lora_embed.training.negatives.embeddings import encode, vector_folder

SETTINGS = MiningSettings(show_progress_bar=False)
TEXTS = ["red green", "green", "blue blue red"]


def bag_of_words(weights=None):
    bag = BoW(["red", "green", "blue"], word_weights=weights or {})
    return SentenceTransformer(modules=[bag, Normalize()], device="cpu")


@pytest.fixture
def model():
    return bag_of_words()


def test_vectors_have_length_1_in_the_order_of_the_texts(model):
    half = np.sqrt(0.5)
    expected = [[half, half, 0], [0, 1, 0]]
    np.testing.assert_allclose(encode(model, TEXTS[:2], "document", SETTINGS, None), expected, atol=1e-6)


def test_kept_vectors_are_those_that_were_made_and_need_no_model(model, tmp_path):
    made = encode(model, TEXTS, "document", SETTINGS, tmp_path)
    kept = encode(None, TEXTS, "document", SETTINGS, tmp_path)
    assert kept.dtype == np.float32
    np.testing.assert_array_equal(kept, made)


@pytest.mark.parametrize("changed", [TEXTS[::-1], ["red", "greengreen", "blue blue red"], TEXTS[:2]])
def test_changed_texts_are_encoded_anew(model, tmp_path, changed):
    encode(model, TEXTS, "document", SETTINGS, tmp_path)
    expected = encode(model, changed, "document", SETTINGS, None)
    np.testing.assert_array_equal(encode(model, changed, "document", SETTINGS, tmp_path), expected)


def test_questions_and_passages_are_kept_apart(model, tmp_path):
    model.prompts["query"] = "blue "
    passages, questions = (encode(model, TEXTS, task, SETTINGS, tmp_path) for task in ("document", "query"))
    assert not np.allclose(passages, questions)


@pytest.mark.parametrize("left", [0, 60, -7])
def test_a_damaged_file_is_passed_over_and_made_anew(model, tmp_path, caplog, left):
    made = encode(model, TEXTS, "query", SETTINGS, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:left])
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(encode(model, TEXTS, "query", SETTINGS, tmp_path), made)
    assert ["damaged and made anew" in record.getMessage() for record in caplog.records] == [True]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]


def test_a_folder_that_cannot_be_written_is_named(model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="cannot be written"):
        encode(model, TEXTS, "query", SETTINGS, tmp_path / "file")
    assert not caplog.records


def test_vectors_that_are_not_finite_are_refused_and_not_kept(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"1 of 3 document vectors.*\n?.*blue blue"):
        encode(bag_of_words({"blue": float("nan")}), TEXTS, "document", SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fingerprint", [None, "", "../elsewhere"])
def test_a_folder_needs_a_fingerprint(tmp_path, fingerprint):
    with pytest.raises(ConfigError, match="fingerprint"):
        vector_folder(tmp_path, fingerprint)
