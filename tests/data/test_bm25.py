import numpy as np
import pytest

from llama_index_lora_embed.data.bm25 import BM25
from tests.helpers.passages import PASSWORD, SHIPPING, WARRANTY


def test_the_passage_with_the_rare_words_of_the_query_scores_highest():
    bm25 = BM25([SHIPPING, WARRANTY, PASSWORD])
    assert bm25.scores("is the BATTERY covered?").argmax() == 1
    assert bm25.scores("reset the password").argmax() == 2
    assert bm25.scores("customs").tolist()[1:] == [0.0, 0.0]


def test_scores_are_those_of_the_formula():
    texts = ["a a b", "a c", "c d e f"]
    length, mean = 3, 3
    rarity = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # "a" is in two of three texts
    expected = rarity * 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * length / mean))
    assert BM25(texts).scores("a")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("query", ["", "???", "unheard"])
def test_a_query_that_shares_no_word_scores_nothing(query):
    assert BM25([SHIPPING, "", "..."]).scores(query).tolist() == [0.0] * 3


@pytest.mark.filterwarnings("error")
def test_texts_without_a_word_score_nothing():
    assert BM25(["", "?"]).scores("what?").tolist() == [0.0, 0.0]


def test_scripts_without_spaces_are_searched_by_characters():
    assert BM25(["机器每天清洗", "工资每月发放"]).scores("清洗机器").argmax() == 0
