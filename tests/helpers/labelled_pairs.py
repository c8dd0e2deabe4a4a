"""Labelled pairs for tests: pairs with a common topic word are labelled 1, others 0."""

import random

from llama_index_lora_embed import LabelledPairs
from tests.conftest import WORDS

ROWS = [("a cat", "a kitten", 1), ("a cat sleeps", "rain falls", 0), ("a dog", "a hound", 1)]


def columns_of(pairs):
    return pairs.texts1, pairs.texts2, pairs.scores


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def make_pairs(topics=50, seed=0) -> LabelledPairs:
    """Two wordings of each topic, which share its one word, and pairs of wordings of two topics; the rest is noise."""
    rng = random.Random(seed)

    def wording(topic):
        return " ".join(rng.sample([topic, *rng.sample(WORDS[50:70], 4)], 5))

    rows = []
    for _ in range(topics):
        first, second = rng.sample(WORDS[:50], 2)
        rows += [(wording(first), wording(first), 1), (wording(first), wording(second), 0)]
    return LabelledPairs.from_rows(rows)


TRAIN, VAL = make_pairs(), make_pairs(topics=30, seed=1)
