"""The part of a validation set on which steps are compared."""

import random

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.evaluation.subset import selection_subset
from tests.conftest import make_dataset


@pytest.fixture
def data():
    return make_dataset(passages=400)


@pytest.fixture
def rankings(data):
    """For each query a hundred passages in random order."""
    drawn = random.Random(1)
    return {query: drawn.sample(list(data.corpus), 100) for query in data.queries}


def relevant_to(data):
    return {i for ids in data.relevant_docs.values() for i in ids}


def test_a_subset_has_all_relevant_passages_of_its_queries_and_the_hardest_ones(data, rankings):
    subset = selection_subset(data, rankings, 200, seed=0)
    assert len(subset.corpus) == 200
    relevant = relevant_to(subset)
    assert relevant <= subset.corpus.keys()
    assert len(relevant) == 140
    assert all(subset.relevant_docs[query] == data.relevant_docs[query] for query in subset.queries)
    first = [rankings[query][0] for query in subset.queries]
    hardest = [i for i in dict.fromkeys(first) if i not in relevant][:60]
    assert len(hardest) == 60
    assert subset.corpus.keys() >= set(hardest)


def test_every_query_takes_part_whose_relevant_passages_are_there(data, rankings):
    subset = selection_subset(data, rankings, 200, seed=0)
    assert len(subset.queries) == 280, "two queries for each of its relevant passages"
    assert list(subset.queries) == [query for query in data.queries if query in subset.queries]


def test_a_subset_is_a_function_of_data_rankings_and_seed(data, rankings):
    once, twice, other = (selection_subset(data, rankings, 200, seed) for seed in (0, 0, 1))
    assert (once.queries, once.corpus) == (twice.queries, twice.corpus)
    assert once.queries.keys() != other.queries.keys()


def test_where_few_passages_are_relevant_all_queries_take_part_and_random_passages_fill_up():
    data = make_dataset(passages=400)
    few = data.subset([f"q{number}-{question}" for number in range(60) for question in range(2)], data.corpus)
    rankings = {query: list(data.corpus)[:100] for query in few.queries}
    subset = selection_subset(few, rankings, 200, seed=0)
    assert subset.queries == few.queries
    assert len(subset.corpus) == 200
    assert subset.corpus.keys() >= set(list(data.corpus)[:100]), "relevant, or near a query"


def test_nearly_all_passages_are_no_subset(data, rankings):
    assert selection_subset(data, rankings, 400, seed=0) is None
    assert selection_subset(data, rankings, 330, seed=0) is None
    assert selection_subset(data, rankings, 310, seed=0) is not None


def test_queries_with_many_relevant_passages_are_compared_on_all():
    corpus = {f"p{i}": f"passage {i}" for i in range(1000)}
    queries = {f"q{i}": f"query {i}" for i in range(120)}
    relevant = {query: list(corpus)[8 * i : 8 * i + 8] for i, query in enumerate(queries)}
    data = EmbeddingQAFinetuneDataset(queries=queries, corpus=corpus, relevant_docs=relevant)
    rankings = {query: list(corpus)[:100] for query in queries}
    assert selection_subset(data, rankings, 200, seed=0) is None, "room for seventeen queries"
