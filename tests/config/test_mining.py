import pytest

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError


def test_all_wrong_settings_are_named_at_once():
    wrong = {
        "num_negatives": 0,
        "range_min": -1,
        "absolute_margin": -0.1,
        "relative_margin": 1.0,
        "max_score": 2.0,
        "sibling_window": 1.5,
        "memory_mb": 0.0,
        "rounds": 0,
        "audit": True,
    }
    with pytest.raises(ConfigError) as caught:
        MiningSettings(**wrong)
    assert {problem.partition("=")[0] for problem in caught.value.problems} == wrong.keys()


def test_the_range_must_hold_the_negatives():
    with pytest.raises(ConfigError, match="range_min \\+ num_negatives, which is 13"):
        MiningSettings(range_min=10, range_max=12)
