"""The space of a sweep: names and values are checked before anything is trained."""

import pytest

from llama_index_lora_embed import FinetuneConfig
from llama_index_lora_embed.config.space import DEFAULT_SPACE, Range, checked_space
from llama_index_lora_embed.core.errors import ConfigError


def test_a_space_of_a_file_has_ranges_as_mappings():
    values = {"learning_rate": {"low": 1e-4, "high": 1e-3}, "lora_r": [8, 16]}
    assert checked_space(values, FinetuneConfig()) == {"learning_rate": Range(1e-4, 1e-3), "lora_r": (8, 16)}
    assert checked_space(DEFAULT_SPACE, FinetuneConfig()) == dict(DEFAULT_SPACE)


def test_everything_that_is_wrong_is_named_together():
    values = {
        "learning_rat": [1e-3],
        "save_checkpoints": [True],
        "epochs": [1, 0],
        "temperature": {"low": 0.1, "high": 0.05},
        "warmup_ratio": Range(0.0, 0.5),
        "lora_r": 8,
        "batch_size": {"from": 1},
    }
    with pytest.raises(ConfigError) as raised:
        checked_space(values, FinetuneConfig())
    found = {line.partition(":")[0].partition("=")[0] for line in raised.value.problems}
    assert found == {*values}
    assert "epochs=0: expected a whole number of at least 1" in raised.value.problems
    assert any("low above 0, or log=False" in line for line in raised.value.problems)
    with pytest.raises(ConfigError, match="no field at all"):
        checked_space({}, FinetuneConfig())
