import json
import random
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LabelledPairs
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, SplitError
from llama_index_lora_embed.data.text import normalise
from tests.helpers.labelled_pairs import ROWS, columns_of, written


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
