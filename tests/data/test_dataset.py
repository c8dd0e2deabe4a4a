import json

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedError
from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.origins import HUMAN
from tests.conftest import make_dataset


def small(**changes):
    fields = {
        "queries": {"q1": "first", "q2": "second"},
        "corpus": {"p1": "one", "p2": "two"},
        "relevant_docs": {"q1": ["p1"], "q2": ["p2"]},
    }
    return EmbeddingQAFinetuneDataset(**{**fields, **changes})


def test_a_file_survives_writing_and_reading(tmp_path):
    dataset = small(source_documents={"p1": "d1"}, query_origins={"q1": "human"}, corpus={"p1": "één 🌍", "p2": "two"})
    dataset.save_json(tmp_path / "new" / "dataset.json")
    assert EmbeddingQAFinetuneDataset.from_json(tmp_path / "new" / "dataset.json") == dataset
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dataset.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "dataset.json"
    small().save_json(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        small(queries={"q1": "changed"}).save_json(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["dataset.json"]


def test_query_docid_pairs_are_those_of_llama_index():
    assert small().query_docid_pairs == [("first", ["p1"]), ("second", ["p2"])]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"queries": 1}', "not json", "[" * 100_000, "\xff"])
def test_a_file_with_something_else_is_a_dataset_error(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DatasetError):
        EmbeddingQAFinetuneDataset.from_json(path)


def test_a_missing_file_is_a_dataset_error_that_names_it(tmp_path):
    with pytest.raises(DatasetError, match="nowhere"):
        EmbeddingQAFinetuneDataset.from_json(tmp_path / "nowhere.json")


def test_texts_that_are_no_strings_are_named():
    with pytest.raises(DatasetError) as caught:
        small(queries={"q1": 5, "q2": None}, corpus={"p1": ["a"], "p2": "two"})
    assert len(caught.value.problems) == 3
    assert any("queries.q1" in problem and "5" in problem for problem in caught.value.problems)


def test_texts_that_became_something_else_later_are_named():
    dataset = small()
    dataset.queries["q1"], dataset.corpus["p2"] = None, 7
    assert dataset.problems() == ["query 'q1' is not text: None", "passage 'p2' is not text: 7"]


def test_check_names_every_problem():
    dataset = small(
        queries={"q1": "  ", "q2": "second", "q3": "third", "q4": "fourth"},
        corpus={"p1": "", "p2": "two"},
        relevant_docs={"q1": ["p1"], "q2": ["gone"], "q3": [], "ghost": ["p2"], "q4": ["p2"]},
        hard_negatives={"q4": ["p2", "lost"]},
        judged_irrelevant={"q4": ["p2"], "nobody": ["p1"]},
        training_passages={"q2": " ", "other": "x"},
    )
    with pytest.raises(DatasetError) as caught:
        dataset.check()
    text = "\n".join(caught.value.problems)
    for expected in (
        "query 'q1' is empty",
        "passage 'p1' is empty",
        "query 'q3' has no relevant passage",
        "relevant_docs names query 'ghost'",
        "relevant_docs['q2'] names passage 'gone'",
        "hard_negatives['q4'] names passage 'lost'",
        "passage 'p2' is both relevant and a hard negative of query 'q4'",
        "passage 'p2' is both relevant and judged irrelevant to query 'q4'",
        "judged_irrelevant names query 'nobody'",
        "training passage of query 'q2' is empty",
        "training_passages names query 'other'",
    ):
        assert expected in text
    assert len(caught.value.problems) == 11


def test_an_empty_dataset_is_refused():
    with pytest.raises(LoraEmbedError, match="0 queries"):
        EmbeddingQAFinetuneDataset(queries={}, corpus={}, relevant_docs={}).check()


def test_shared_queries_and_passages_are_found_by_text_whatever_the_ids():
    train = small(queries={"q1": "Who  calls?", "q2": "second"}, relevant_docs={"q1": ["p1"], "q2": ["p1"]})
    val = EmbeddingQAFinetuneDataset(
        queries={"q2": "another", "x": " who calls? "},
        corpus={"p1": "uno", "y": "ONE", "z": "two"},
        relevant_docs={"q2": ["p1", "y"], "x": ["z"]},
    )
    assert val.shared_queries(train) == ["x"]
    assert val.shared_passages(train) == {"y"}, "z is only searched in training"
    assert train.shared_queries(val) == ["q1"]


def test_overlap_is_found_by_text_whatever_the_ids():
    train = small()
    val = EmbeddingQAFinetuneDataset(
        queries={"x": "new?"}, corpus={"y": " ONE ", "p2": "2"}, relevant_docs={"x": ["y"]}
    )
    assert train.overlap(val) == ["q1"]


def test_the_same_ids_with_other_texts_are_no_overlap():
    val = small(corpus={"p1": "uno", "p2": "dos"})
    assert small().overlap(val) == []


def test_a_passage_that_is_only_searched_is_no_overlap():
    val = small(queries={"q2": "second"}, relevant_docs={"q2": ["p2"]})
    train = small(queries={"q1": "first"}, relevant_docs={"q1": ["p1"]})
    assert train.overlap(val) == []


def test_another_chunk_of_the_same_document_is_overlap():
    train = small(source_documents={"p1": "handbook", "p2": "faq"})
    val = EmbeddingQAFinetuneDataset(
        queries={"x": "new?"}, corpus={"y": "other"}, relevant_docs={"x": ["y"]}, source_documents={"y": "handbook"}
    )
    assert train.overlap(val) == ["q1"]


def test_the_digest_sees_content_not_order():
    reordered = small(corpus={"p2": "two", "p1": "one"})
    assert small().digest() == reordered.digest()
    assert small().digest() != small(corpus={"p1": "one", "p2": "two!"}).digest()


def test_coerce_takes_what_users_have(tmp_path):
    dataset = small()
    dataset.save_json(tmp_path / "d.json")

    class Old:
        queries, corpus, relevant_docs, mode = dataset.queries, dataset.corpus, dataset.relevant_docs, "text"

    for given in (dataset, dataset.model_dump(), Old(), str(tmp_path / "d.json"), tmp_path / "d.json"):
        assert EmbeddingQAFinetuneDataset.coerce(given) == dataset
    with pytest.raises(DatasetError, match="list"):
        EmbeddingQAFinetuneDataset.coerce([1, 2])
    with pytest.raises(DatasetError, match="wrong type"):
        EmbeddingQAFinetuneDataset.coerce({1: 2})


def test_subset_keeps_what_belongs_to_the_queries():
    part = make_dataset().subset(["q3-0", "q3-1"])
    assert list(part.corpus) == ["p3"]
    assert part.source_documents == {"p3": "document1"}
    assert part.query_origins == {"q3-0": "human", "q3-1": "human"}
    part.check()


def test_optional_keys_are_absent_from_a_plain_file(tmp_path):
    small().save_json(tmp_path / "d.json")
    assert set(json.loads((tmp_path / "d.json").read_text())) == {"queries", "corpus", "relevant_docs", "mode"}


def test_files_of_earlier_versions_are_read(tmp_path):
    fields = {"queries": {"q1": "first"}, "corpus": {"p1": "one"}, "relevant_docs": {"q1": ["p1"]}, "mode": "text"}
    path = tmp_path / "d.json"
    path.write_text(json.dumps(fields))  # as llama-index-finetuning writes it
    assert EmbeddingQAFinetuneDataset.from_json(path).check().queries == {"q1": "first"}
    path.write_text(json.dumps(fields | {"query_origins": {"q1": "people"}}))
    again = EmbeddingQAFinetuneDataset.from_json(path)
    assert again.query_origins == {"q1": HUMAN} == {"q1": "human"}
    again.save_json(path)
    assert json.loads(path.read_text())["query_origins"] == {"q1": "human"}


def test_a_subset_keeps_the_judgments_of_its_queries_and_passages():
    dataset = small(judged_irrelevant={"q1": ["p2"], "q2": ["p1"]}).check()
    assert dataset.subset(["q1"]).judged_irrelevant == {"q1": ["p2"]}
    assert dataset.subset(["q1"]).corpus.keys() == {"p1", "p2"}
    assert dataset.subset(["q1"], ["p1"]).judged_irrelevant == {"q1": []}
    assert dataset.digest() != small().digest()
