import gzip

import datasets
import numpy as np
import pandas as pd
import pytest
from sentence_transformers.sentence_transformer.readers import InputExample

from llama_index_lora_embed import LabelledPairs
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from tests.helpers.labelled_pairs import ROWS, columns_of, written


def test_rows_become_pairs():
    pairs = LabelledPairs.from_rows(ROWS, source="hand")
    assert columns_of(pairs) == (
        ["a cat", "a cat sleeps", "a dog"],
        ["a kitten", "rain falls", "a hound"],
        [1.0, 0.0, 1.0],
    )
    assert (len(pairs), pairs.binary, pairs.positives, pairs.symmetric, pairs.source) == (3, True, 2, True, "hand")
    assert str(pairs) == "3 pairs (2 labelled 1, 1 labelled 0; both texts passages) from hand"
    assert pairs.check() is pairs


@pytest.mark.parametrize(
    ("first", "second", "label", "symmetric"),
    [
        ("sentence1", "sentence2", "score", True),
        ("Sentence_1", "SENTENCE-2", "Label", True),
        ("sentence_0", "sentence_1", "label", True),
        ("text1", "text2", "similarity", True),
        ("sentence_A", "sentence_B", "relatedness_score", True),
        ("question1", "question2", "is_duplicate", True),
        ("premise", "hypothesis", "gold_label", True),
        ("query", "passage", "label", False),
        ("Question", "Answer", "relevance", False),
        ("query", "document", "score", False),
    ],
)
def test_usual_names_of_columns_are_recognised(first, second, label, symmetric):
    pairs = LabelledPairs.from_rows([{"id": 7, label: 1, second: "b", first: "a"}])
    assert columns_of(pairs) == (["a"], ["b"], [1.0])
    assert pairs.symmetric is symmetric


def test_the_roles_can_be_chosen_whatever_the_names_are():
    assert LabelledPairs.from_rows([{"query": "a", "passage": "b", "label": 1}], symmetric=True).symmetric
    assert not LabelledPairs.from_rows(ROWS, symmetric=False).symmetric


def test_columns_are_taken_as_they_are_named():
    rows = [{"sentence1": "no", "Frage": "a", "sentence2": "b", "score": 0.1, "Note": 1}]
    pairs = LabelledPairs.from_rows(rows, columns={"text1": "Frage", "score": "Note"})
    assert columns_of(pairs) == (["a"], ["b"], [1.0])


def test_columns_are_taken_in_the_order_of_a_tuple(tmp_path):
    (tmp_path / "pairs.csv").write_text("Frage,Note,Antwort\na,1,b\nc,0,d\n")
    for columns in (("Frage", "Antwort", "Note"), ["Frage", "Antwort", "Note"]):
        pairs = LabelledPairs.from_file(tmp_path / "pairs.csv", columns=columns)
        assert columns_of(pairs) == (["a", "c"], ["b", "d"], [1.0, 0.0])
    with pytest.raises(ConfigError, match=r"columns\['text2'\]='gone': no such column"):
        LabelledPairs.from_file(tmp_path / "pairs.csv", columns=("Frage", "gone", "Note"))


def test_every_wrong_column_is_named_at_once():
    with pytest.raises(ConfigError, match="'one', 'two'") as caught:
        LabelledPairs.from_rows([{"one": "a", "two": "b"}], columns={"texts1": "one", "text2": "gone"})
    text = "\n".join(caught.value.problems)
    for expected in ("columns['texts1']", "columns['text2']='gone'", "for text1", "for score"):
        assert expected in text
    assert 'columns={"text1"' in str(caught.value)
    with pytest.raises(ConfigError, match="a dict"):
        LabelledPairs.from_rows(ROWS, columns=["a", "b"])
    with pytest.raises(ConfigError, match="3 names in a tuple"):
        LabelledPairs.from_rows(ROWS, columns="abc")
    with pytest.raises(ConfigError, match="'one' cannot be two columns"):
        LabelledPairs.from_rows([{"one": "a", "label": 1}], columns={"text1": "one", "text2": "one"})


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (True, 1.0),
        (np.False_, 0.0),
        (np.int64(1), 1.0),
        (np.float32(0.5), 0.5),
        ("0", 0.0),
        ("1", 1.0),
        (" 0.25 ", 0.25),
        ("yes", 1.0),
        ("No", 0.0),
        ("TRUE", 1.0),
        ("false", 0.0),
    ],
)
def test_labels_that_stand_for_numbers_become_floats(label, number):
    for pairs in (LabelledPairs.from_rows([("a", "b", label)]), LabelledPairs(["a"], ["b"], [label])):
        assert pairs.scores == [number]
        assert type(pairs.scores[0]) is float


