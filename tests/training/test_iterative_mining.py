import pytest

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.conftest import make_dataset, make_engine


def engine(model, out, rounds=2, **kwargs):
    mining = MiningSettings(num_negatives=1, rounds=rounds, relative_margin=None, show_progress_bar=False)
    return make_engine(model, out, mining=mining, **{"epochs": 3, **kwargs})


def test_rounds_mine_again_with_the_tuned_model_and_count_on(tiny_model, tmp_path):
    result = engine(tiny_model, tmp_path / "a").finetune()
    assert len(result.mined) == 2
    assert [report.with_negatives for report in result.mined] == [48, 48]
    assert result.mined[0].audit != result.mined[1].audit, "another model mined for the second round"
    assert result.steps == 2 * 3 * 3
    steps = [entry["step"] for entry in result.history]
    assert steps == sorted(set(steps))
    (kept,) = [entry for entry in result.history if entry["step"] == result.best_step]
    assert result.tuned_metrics == kept["metrics"]
    manifest = Manifest.read(tmp_path / "a")
    settings = MiningSettings(num_negatives=1, rounds=2, relative_margin=None, show_progress_bar=False)
    assert manifest.settings["mining"] == settings.result_affecting()
    assert LoraEmbedding(tmp_path / "a").fingerprint == result.fingerprint


def test_one_round_is_the_first_of_two(tiny_model, tmp_path):
    one = engine(tiny_model, tmp_path / "one", rounds=1).finetune()
    two = engine(tiny_model, tmp_path / "two").finetune()
    assert two.base_metrics == one.base_metrics
    assert two.history[: len(one.history)] == one.history
    assert two.tuned_metrics["ndcg@10"] >= one.tuned_metrics["ndcg@10"], "the first round stays a candidate"


def test_negatives_are_mined_from_the_training_corpus_alone(tiny_model, tmp_path):
    made = engine(tiny_model, tmp_path / "a", rounds=1)
    result = made.finetune()
    assert not {one.negative_id for one in result.mined[0].audit} & set(made.val_dataset.corpus)
    assert made.dataset.hard_negatives is None, "the user's dataset is not changed"


@pytest.mark.slow
def test_a_run_in_rounds_resumes(tiny_model, tmp_path):
    whole = engine(tiny_model, tmp_path / "whole").finetune()
    checkpoints = {"save_checkpoints": True, "checkpoint_save_steps": 4}
    first = engine(tiny_model, tmp_path / "again", **checkpoints)
    first.finetune()
    resumed = engine(tiny_model, tmp_path / "again", resume_from_checkpoint=True, **checkpoints).finetune()
    assert resumed.tuned_metrics == whole.tuned_metrics
    assert resumed.base_metrics == whole.base_metrics
    assert resumed.fingerprint == whole.fingerprint


@pytest.mark.parametrize("mining", [5, "yes", {"num_negatives": 0}])
def test_wrong_mining_settings_are_named_at_once(tiny_model, tmp_path, mining):
    with pytest.raises(ConfigError, match=r"mining|num_negatives"):
        LoraFinetuneEngine(make_dataset(), tiny_model, str(tmp_path / "a"), mining=mining)
