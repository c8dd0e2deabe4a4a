import pickle
import warnings

import pytest

from llama_index_lora_embed.core.errors import ConfigError, DatasetError, SplitError
from llama_index_lora_embed.data import near_duplicates, split_by_source
from llama_index_lora_embed.data.split import folds_by_source, split_report
from tests.conftest import make_dataset


@pytest.mark.parametrize("seed", range(5))
def test_no_document_is_on_both_sides(seed):
    dataset = make_dataset(passages=40)
    train, val = split_by_source(dataset, 0.2, seed=seed)
    train_documents = {dataset.source_of(i) for i in train.corpus}
    val_documents = {dataset.source_of(i) for i in val.answer_ids()}
    assert not train_documents & val_documents
    assert train.queries.keys() | val.queries.keys() == dataset.queries.keys()
    assert not train.queries.keys() & val.queries.keys()
    assert not train.overlap(val)
    train.check()
    val.check()


def test_validation_searches_the_whole_corpus():
    dataset = make_dataset(passages=40)
    _, val = split_by_source(dataset, 0.2)
    assert val.corpus == dataset.corpus


def test_the_searched_corpus_can_be_bounded_and_keeps_the_answers():
    _, val = split_by_source(make_dataset(passages=40), 0.2, max_passages=12)
    assert len(val.corpus) == 12
    assert val.answer_ids() <= val.corpus.keys()


def test_the_share_is_about_what_was_asked():
    _, val = split_by_source(make_dataset(passages=100), 0.1)
    assert 20 <= len(val.queries) <= 24


def test_it_is_seeded():
    dataset = make_dataset(passages=40)
    assert split_by_source(dataset, seed=1)[1] == split_by_source(dataset, seed=1)[1]
    assert split_by_source(dataset, seed=1)[1] != split_by_source(dataset, seed=2)[1]


def test_a_query_with_answers_in_two_documents_ties_them():
    dataset = make_dataset(passages=8, questions=1)
    dataset.relevant_docs["q0-0"] = ["p0", "p2"]
    for seed in range(8):
        train, val = split_by_source(dataset, 0.3, seed=seed)
        side = train if "q0-0" in train.queries else val
        assert {"q0-0", "q1-0", "q2-0", "q3-0"} <= side.queries.keys()


@pytest.mark.parametrize("seed", range(5))
def test_most_of_the_queries_are_trained_on_where_they_are_tied_together(seed):
    dataset = make_dataset(passages=20)
    tied = list(dataset.queries)[:36]
    for query_id in tied:
        dataset.relevant_docs[query_id] = [*dataset.relevant_docs[query_id], "p0"]
    train, val = split_by_source(dataset, 0.1, seed=seed)
    assert set(tied) <= train.queries.keys()
    assert val.queries


def test_a_text_that_stands_in_two_documents_ties_them():
    dataset = make_dataset(passages=8, questions=1)
    dataset.corpus["p6"] = dataset.corpus["p0"].upper()
    for seed in range(8):
        train, val = split_by_source(dataset, 0.3, seed=seed)
        assert not train.overlap(val)


def test_hard_negatives_on_the_other_side_are_left_out():
    dataset = make_dataset(passages=40)
    dataset.hard_negatives = {q: [f"p{(int(q[1:].split('-')[0]) + 7) % 40}"] for q in dataset.queries}
    for part in split_by_source(dataset, 0.3, max_passages=20):
        part.check()
        assert any(part.hard_negatives.values())


def test_one_document_cannot_be_split():
    dataset = make_dataset(passages=2)
    with pytest.raises(SplitError, match="one source document"):
        split_by_source(dataset)


def test_an_incomplete_dataset_is_refused():
    dataset = make_dataset(passages=4)
    del dataset.relevant_docs["q0-0"]
    with pytest.raises(DatasetError, match="no relevant passage"):
        split_by_source(dataset)
    with pytest.raises(DatasetError, match="0 queries"):
        split_by_source(make_dataset(passages=0))


def test_two_documents_can():
    train, val = split_by_source(make_dataset(passages=4), 0.9)
    assert len(train.queries) == len(val.queries) == 4


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2, "0.1", None, True])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ConfigError, match="val_fraction"):
        split_by_source(make_dataset(), fraction)


