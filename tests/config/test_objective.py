import pytest

from llama_index_lora_embed.config import FOR_PAIRS, OBJECTIVES, ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_needs_no_more_than_its_name_and_distillation_a_teacher(name):
    made = ObjectiveSettings(name=name, teacher="x" if name == "distillation" else None)
    assert made.misfits(pairs=name in FOR_PAIRS, own_loss=False) == []


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
        ({"name": "distillation"}, ["teacher=None"]),
        ({"teacher": "x"}, ["teacher='x' with name=None"]),
        ({"name": "triplet", "guide": True, "mini_batch_size": 4}, ["mini_batch_size=4 with", "guide=True with"]),
        ({"name": "cosent", "matryoshka_dims": (8,)}, ["matryoshka_dims=(8,) with name='cosent'"]),
    ],
)
def test_settings_that_cannot_be_used_are_all_named(wrong, named):
    with pytest.raises(ConfigError) as caught:
        ObjectiveSettings(**wrong)
    problems = "; ".join(caught.value.problems)
    assert all(start in problems for start in named)
