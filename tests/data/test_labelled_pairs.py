import gzip
import json
import random
import subprocess
import sys
import warnings

import datasets
import numpy as np
import pandas as pd
import pytest
from sentence_transformers.sentence_transformer.readers import InputExample

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LabelledPairs
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, SplitError
from llama_index_lora_embed.data.text import normalise

ROWS = [("a cat", "a kitten", 1), ("a cat sleeps", "rain falls", 0), ("a dog", "a hound", 1)]


def columns_of(pairs):
    return pairs.texts1, pairs.texts2, pairs.scores


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def many(count=200, seed=0, graded=False, texts=None):
    """Pairs with texts of their own, or with first texts that are drawn from a number of them."""
    rng = random.Random(seed)
    return LabelledPairs(
        [f"first {i if texts is None else rng.randrange(texts)}" for i in range(count)],
        [f"second {i}" for i in range(count)],
        [rng.random() if graded else float(rng.random() < 0.3) for _ in range(count)],
    )


def known_texts(pairs):
    return {normalise(text) for text in (*pairs.texts1, *pairs.texts2)}


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


def test_check_names_every_problem():
    pairs = LabelledPairs(["a", " ", None, "d"], ["w", "x", "y", "z"], [0.5, float("nan"), 3, "no idea"])
    with pytest.raises(DatasetError, match="val_dataset") as caught:
        pairs.check("val_dataset")
    assert caught.value.problems == [
        "pair 1: the first text is empty",
        "pair 2: the first text is not text: None",
        "pair 1: the label is not a number: nan",
        "pair 2: the label 3 is outside 0 to 1",
        "pair 3: the label is not a number: 'no idea'",
    ]


def test_lengths_that_differ_are_named():
    assert LabelledPairs(["a"], ["b", "c"], [1, 0, 0]).problems() == ["lengths differ: 1 texts1, 2 texts2, 3 scores"]


@pytest.mark.parametrize("scores", [[1, 1], [0, 0], [0.4, 0.4]])
def test_pairs_with_one_label_only_are_refused(scores):
    with pytest.raises(DatasetError, match="every label is"):
        LabelledPairs(["a", "b"], ["c", "d"], scores).check()


def test_no_pairs_and_a_single_pair_are_refused():
    with pytest.raises(DatasetError, match="without a single pair"):
        LabelledPairs([], [], []).check()
    with pytest.raises(DatasetError, match="every label is 1"):
        LabelledPairs(["a"], ["b"], [1]).check()


def test_labels_of_one_pair_that_contradict_each_other_are_named():
    pairs = LabelledPairs(["a", "c", "b ", "a"], ["b", "d", " a", "b"], [1, 0, 0, 1])
    assert pairs.problems() == ["pairs 0 (1), 2 (0), 3 (1) are the same, but their labels contradict each other: 'a'"]
    # a query and a passage are no pair the other way round, and people who grade differ
    assert LabelledPairs(["a", "b"], ["b", "a"], [1, 0], symmetric=False).problems() == []
    assert LabelledPairs(["a", "a"], ["b", "b"], [0.4, 0.8]).problems() == []
    assert LabelledPairs(["Polish", "polish"], ["x", "x"], [0, 1]).problems() == []


@pytest.mark.parametrize(
    "fields",
    [("abc", ["b"], [1]), (["a"], {"b": 1}, [1]), (["a"], ["b"], 1), (None, [], []), (["a"], ["b"], [1], None, None)],
)
def test_fields_that_are_not_lists_are_refused(fields):
    with pytest.raises(DatasetError):
        LabelledPairs(*fields)


def test_arrays_are_fields():
    pairs = LabelledPairs(np.array(["a", "b"]), pd.Series(["c", "d"]), np.array([0, 1]))
    assert pairs.check() == LabelledPairs(["a", "b"], ["c", "d"], [0.0, 1.0])


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


def test_coerce_takes_what_users_have(tmp_path):
    pairs = LabelledPairs.from_rows(ROWS)
    pairs.save_json(tmp_path / "p.json")
    fields = {"texts1": pairs.texts1, "texts2": pairs.texts2, "scores": pairs.scores}
    for given in (pairs, ROWS, tuple(ROWS), iter(ROWS), fields, tmp_path / "p.json", str(tmp_path / "p.json")):
        assert LabelledPairs.coerce(given) == pairs
    assert LabelledPairs.coerce(pairs) is pairs