@pytest.mark.parametrize("label", [None, "", "maybe", "entailment", float("nan"), float("inf"), [1], b"x", pd.NA])
def test_a_label_that_is_not_a_number_is_an_error_that_names_its_row(label):
    with pytest.raises(DatasetError) as caught:
        LabelledPairs.from_rows([("a", "b", 0), ("c", "d", label)])
    assert caught.value.problems == [f"row 2: the label is not a number: {label!r}"]


def test_a_scale_is_mapped_to_0_to_1():
    assert LabelledPairs.from_rows([("a", "b", 5), ("c", "d", "0"), ("e", "f", 2.5)], scale=(0, 5)).scores == [
        1,
        0,
        0.5,
    ]
    assert LabelledPairs.from_rows([("a", "b", -1), ("c", "d", 1)], scale=(-1, 1)).binary


def test_labels_outside_the_scale_are_an_error_that_offers_one():
    with pytest.raises(DatasetError, match=r"scale=\(0, 5\)") as caught:
        LabelledPairs.from_rows([("a", "b", 5), ("c", "d", 0), ("e", "f", 2.5)])
    assert caught.value.problems == [
        "row 1: the label 5 is outside 0 to 1",
        "row 3: the label 2.5 is outside 0 to 1",
    ]
    with pytest.raises(DatasetError, match="6 is outside 0 to 5"):
        LabelledPairs.from_rows([("a", "b", 6)], scale=(0, 5))


@pytest.mark.parametrize("scale", [5, (5, 0), (0, 0), "ab", (0, float("inf")), (0, 1, 2), (None, 1)])
def test_an_invalid_scale_is_refused(scale):
    with pytest.raises(ConfigError, match="scale="):
        LabelledPairs.from_rows(ROWS, scale=scale)


def test_every_row_that_is_not_a_pair_is_named():
    rows = [("a", "b"), "a\tb\t1", ("", "b", 1), ("a", None, 1), (5, "b", "x"), ("half \udc80", "b", 1), ("a", "b", 1)]
    with pytest.raises(DatasetError) as caught:
        LabelledPairs.from_rows(rows)
    assert sorted(caught.value.problems) == [
        "row 1 is neither a mapping nor (text, text, label): ('a', 'b')",
        "row 2 is neither a mapping nor (text, text, label): 'a\\tb\\t1'",
        "row 3: the first text is empty",
        "row 4: the second text is not text: None",
        "row 5: the first text is not text: 5",
        "row 5: the label is not a number: 'x'",
        "row 6: the first text is not UTF-8",
    ]


@pytest.mark.parametrize("rows", [[], iter(()), "a,b,1", {"a": 1}, None, 5])
def test_a_source_without_rows_is_a_dataset_error(rows):
    with pytest.raises(DatasetError):
        LabelledPairs.from_rows(rows)


def test_data_frames_and_input_examples_are_rows():
    frame = pd.DataFrame({"text1": ["a", "c"], "text2": ["b", "d"], "label": [1, 0]})
    examples = [InputExample(texts=["a", "b"], label=1), InputExample(texts=["c", "d"], label=0)]
    expected = LabelledPairs(["a", "c"], ["b", "d"], [1, 0])
    assert LabelledPairs.coerce(frame) == LabelledPairs.coerce(examples) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'sentence1,sentence2,score\n"a, b",c,1\nd,é,0\n'),
        ("p.csv", "sentence1;sentence2;score\r\na, b;c;1\r\nd;é;0\r\n"),
        ("p.tsv", "id\tsentence1\tsentence2\tscore\n1\ta, b\tc\t1\n2\td\té\t0\n"),
        ("p.jsonl", '{"text1": "a, b", "text2": "c", "label": 1}\n\n{"text1": "d", "text2": "é", "label": 0}'),
        ("p.json", '[{"query": "a, b", "text": "c", "score": true}, {"query": "d", "text": "é", "score": "no"}]'),
    ],
)
def test_files_are_read(tmp_path, name, text):
    pairs = LabelledPairs.from_file(written(tmp_path / name, text))
    assert columns_of(pairs) == (["a, b", "d"], ["c", "é"], [1.0, 0.0])
    assert pairs.source == name
    assert LabelledPairs.from_file(written(tmp_path / f"{name}.gz", gzip.compress(text.encode()))) == pairs
    assert LabelledPairs.coerce(str(tmp_path / name)) == pairs


