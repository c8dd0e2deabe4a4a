"""When steps are evaluated."""

import pytest

from tests.conftest import make_engine


def evaluated_steps(model, path, **settings):
    """Of a run of twelve steps in four epochs."""
    return [entry["step"] for entry in make_engine(model, path, **settings).finetune().history]


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (4, [0, 3, 4, 6, 8, 9, 12]),
        (5, [0, 3, 6, 9, 12]),  # 5 and 10 are a step from the ends of epochs
        (0, [0, 3, 6, 9, 12]),
    ],
)
def test_steps_near_the_end_of_an_epoch_are_evaluated_there(tiny_model, tmp_path, every, steps):
    assert evaluated_steps(tiny_model, tmp_path / "a", evaluation_steps=every) == steps


def test_a_step_near_the_end_of_the_training_is_evaluated_there(tiny_model, tmp_path):
    engine = make_engine(tiny_model, tmp_path / "a", batch_size=2, evaluation_steps=5)
    assert [entry["step"] for entry in engine.finetune(max_steps=6).history] == [0, 6]
    engine = make_engine(tiny_model, tmp_path / "b", batch_size=2, evaluation_steps=5)
    assert [entry["step"] for entry in engine.finetune(max_steps=7).history] == [0, 5, 7]
