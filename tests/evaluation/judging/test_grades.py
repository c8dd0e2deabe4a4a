import math

import numpy as np
import pytest

from llama_index_lora_embed.evaluation.judging.grades import agreement, parse_grade


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("2", 2),
        (" **3** ", 3),
        ("Grade: 0", 0),
        ("2.0", 2),
        ("2/3", 2),
        ("1 out of 3", 1),
        ("The relevance grade is **1**.", 1),
        ("It answers 2 of 5 questions.\n##final score: 3", 3),
        ("Grade: 1? No, the rest of it answers the query. Grade: 2", 2),
        ("<think>It could be 3, or 0.</think>\n1", 1),
        ("评分：2", 2),
        ("２", 2),
        ("3 - it is all there", 3),
        ("The passage is about the query and gives the whole answer.", 3),  # SmolLM2-135M
    ],
)
def test_a_grade_is_found_in_an_answer(answer, grade):
    assert parse_grade(answer) == grade


@pytest.mark.parametrize(
    "answer",
    [
        *("", "I'm sorry, but I can't help with that.", "relevant", "@@## %%", "4", "-1", "2.5", "Grade: 7", "10"),
        *("1 or 2", "Grade: 1-2", "2/5", "Grade: 4/5", "On a scale of 0 to 3, a 2", "error 503", "nan", "p2"),
        "The passage is on the subject of the query, but does not answer it. "
        "Or, the passage has nothing to do with the query",
    ],
)
def test_refusals_noise_and_grades_outside_the_scale_are_none(answer):
    assert parse_grade(answer) is None


def test_weighted_kappa_is_that_of_its_definition():
    rng = np.random.default_rng(3)
    ours = rng.integers(0, 4, 60)
    theirs = np.clip(ours + rng.integers(-1, 2, 60), 0, 3)
    given, ours, theirs = ours.tolist(), np.where(ours < 2, 0, ours), np.where(theirs < 2, 0, theirs)
    table = np.zeros((4, 4))
    np.add.at(table, (ours, theirs), 1 / 60)
    distance = np.subtract.outer(np.arange(4), np.arange(4)) ** 2
    chance = np.outer(table.sum(axis=1), table.sum(axis=0))
    found = agreement(given, (theirs / 3).tolist(), threshold=2, graded=True)
    assert found.kappa == pytest.approx(1 - (distance * table).sum() / (distance * chance).sum())
    assert found.same == pytest.approx(np.mean((ours >= 2) == (theirs > 0)))
    assert found.pairs == 60


def test_binary_labels_are_compared_with_grades_from_the_threshold_on():
    found = agreement([3, 2, 1, 0], [1, 1, 0, None], threshold=2, graded=False)
    assert (found.same, found.kappa, found.assumed) == (1, 1, 1)
    assert "1 passages without a human label count as not relevant" in str(found)
    assert agreement([3, 2, 1, 0], [1, 1, 0, 0], threshold=3, graded=False).same == 0.75
    assert agreement([3, 3, 0, 0], [0, 0, 1, 1], threshold=2, graded=False).kappa == pytest.approx(-1)


def test_kappa_is_undefined_where_all_labels_are_the_same():
    found = agreement([3, 3], [1, 1], threshold=2, graded=False)
    assert math.isnan(found.kappa)
    assert found.same == 1
    assert "undefined" in str(found)
    assert agreement([], [], threshold=2, graded=False) is None