def test_parquet_files_are_read(tmp_path):
    rows = [{"sentence1": "a, b", "sentence2": "007", "score": 5}, {"sentence1": "d", "sentence2": "é", "score": 0}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    pairs = LabelledPairs.from_file(tmp_path / "p.parquet", scale=(0, 5))
    assert columns_of(pairs) == (["a, b", "d"], ["007", "é"], [1.0, 0.0])
    with pytest.raises(DatasetError) as caught:
        LabelledPairs.coerce(tmp_path / "p.parquet")
    assert caught.value.problems == ["p.parquet, row 1: the label 5 is outside 0 to 1"]


def test_a_relative_path_is_read_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "p.csv", "text1,text2,label\na,b,1\n")
    assert len(LabelledPairs.from_file("p.csv")) == 1


def test_every_line_that_cannot_be_used_is_named(tmp_path):
    path = written(tmp_path / "p.csv", b"text1,text2,label\na,b,1\n,d,1\ne,\xff,x\n")
    with pytest.raises(DatasetError, match=r"p\.csv with 3 problem") as caught:
        LabelledPairs.from_file(path)
    assert caught.value.problems == [
        "p.csv, line 3: the first text is empty",
        "p.csv, line 4: the second text is not UTF-8",
        "p.csv, line 4: the label is not a number: 'x'",
    ]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.csv", b"text1,text2,label\na,b\n", "2 cells under 3 columns"),
        ("p.csv", b"", "without a row"),
        ("p.jsonl", b'{"text1": "a"', "line 1"),
        ("p.jsonl", b'["a"]\n', "neither a mapping"),
        ("p.csv", "text1,text2,label\n".encode("utf-16"), "UTF-16"),
        ("p.csv.gz", b"no gzip", "cannot be read"),
        ("p.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_an_incomplete_file_is_a_dataset_error(tmp_path, name, content, match):
    with pytest.raises(DatasetError, match=match):
        LabelledPairs.from_file(written(tmp_path / name, content))


@pytest.mark.parametrize("path", ["nowhere.csv", "nowhere.json", "", ".", "nul\0.csv"])
def test_a_path_without_a_file_is_a_dataset_error(path):
    for read in (LabelledPairs.from_file, LabelledPairs.from_json, LabelledPairs.coerce):
        with pytest.raises(DatasetError):
            read(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="xlsx"):
        LabelledPairs.from_file(written(tmp_path / "p.xlsx", b"PK"))


def test_hugging_face_datasets_are_read():
    dataset = datasets.Dataset.from_dict({"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [5.0, 0.0]})
    expected = LabelledPairs(["a", "c"], ["b", "d"], [1, 0])
    assert LabelledPairs.from_rows(dataset, scale=(0, 5)) == expected
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text1": "a", "text2": "b", "label": 1}]))
    assert LabelledPairs.coerce(stream).texts2 == ["b"]
    renamed = dataset.rename_column("sentence1", "mine")
    assert LabelledPairs.from_rows(renamed, columns={"text1": "mine"}, scale=(0, 5)) == expected


def test_a_dict_of_splits_is_refused_with_its_splits():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text1": ["a"], "text2": ["b"], "label": [1]}))
    for read in (LabelledPairs.from_rows, LabelledPairs.coerce):
        with pytest.raises(DatasetError, match="'train'"):
            read(splits)


def test_classes_of_entailment_are_not_degrees_of_similarity():
    dataset = datasets.Dataset.from_dict(
        {"premise": ["a", "c"], "hypothesis": ["b", "d"], "label": [0, 1]},
        features=datasets.Features(
            premise=datasets.Value("string"),
            hypothesis=datasets.Value("string"),
            label=datasets.ClassLabel(names=["entailment", "not_entailment"]),
        ),
    )
    with pytest.raises(DatasetError, match=r"row\['label'\] == 0") as caught:
        LabelledPairs.from_rows(dataset)
    fixed = eval(caught.value.hint.split(" adds")[0], {"dataset": dataset})
    assert LabelledPairs.from_rows(fixed).scores == [1.0, 0.0]
