import datasets
import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LabelledPairs
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.training_data import from_huggingface

TRIPLETS = {"anchor": ["a", "b"], "positive": ["x", "y"], "negative": ["p", "q"]}


def stream(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("streamed", [False, True])
def test_anchors_with_positives_and_negatives_are_queries(streamed):
    data = datasets.Dataset.from_dict(TRIPLETS)
    dataset = from_huggingface(data.to_iterable_dataset() if streamed else data, "dataset")
    assert isinstance(dataset, EmbeddingQAFinetuneDataset)
    assert list(dataset.queries.values()) == ["a", "b"]
    assert list(dataset.corpus.values()) == ["x", "p", "y", "q"]
    assert [len(ids) for ids in dataset.hard_negatives.values()] == [1, 1]


def test_a_stream_without_known_columns_is_read_by_its_first_row():
    assert list(from_huggingface(stream([{"query": "a", "passage": "x"}]), "dataset").queries.values()) == ["a"]
    pairs = from_huggingface(stream([{"sentence1": "a", "sentence2": "b", "score": 0.3}]), "dataset")
    assert pairs == LabelledPairs(["a"], ["b"], [0.3])


def test_a_query_and_a_passage_with_a_label_are_queries_and_two_sentences_with_one_are_pairs():
    rows = {"query": ["a", "a"], "document": ["x", "y"], "label": [1, 0]}
    dataset = from_huggingface(datasets.Dataset.from_dict(rows), "dataset")
    assert [len(ids) for ids in dataset.hard_negatives.values()] == [1]
    rows = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1.0, 0.0]}
    assert from_huggingface(datasets.Dataset.from_dict(rows), "dataset").scores == [1.0, 0.0]
    without = from_huggingface(datasets.Dataset.from_dict(rows).remove_columns("label"), "dataset")
    assert list(without.queries.values()) == ["a", "c"]


def test_rows_that_are_not_used_are_counted_in_a_warning():
    data = datasets.Dataset.from_dict({"anchor": ["a", None], "positive": ["x", "y"]})
    with pytest.warns(UserWarning, match="1 rows or texts of dataset are not used \\(row without query: 1\\)"):
        from_huggingface(data, "dataset")


def test_splits_classes_and_unknown_columns_are_refused():
    data = datasets.Dataset.from_dict(TRIPLETS)
    with pytest.raises(DatasetError, match=r"dataset of the splits 'train', 'test'.*dataset\['train'\]"):
        from_huggingface(datasets.DatasetDict(train=data, test=data), "dataset")
    with pytest.raises(ConfigError, match="the columns 'left', 'right'"):
        from_huggingface(datasets.Dataset.from_dict({"left": ["a"], "right": ["b"]}), "dataset")
    with pytest.raises(DatasetError, match="without a usable row"):
        from_huggingface(datasets.Dataset.from_dict({"query": [], "passage": []}), "dataset")
    features = {name: datasets.Value("string") for name in ("premise", "hypothesis")}
    features["label"] = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    nli = datasets.Dataset.from_dict(
        {"premise": ["a"], "hypothesis": ["b"], "label": [0]}, features=datasets.Features(features)
    )
    with pytest.raises(DatasetError, match="the classes entailment"):
        from_huggingface(nli, "dataset")


@pytest.mark.parametrize("value", [None, {"queries": {}}, "train.json", LabelledPairs(["a"], ["b"], [1.0])])
def test_other_values_stay_as_they_are(value):
    assert from_huggingface(value, "dataset") is value