@pytest.mark.parametrize(
    "value", [None, 5, b"a", {"a": 1}, EmbeddingQAFinetuneDataset(queries={}, corpus={}, relevant_docs={})]
)
def test_coerce_names_the_type_of_other_values(value):
    with pytest.raises(DatasetError, match=rf"val_dataset of type {type(value).__name__}"):
        LabelledPairs.coerce(value, "val_dataset")


def test_a_file_survives_writing_and_reading(tmp_path):
    pairs = LabelledPairs(["één 🌍", "b"], ["c", "d"], [0.3, 1], "hand", symmetric=False)
    pairs.save_json(tmp_path / "new" / "p.json")
    again = LabelledPairs.from_json(tmp_path / "new" / "p.json")
    assert (again, again.source, again.digest()) == (pairs, "hand", pairs.digest())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.json"]
    with pytest.raises(DatasetError, match="from_json"):
        LabelledPairs.from_file(tmp_path / "new" / "p.json")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    LabelledPairs.from_rows(ROWS).save_json(path)
    before = path.read_bytes()
    with pytest.raises(DatasetError, match="not a number"):
        LabelledPairs(["a"], ["b"], [float("nan")]).save_json(path)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        LabelledPairs.from_rows(ROWS[:2]).save_json(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"texts1": 1}', "not json", "{" * 5000, "\xff"])
def test_a_file_with_other_content_is_a_dataset_error(tmp_path, content):
    with pytest.raises(DatasetError):
        LabelledPairs.from_json(written(tmp_path / "p.json", content.encode("latin-1")))


def test_a_file_of_the_right_keys_with_wrong_values_is_a_dataset_error(tmp_path):
    path = written(tmp_path / "p.json", json.dumps({"texts1": "abc", "texts2": [], "scores": [], "later": 1}))
    with pytest.raises(DatasetError, match="texts1='abc'"):
        LabelledPairs.from_json(path)


def test_the_digest_sees_content_and_not_the_source():
    pairs = LabelledPairs.from_rows(ROWS)
    assert pairs.digest() == LabelledPairs.from_rows(ROWS, source="elsewhere").digest()
    others = [ROWS[::-1], [(a, b, 1 - label) for a, b, label in ROWS], [(b, a, label) for a, b, label in ROWS]]
    digests = {pairs.digest(), LabelledPairs.from_rows(ROWS, symmetric=False).digest()}
    digests |= {LabelledPairs.from_rows(rows).digest() for rows in others}
    assert len(digests) == 5


def test_overlap_is_found_in_either_order_whatever_case_and_spaces():
    train = LabelledPairs(["A  cat", "new", "a cat"], ["a kitten", "a dog", "a dog"], [1, 0, 0])
    val = LabelledPairs(["a kitten", "a dog"], ["a cat", "a kitten"], [1, 0])
    assert train.overlap(val) == [0]
    assert LabelledPairs([], [], []).overlap(val) == []


def test_subset_keeps_order_source_and_roles():
    part = LabelledPairs.from_rows(ROWS, source="hand", symmetric=False).subset(iter([2, 0]))
    assert columns_of(part) == (["a dog", "a cat"], ["a hound", "a kitten"], [1.0, 1.0])
    assert (part.source, part.symmetric) == ("hand", False)


def test_texts_that_are_shared_are_found_on_either_side_whatever_case_and_spaces():
    train = LabelledPairs(["a cat", "a dog"], ["a kitten", "a hound"], [1, 1])
    val = LabelledPairs(["a car", "A  HOUND", "a bus"], ["a  CAT", "a lorry", "a train"], [0, 0, 1])
    assert val.shared_texts(train) == [0, 1]
    assert val.shared_texts(LabelledPairs([], [], [])) == []


