import random

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training.negatives import false_negatives
from llama_index_lora_embed.training.negatives.false_negatives import Corpus, FalseNegatives, Guard, too_close

QUERY = "who keeps the keys"
POSITIVE = "The porter has had them ever since the gate was built."
QUOTED = " and this is a passage that chunks share, of far more than fifty characters "


def reasons(corpus, *, near_duplicates=None, answers=("p",), window=0, **documents):
    """For each passage, why it is no negative of the query that `p` answers, or None."""
    passages = {"p": POSITIVE, **corpus}
    sources = {i: documents.get(i, "x") for i in passages}
    dataset = EmbeddingQAFinetuneDataset(
        queries={"q": QUERY}, corpus=passages, relevant_docs={"q": ["p"]}, source_documents=sources
    )
    known = Corpus(dataset, near_duplicates or {})
    guard = Guard(known, QUERY, set(answers), window)
    return {i: guard.reason(i, {known.alike["p"]}) for i in passages if i != "p"}


@pytest.mark.parametrize("text", [POSITIVE, POSITIVE.upper().replace(" ", "\n ")])
def test_a_positives_text_under_another_id_is_a_duplicate(text):
    assert reasons({"a": text, "b": "Other."}, a="y") == {"a": false_negatives.DUPLICATE, "b": None}


def test_an_answer_to_another_query_of_the_same_wording_is_distinguished_from_a_duplicate():
    found = reasons({"a": "The steward.", "b": "the  STEWARD."}, answers=("p", "a"))
    assert found == dict.fromkeys("ab", false_negatives.WORDING)


@pytest.mark.parametrize("root", ["p", "b", "a"])
def test_near_duplicates_of_a_positive_are_found_whichever_of_them_comes_first(root):
    corpus = {"a": "One.", "b": "Two.", "c": "ONE.", "d": "Three."}
    found = reasons(corpus, near_duplicates=dict.fromkeys("pab", root))
    assert found == {**dict.fromkeys("abc", false_negatives.NEAR_DUPLICATE), "d": None}


def test_near_duplicates_of_another_corpus_are_refused():
    with pytest.raises(ConfigError, match="elsewhere"):
        reasons({"a": "One."}, near_duplicates={"a": "elsewhere"})


@pytest.mark.parametrize(("window", "expected"), [(0, ""), (1, "b"), (2, "bc"), (None, "abcd")])
def test_siblings_are_those_within_the_window(window, expected):
    corpus = {"b": "Next.", "c": "After next.", "other": "Elsewhere.", "d": "At the end.", "a": "Last."}
    found = reasons(corpus, window=window, other="y")
    assert found == {i: false_negatives.SIBLING if i in expected else None for i in corpus}


def test_a_siblings_text_in_another_document_is_a_sibling_too():
    found = reasons({"a": "Next to it.", "b": "NEXT  to it.", "c": "Free."}, window=1, b="y", c="y")
    assert found == {"a": false_negatives.SIBLING, "b": false_negatives.SIBLING, "c": None}


@pytest.mark.parametrize(
    ("positive", "other"), [(QUOTED + "after it.", "Before it" + QUOTED), ("Before it" + QUOTED, QUOTED + "after it.")]
)
def test_a_chunk_overlaps_a_positive_on_either_side_in_its_own_document_only(positive, other):
    corpus = {"p": positive, "a": other, "b": "No part of it."}
    assert reasons(corpus) == {"a": false_negatives.OVERLAP, "b": None}
    assert reasons(corpus, a="y") == {"a": None, "b": None}, "another document may quote"


def test_a_beginning_that_all_chunks_of_a_document_share_is_no_overlap():
    header = "title: a very long title that indexing puts before every chunk\nfile: handbook.pdf\n\n"
    assert reasons({"p": header + POSITIVE, "a": f"{header}Of another matter."}) == {"a": None}


def test_a_chunk_of_the_same_document_that_contains_the_query_is_an_overlap():
    corpus = {"a": f"The third chapter asks: {QUERY.upper()}? It says nothing of the answer."}
    assert reasons(corpus) == {"a": false_negatives.OVERLAP}
    assert reasons(corpus, a="y") == {"a": None}


def test_the_relative_margin_is_a_share_of_the_magnitude():
    settings = MiningSettings(relative_margin=0.1)
    assert too_close(0.46, 0.5, settings) == false_negatives.MARGIN
    assert too_close(0.44, 0.5, settings) is None
    assert too_close(-0.54, -0.5, settings) == false_negatives.MARGIN
    assert too_close(-0.56, -0.5, settings) is None


def tangled_dataset(seed):
    """Documents of overlapping chunks that share texts, nearly share texts and quote queries."""
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(60)]
    corpus, sources = {}, {}
    for document in range(4):
        text = rng.choices(words, k=90)
        for chunk in range(6):
            chunk_id = f"d{document}c{chunk}"
            corpus[chunk_id] = " ".join(text[chunk * 14 : chunk * 14 + rng.choice([6, 14, 22, 30])])
            sources[chunk_id] = f"d{document}"
    ids = list(corpus)
    for number, chunk_id in enumerate(rng.sample(ids, 6)):
        corpus[f"copy{number}"] = corpus[chunk_id].upper().replace(" ", "  ")
        sources[f"copy{number}"] = rng.choice(["d0", "d1", "elsewhere"])
    queries = {f"q{i}": " ".join(rng.choices(words, k=3)) for i in range(8)}
    queries |= {f"r{i}": " ".join(corpus[rng.choice(ids)].split()[2:5]).upper() for i in range(8)}
    queries["s"] = queries["q0"].upper()
    relevant = {q: rng.sample(list(corpus), rng.choice([1, 1, 3])) for q in queries}
    near = {ids[1]: ids[8], ids[15]: ids[8], "copy0": "copy1"}
    return EmbeddingQAFinetuneDataset(
        queries=queries, corpus=corpus, relevant_docs=relevant, source_documents=sources
    ), near


@pytest.mark.parametrize("window", [0, 2, None])
@pytest.mark.parametrize("seed", range(5))
def test_the_excluded_columns_of_a_corpus_are_those_that_are_excluded_pair_by_pair(window, seed):
    dataset, near = tangled_dataset(seed)
    known = FalseNegatives(dataset, window, near)
    passage_ids = [*reversed(dataset.corpus), "d0c0"]  # a column twice, as a node that was cut in two ways has it
    found = known.excluded_columns(dataset.queries, passage_ids)
    pairs = [
        {at for at, passage_id in enumerate(passage_ids) if known.excludes(query_id, passage_id)}
        for query_id in dataset.queries
    ]
    assert found == pairs
    assert any(pairs)
