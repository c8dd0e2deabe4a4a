import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Normalize

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import NonFiniteLossError
from llama_index_lora_embed.training.negatives.mining import encode

SETTINGS = MiningSettings(show_progress_bar=False)
TEXTS = ["red green", "green", "blue blue red"]


def bag_of_words(weights=None):
    bag = BoW(["red", "green", "blue"], word_weights=weights or {})
    return SentenceTransformer(modules=[bag, Normalize()], device="cpu")


def test_embeddings_have_length_1_in_the_order_of_the_texts():
    half = np.sqrt(0.5)
    expected = [[half, half, 0], [0, 1, 0]]
    np.testing.assert_allclose(encode(bag_of_words(), TEXTS[:2], "document", SETTINGS), expected, atol=1e-6)


def test_queries_and_passages_get_their_own_prompts():
    model = bag_of_words()
    model.prompts["query"] = "blue "
    passages, queries = (encode(model, TEXTS, task, SETTINGS) for task in ("document", "query"))
    assert not np.allclose(passages, queries)


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteLossError, match=r"1 of 3 document embeddings.*\n?.*blue blue"):
        encode(bag_of_words({"blue": float("nan")}), TEXTS, "document", SETTINGS)