@pytest.mark.parametrize("seed", range(5))
def test_random_negatives_do_not_tie_pairs_together(seed, caplog):
    rng = random.Random(seed)
    rows = []
    for i in range(100):
        other = rng.choice([j for j in range(100) if j != i])
        rows += [(f"question {i}", f"passage {i}", 1), (f" QUESTION  {i}", f"Passage {other}", 0)]
    pairs = LabelledPairs.from_rows(rows)
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("error")
        train, val = pairs.split(0.1, seed)
    assert (len(train), len(val), val.positives) == (180, 20, 10)
    own = [{normalise(text) for text in side.texts1} for side in (train, val)]
    own += [{normalise(b) for b, s in zip(side.texts2, side.scores, strict=True) if s} for side in (train, val)]
    assert not own[0] & own[1]
    assert not own[2] & own[3]
    assert f"{len(val.shared_texts(train))} of 20 held-out pairs" in caplog.text


def test_a_pair_that_occurs_in_both_orders_is_on_one_side():
    rows = [row for i in range(40) for row in ((f"a{i}", f"b{i}", 0), (f"B{i}", f"a{i} ", 0), (f"c{i}", f"d{i}", 1))]
    for seed in range(5):
        train, val = LabelledPairs.from_rows(rows).split(0.3, seed)
        assert not val.overlap(train)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("graded", [False, True])
def test_no_text_is_on_both_sides_of_a_split(seed, graded):
    pairs = many(300, seed, graded, texts=120)
    positive = max(range(300), key=pairs.scores.__getitem__)
    pairs.texts2[positive] = pairs.texts1[0].upper()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, val = pairs.split(0.2, seed)
    assert not known_texts(train) & known_texts(val)
    assert len(train) + len(val) == 300
    assert 0.15 <= len(val) / 300 <= 0.25
    train.check()
    val.check()


def test_a_split_keeps_the_proportions_of_the_labels():
    train, val = many(1000).split(0.1)
    assert val.positives == pytest.approx(0.1 * (train.positives + val.positives), abs=1)
    assert len(val) == pytest.approx(100, abs=2)
    train, val = many(1000, graded=True).split(0.1)
    assert np.mean(val.scores) == pytest.approx(np.mean(train.scores), abs=0.05)
    assert np.histogram(val.scores, 5, (0, 1))[0].min() >= 10


def test_a_split_is_seeded_and_keeps_the_order():
    pairs = many()
    assert pairs.split(0.1, 1) == pairs.split(0.1, 1)
    assert pairs.split(0.1, 1) != pairs.split(0.1, 2)
    numbers = [int(text.split()[1]) for text in pairs.split(0.1, 1)[0].texts1]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("count", [10, 12, 20])
def test_few_pairs_leave_two_labels_on_either_side(count, graded):
    pairs = many(count, 3, graded)
    for seed in range(10):
        train, val = pairs.split(0.1, seed)
        assert min(len(set(train.scores)), len(set(val.scores))) >= 2


def test_pairs_that_share_one_text_cannot_be_split():
    pairs = LabelledPairs(["the query"] * 20, [f"p{i}" for i in range(20)], [i % 2 for i in range(20)])
    with pytest.raises(SplitError, match=r"'the query' ties 20 of them") as caught:
        pairs.split()
    assert "validation pairs of your own" in caught.value.hint


def test_a_label_that_would_be_on_one_side_only_cannot_be_split():
    pairs = LabelledPairs([f"a{i}" for i in range(20)], [f"b{i}" for i in range(20)], [1] + [0] * 19)
    with pytest.raises(SplitError, match="every label twice"):
        pairs.split(0.3)


def test_groups_too_large_for_the_share_are_held_out_with_a_warning():
    pairs = LabelledPairs(
        [f"q{i // 10}" for i in range(20)], [f"p{i}" for i in range(20)], [i % 2 for i in range(20)], symmetric=False
    )
    with pytest.warns(UserWarning, match="10 of 20 pairs are held out"):
        train, val = pairs.split(0.1)
    assert (len(train), len(val)) == (10, 10)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, True, None, "0.1", float("nan")])
def test_an_invalid_fraction_is_refused(fraction):
    with pytest.raises(ConfigError, match="fraction="):
        many().split(fraction)


def test_using_pairs_imports_no_torch():
    code = (
        "import sys; from llama_index_lora_embed import LabelledPairs; "
        "LabelledPairs.coerce([(str(i), 'x' + str(i), i % 2) for i in range(20)]).check().split(); "
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'datasets', 'scipy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