def nearly_the_same(dataset, first, second):
    """Give two passages of the dataset forty words that differ in the last one."""
    words = [f"word{i}" for i in range(40)]
    dataset.corpus[first] = " ".join(words)
    dataset.corpus[second] = " ".join([*words[:-1], "changed"])


def test_a_text_that_nearly_stands_in_two_documents_ties_them():
    dataset = make_dataset(passages=40, questions=1)
    nearly_the_same(dataset, "p6", "p0")
    for seed in range(12):
        train, val = split_by_source(dataset, 0.5, seed=seed)
        assert ("q0-0" in val.queries) == ("q6-0" in val.queries)
        assert split_report(train, val).near_duplicates == 0


def test_pages_of_one_template_are_still_split_and_the_user_is_told():
    dataset = make_dataset(passages=40, questions=1)
    words = [f"word{i}" for i in range(60)]
    for number, passage_id in enumerate(dataset.corpus):
        dataset.corpus[passage_id] = " ".join([*words, f"number{number}"])
    with pytest.warns(UserWarning, match="tie 40 of 40 queries"):
        train, val = split_by_source(dataset, 0.2)
    assert len(val.queries) == 8
    assert split_report(train, val).near_duplicates == 8


def test_few_documents_are_warned_of():
    with pytest.warns(UserWarning, match="about 9 documents, fewer than 10"):
        split_by_source(make_dataset(passages=18), 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, val = split_by_source(make_dataset(passages=20), 0.2)
    assert (len(train.queries), len(val.queries)) == (32, 8)


def test_the_report_counts_both_sides_and_what_they_share():
    train, val = make_dataset(passages=20), make_dataset(passages=6, seed=9, prefix="v")
    nearly_the_same(train, "p3", "p4")
    val.corpus["vp1"] = train.corpus["p3"]
    val.queries["vq0-0"] = train.queries["q0-0"].upper()
    report = split_report(train, val)
    assert (report.train_documents, report.val_documents) == (10, 3)
    assert (report.train_queries, report.val_queries) == (40, 12)
    assert report.near_duplicates == 1
    assert report.near_duplicate_examples == [("p3", "vp1")]
    assert report.shared_wordings == 1
    assert "validation: 12 queries about 3 documents" in str(report)
    assert "'vp1' of 'p3'" in str(report)


def test_the_report_tells_same_ids_on_both_sides_apart():
    train, val = make_dataset(passages=20), make_dataset(passages=20, seed=9)
    assert split_report(train, val).near_duplicates == 0
    assert split_report(train, train).near_duplicates == 20


def test_passages_are_hashed_once_for_a_dataset_its_parts_and_its_copies(monkeypatch):
    hashed = []
    signature = near_duplicates._signature
    monkeypatch.setattr(near_duplicates, "_signature", lambda shingles: hashed.append(1) or signature(shingles))
    dataset = make_dataset(passages=40)
    train, val = split_by_source(dataset, 0.2)
    split_report(train, val)
    for part in (train, val, train.model_copy(deep=True), train.model_copy(update={"hard_negatives": {}})):
        part.near_duplicates()
    assert len(hashed) == 40
    dataset.corpus["p0"] = "changed since"
    nearly_the_same(dataset, "p1", "p2")
    assert dataset.near_duplicates() == {"p1": "p1", "p2": "p1"}
    assert len(hashed) == 43
    again = pickle.loads(pickle.dumps(train))
    assert again == train
    assert again.near_duplicates() == {}
    assert len(hashed) == 43 + len(train.corpus)


def test_folds_hold_each_query_once_and_share_no_document_with_their_training():
    dataset = make_dataset(passages=30)
    folds = folds_by_source(dataset, 3, seed=1)
    held = [query for _, val in folds for query in val.queries]
    assert sorted(held) == sorted(dataset.queries)
    for train, val in folds:
        assert {*train.queries} | {*val.queries} == {*dataset.queries}
        documents = [{side.source_of(i) for i in side.answer_ids()} for side in (train, val)]
        assert not documents[0] & documents[1]
        assert 14 <= len(val.queries) <= 26


def test_more_folds_than_documents_are_refused():
    with pytest.raises(SplitError, match="at least 40, one for each fold"):
        folds_by_source(make_dataset(passages=30), 40)
