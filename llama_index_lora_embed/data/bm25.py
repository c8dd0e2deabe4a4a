"""BM25: which passages share the words of a query, above all the rare ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.data.text import tokens_of


class BM25:
    """BM25 over texts, as Lucene computes it (bm25s), with k1=1.5 and b=0.75.

    Words are those of `tokens_of`, so that scripts without spaces are searched by characters. No word is left out:
    frequent ones weigh next to nothing.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        import bm25s

        vocabulary = {"": 0}  # the index needs one word, also where the texts have none
        # numbers instead of words, which would take ten times the memory
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in tokens_of(text)] for text in texts]
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        with np.errstate(invalid="ignore"):  # texts without a word have the mean length 0
            self._index.index((ids, vocabulary), show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """A score for each text [texts], in their order; 0 for those that share no word with the query."""
        ids = self._index.get_tokens_ids(tokens_of(query))
        return cast(NDArray[np.float32], self._index.get_scores_from_ids(ids))
