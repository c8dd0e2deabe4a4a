import random

import pytest

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.core.errors import NonFiniteLossError
from llama_index_lora_embed.data.filters.rules import filter_queries
from tests.helpers.filters import HashedWords, make, run
from tests.helpers.passages import SHIPPING


class AlwaysShipping(HashedWords):
    """Finds one passage, whatever is asked."""

    def _get_query_embedding(self, query):
        return self._vector(SHIPPING)


class Broken(HashedWords):
    def _get_text_embedding(self, text):
        return [float("nan")] * 256


def many_passages():
    rng = random.Random(1)
    corpus = {f"p{i}": " ".join(rng.sample([f"w{j}" for j in range(900)], 30)) for i in range(60)}
    queries = [(" ".join(corpus[p].split()[::6]), p) for p in corpus]
    return corpus, queries


def test_a_query_that_does_not_find_its_passage_goes():
    corpus, queries = many_passages()
    wrong = [(queries[40][0], "p1"), (queries[41][0], "p2", "human"), (queries[42][0], "p3", "neighbour")]
    dataset = make([*queries[:20], *wrong], corpus)
    settings = QueryFilterSettings(round_trip_k=3)
    kept, report = run(dataset, settings, embed_model=HashedWords())
    assert kept == [*(f"q{i}" for i in range(20)), "q21", "q22"]
    assert report.dropped == {"none of its passages is among the first 3 of the embedding model or of BM25": 1}
    assert report.notes == []
    assert len(run(dataset, settings)[0]) == 23, "without a model there is no round trip"
    assert len(run(dataset, QueryFilterSettings(round_trip_k=None), embed_model=HashedWords())[0]) == 23
    assert len(run(dataset, QueryFilterSettings(round_trip_k=60), embed_model=HashedWords())[0]) == 23


def test_a_query_that_only_its_words_find_is_hard_and_stays():
    dataset = make(
        [
            ("How long is the battery covered?", "warranty"),
            ("Who can reset the password of a member?", "password"),
            ("When do parcels arrive in Norway?", "warranty"),  # the words of another passage
            ("Unheard", "password"),  # the words of none
            ("Who pays the customs duty?", "shipping"),
        ]
    )
    settings = QueryFilterSettings(round_trip_k=1, round_trip_max_dropped=1.0)
    kept, report = run(dataset, settings, embed_model=AlwaysShipping())
    assert kept == ["q0", "q1", "q4"]
    assert report.kept_hard == 2
    assert "2 of them hard: found by BM25, not by the embedding model" in str(report)
    only_easy = QueryFilterSettings(round_trip_k=1, round_trip_max_dropped=1.0, round_trip_keep_hard=False)
    kept, report = run(dataset, only_easy, embed_model=AlwaysShipping())
    assert kept == ["q4"]
    assert report.kept_hard == 0
    _, report = run(dataset, QueryFilterSettings(round_trip_k=3), embed_model=AlwaysShipping())
    assert (report.kept, report.kept_hard) == (5, 0), "what the model finds is not hard"


def test_hard_queries_do_not_count_as_dropped_where_that_would_be_most():
    right = [(f"What about {word}?", "warranty") for word in ("batteries and battery", "water", "falls", "repairs")]
    wrong = [("How fast are parcels to Norway?", "password")]
    kept, report = run(make([*right, *wrong]), QueryFilterSettings(round_trip_k=1), embed_model=AlwaysShipping())
    assert kept == ["q0", "q1", "q2", "q3"]
    assert (report.kept_hard, report.notes) == (4, [])


def test_any_relevant_passage_found_is_enough_and_equal_passages_do_not_push_it_down():
    corpus, queries = many_passages()
    corpus |= {f"same{i}": corpus["p0"] for i in range(5)}
    dataset = make([queries[0], queries[1], queries[2]], corpus)
    dataset.relevant_docs["q1"] = ["p50", "p1"]
    settings = QueryFilterSettings(round_trip_k=1)
    assert run(dataset, settings, embed_model=HashedWords())[0] == ["q0", "q1", "q2"]


def test_a_round_trip_that_would_drop_most_is_not_applied_and_says_so():
    corpus, queries = many_passages()
    wrong = [(text, "p59") for text, _ in queries[:6]]
    dataset = make([*wrong, *queries[10:15]], corpus)
    with pytest.warns(UserWarning, match="would have dropped 6 of 11 queries") as caught:
        result, report = filter_queries(dataset, QueryFilterSettings(round_trip_k=3), embed_model=HashedWords())
    assert caught[0].filename == __file__
    assert len(result.queries) == report.kept == 11
    assert "6 of 11 queries (55%" in report.notes[0]
    assert "note: The round trip was not applied" in str(report)


def test_pieces_of_the_round_trip_give_what_the_whole_gives(monkeypatch):
    corpus, queries = many_passages()
    dataset = make([*queries[:20], (queries[40][0], "p1"), (queries[41][0], "p2")], corpus)
    settings = QueryFilterSettings(round_trip_k=3)
    whole = filter_queries(dataset, settings, embed_model=HashedWords())
    monkeypatch.setattr("llama_index_lora_embed.data.filters.round_trip._TEXTS_AT_ONCE", 7)
    monkeypatch.setattr("llama_index_lora_embed.data.filters.round_trip._QUERIES_AT_ONCE", 11)
    assert filter_queries(dataset, settings, embed_model=HashedWords()) == whole
    assert whole[1].kept == 20


def test_a_function_that_makes_the_model_is_called_only_if_there_is_something_to_check():
    made = []

    def model():
        made.append(1)
        return HashedWords()

    corpus, queries = many_passages()
    filter_queries(make(queries[:5], corpus, "human"), embed_model=model)
    assert made == []
    filter_queries(make(queries[:5], corpus), embed_model=model)
    assert made == [1]


def test_embeddings_that_are_not_finite_are_an_error():
    corpus, queries = many_passages()
    with pytest.raises(NonFiniteLossError, match="round trip"):
        filter_queries(make(queries[:5], corpus), embed_model=Broken())
