import random
import subprocess
import sys

import pytest

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data import near_duplicates
from llama_index_lora_embed.data.near_duplicates import Sketches, near_duplicate_groups
from llama_index_lora_embed.data.text import tokens_of

WORDS = [f"word{i}" for i in range(3000)]


def passage(seed, length=120):
    return random.Random(seed).sample(WORDS, length)


def jaccard(left, right):
    sets = [{tuple(t[i : i + 3]) for i in range(len(t) - 2)} for t in (tokens_of(left), tokens_of(right))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_equal_texts_group_under_the_first_whatever_their_case_and_spaces():
    texts = {"b": "One  two\nthree.", "c": "other", "a": "one TWO three."}
    assert near_duplicate_groups(texts) == {"b": "b", "a": "b"}


def test_a_changed_word_in_a_passage_still_groups_and_ten_do_not():
    words = passage(0)
    one = [*words[:60], "changed", *words[61:]]
    ten = [f"changed{i}" if i % 12 == 0 else word for i, word in enumerate(words)]
    texts = {"original": " ".join(words), "one": " ".join(one), "ten": " ".join(ten), "other": " ".join(passage(1))}
    assert near_duplicate_groups(texts) == {"original": "original", "one": "original"}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_a_group_holds_what_the_true_similarity_says_and_nothing_else(threshold):
    rng = random.Random(5)
    texts = {}
    for number in range(60):
        words = passage(number)
        texts[f"{number}"] = " ".join(words)
        for place in range(rng.randint(1, 8)):
            words[place * 14] = "changed"
        texts[f"{number}-changed"] = " ".join(words)
    groups = near_duplicate_groups(texts, threshold)
    alike = {i for i in range(60) if jaccard(texts[f"{i}"], texts[f"{i}-changed"]) >= threshold}
    found = {int(i.removesuffix("-changed")) for i in groups if i.endswith("-changed")}
    assert found <= alike, "never a pair below the threshold"
    assert len(found) >= 0.9 * len(alike)
    assert bool(alike) == (threshold < 1)


def test_scripts_without_spaces_are_compared_by_characters():
    text = "光合作用是植物利用阳光把二氧化碳和水转化为有机物并释放氧气的过程它是地球上几乎所有生命的能量来源"
    texts = {"a": text, "b": text + "。", "c": "量子计算机利用叠加和纠缠来处理信息因此能解决经典计算机难以解决的问题"}
    assert near_duplicate_groups(texts) == {"a": "a", "b": "a"}
    thai = "การสังเคราะห์ด้วยแสงเป็นกระบวนการที่พืชใช้พลังงานแสงอาทิตย์เพื่อสร้างอาหาร"
    assert near_duplicate_groups({"a": thai, "b": f"{thai}!", "c": thai[::-1]}) == {"a": "a", "b": "a"}


def test_short_texts_are_compared_by_characters():
    assert near_duplicate_groups({"a": "C++", "b": "C#", "c": "C"}) == {}
    texts = {"a": "International shipping rates", "b": "International shipping rates.", "c": "Domestic returns"}
    assert near_duplicate_groups(texts) == {"a": "a", "b": "a"}


def test_emoji_empty_and_broken_texts_do_no_harm():
    texts = {"e1": "🎉🎉🎉", "e2": "🎉🎉🎉", "e3": "👩‍👩‍👧 🇩🇪", "n1": "", "n2": " \n", "s": "\ud800", "z": "\x00\x01"}
    assert near_duplicate_groups(texts) == {"e1": "e1", "e2": "e1", "n1": "n1", "n2": "n1"}
    assert near_duplicate_groups({}) == {}
    assert near_duplicate_groups({"only": "one"}) == {}


def test_each_text_is_hashed_once_however_often_it_is_grouped(monkeypatch):
    words = passage(0)
    texts = {str(i): " ".join([*words[:-1], f"changed{i}"]) for i in range(6)} | {"other": " ".join(passage(1))}
    parts = [texts, {i: texts[i] for i in ("5", "other", "2")}, {"new": "a text of its own", **texts}]
    expected = [near_duplicate_groups(part) for part in parts]
    hashed = []
    signature = near_duplicates._signature
    monkeypatch.setattr(near_duplicates, "_signature", lambda shingles: hashed.append(1) or signature(shingles))
    sketches = Sketches()
    assert [near_duplicate_groups(part, sketches=sketches) for part in parts] == expected
    assert len(hashed) == 8
    assert expected[1] == {"5": "5", "2": "5"}


def test_only_texts_under_the_same_key_are_compared():
    words = passage(3)
    texts = {"a": " ".join(words), "b": " ".join(words), "c": " ".join([*words[:-1], "changed"])}
    assert near_duplicate_groups(texts, within={"a": "x", "b": "y", "c": "y"}) == {"b": "b", "c": "b"}


def test_characters_tell_queries_apart_and_together():
    texts = {
        "a": "What are the side effects of ibuprofen in children?",
        "b": "What are the side effects of ibuprofen in children",
        "c": "What are the side effects of paracetamol in children?",
    }
    assert near_duplicate_groups(texts, 0.85, sketches=Sketches(characters=True)) == {"a": "a", "b": "a"}


@pytest.mark.slow
def test_groups_are_the_same_in_another_process():
    code = (
        "from llama_index_lora_embed.data.near_duplicates import _shingles;"
        "print(_shingles('one two three four five six seven eight nine ten', False).tolist())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert runs.pop().startswith("[")


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_a_threshold_that_means_nothing_is_refused(threshold):
    with pytest.raises(ConfigError, match="threshold"):
        near_duplicate_groups({"a": "text"}, threshold)
