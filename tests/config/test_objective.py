import pytest

from llama_index_lora_embed.config import DISTILLED, FOR_PAIRS, OBJECTIVES, ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_needs_no_more_than_its_name(name):
    assert ObjectiveSettings(name=name).misfits(pairs=name in FOR_PAIRS, own_loss=False) == []


@pytest.mark.parametrize("name", [None, *OBJECTIVES])
def test_what_needs_a_teacher_is_named(name):
    named = ObjectiveSettings(name=name).without_teacher()
    assert len(named) == (name in DISTILLED)


def test_settings_for_a_teacher_are_not_ignored_where_there_is_none():
    named = ObjectiveSettings(contrastive_weight=0.0, teacher_temperature=1.0).without_teacher()
    assert [line.split("=")[0] for line in named] == ["contrastive_weight", "teacher_temperature"]


def test_listwise_distillation_has_a_little_contrastive_loss_and_margins_have_none():
    assert ObjectiveSettings(name="distillation").weight_of_in_batch() == 0.1
    assert ObjectiveSettings(name="margin_mse").weight_of_in_batch() == 0
    assert ObjectiveSettings(name="margin_mse", contrastive_weight=0.3).weight_of_in_batch() == 0.3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"name": "mnrl"}, ["name='mnrl'"]),
        ({"mini_batch_size": 0, "triplet_margin": -1.0}, ["mini_batch_size=0", "triplet_margin=-1.0"]),
        ({"matryoshka_dims": (16, 16)}, ["matryoshka_dims=(16, 16)"]),
        ({"matryoshka_dims": ()}, ["matryoshka_dims=()"]),
        ({"matryoshka_dims": 16}, ["matryoshka_dims=16"]),
        ({"sibling_window": -1, "mask_near_duplicates": 1}, ["sibling_window=-1", "mask_near_duplicates=1"]),
        ({"guide": True, "guide_margin": float("nan")}, ["guide_margin=nan"]),
        ({"guide_margin": 0.1}, ["guide_margin=0.1 with guide=False"]),
        ({"name": "in_batch", "contrastive_weight": 0.2}, ["contrastive_weight=0.2 with name='in_batch'"]),
        ({"name": "triplet", "teacher_temperature": 1.0}, ["teacher_temperature=1.0 with name='triplet'"]),
        (
            {"name": "distillation", "contrastive_weight": -1.0, "teacher_temperature": 0.0},
            ["contrastive_weight=-1.0", "teacher_temperature=0.0"],
        ),
        (
            {"name": "margin_mse", "guide": True, "teacher_temperature": 1.0},
            ["guide=True with name='margin_mse'", "teacher_temperature=1.0 with name='margin_mse'"],
        ),
        ({"name": "triplet", "guide": True, "mini_batch_size": 4}, ["mini_batch_size=4 with", "guide=True with"]),
        ({"name": "cosent", "matryoshka_dims": (8,)}, ["matryoshka_dims=(8,) with name='cosent'"]),
    ],
)
def test_settings_that_cannot_be_used_are_all_named(wrong, named):
    with pytest.raises(ConfigError) as caught:
        ObjectiveSettings(**wrong)
    problems = "; ".join(caught.value.problems)
    assert all(start in problems for start in named)
