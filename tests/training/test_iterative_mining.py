from dataclasses import asdict

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.adapter_directory import Manifest
from llama_index_lora_embed.training.objectives.collator import make_groups
from tests.conftest import make_dataset

QUIET = {"show_progress_bar": False, "device": "cpu", "batch_size": 8, "learning_rate": 5e-3}


def engine(model, out, dataset=None, rounds=2, **kwargs):
    mining = MiningSettings(num_negatives=1, rounds=rounds, relative_margin=None, show_progress_bar=False)
    val = make_dataset(passages=10, seed=7, prefix="v")
    return LoraFinetuneEngine(
        dataset or make_dataset(), model, str(out), val_dataset=val, mining=mining, **{"epochs": 3, **QUIET, **kwargs}
    )


def test_rounds_mine_again_with_the_tuned_model_and_count_on(tiny_model, tmp_path):
    result = engine(tiny_model, tmp_path / "a").finetune()
    assert len(result.mined) == 2
    assert [report.with_negatives for report in result.mined] == [48, 48]
    assert result.mined[0].audit != result.mined[1].audit, "the second round was mined by another model"
    assert result.steps == 2 * 3 * 3
    steps = [entry["step"] for entry in result.history]
    assert steps == sorted(set(steps))
    (kept,) = [entry for entry in result.history if entry["step"] == result.best_step]
    assert result.tuned_metrics == kept["metrics"]
    manifest = Manifest.read(tmp_path / "a")
    assert manifest.settings["mining"] == asdict(
        MiningSettings(1, rounds=2, relative_margin=None, show_progress_bar=False)
    )
    assert LoraEmbedding(tmp_path / "a").fingerprint == result.fingerprint


def test_one_round_is_the_first_of_two(tiny_model, tmp_path):
    one = engine(tiny_model, tmp_path / "one", rounds=1).finetune()
    two = engine(tiny_model, tmp_path / "two").finetune()
    assert two.base_metrics == one.base_metrics
    assert two.history[: len(one.history)] == one.history
    assert two.tuned_metrics["ndcg@10"] >= one.tuned_metrics["ndcg@10"], "what came before stays a candidate"


def test_negatives_are_mined_from_the_training_corpus_alone(tiny_model, tmp_path):
    made = engine(tiny_model, tmp_path / "a", rounds=1)
    result = made.finetune()
    assert not {one.negative_id for one in result.mined[0].audit} & set(made.val_dataset.corpus)
    assert made.dataset.hard_negatives is None, "the user's dataset is left as it was"


def test_a_run_in_rounds_resumes(tiny_model, tmp_path):
    whole = engine(tiny_model, tmp_path / "whole").finetune()
    checkpoints = {"save_checkpoints": True, "checkpoint_save_steps": 4}
    first = engine(tiny_model, tmp_path / "again", **checkpoints)
    first.finetune()
    resumed = engine(tiny_model, tmp_path / "again", resume_from_checkpoint=True, **checkpoints).finetune()
    assert resumed.tuned_metrics == whole.tuned_metrics
    assert resumed.base_metrics == whole.base_metrics
    assert resumed.fingerprint == whole.fingerprint


@pytest.mark.parametrize("mining", [5, "yes", MiningSettings(num_negatives=0)])
def test_wrong_mining_settings_are_named_at_once(tiny_model, tmp_path, mining):
    with pytest.raises(ConfigError, match=r"mining|num_negatives"):
        LoraFinetuneEngine(make_dataset(), tiny_model, str(tmp_path / "a"), mining=mining)


def test_a_graded_question_pulls_with_its_grade(tiny_model):
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.training.objectives.collator import GroupCollator
    from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss

    def loss_of(scores):
        dataset = EmbeddingQAFinetuneDataset(
            queries={"a": "w1 w2", "b": "w3 w4"},
            corpus={"x": "w1 w5 w6", "y": "w3 w7 w8"},
            relevant_docs={"a": ["x"], "b": ["y"]},
            relevance_scores=scores,
        ).check()
        model = SentenceTransformer(tiny_model, device="cpu").eval()
        batch = GroupCollator(model, dataset, make_groups(dataset, False))([{"group": 0}, {"group": 1}])
        names = sorted({key.split("_")[0] for key in batch if key != "label"}, key=lambda n: n[0] == "p")
        features = [
            {key.split("_", 1)[1]: value for key, value in batch.items() if key.startswith(f"{name}_")}
            for name in names
        ]
        return MaskedInfoNCELoss(model, 0.05)(features, batch["label"]).item()

    plain, half, one = loss_of(None), loss_of({"a": {"x": 0.5}, "b": {"y": 0.5}}), loss_of({"a": {"x": 1.0}})
    assert half == pytest.approx(plain / 2, rel=1e-5)
    assert one == pytest.approx(plain, rel=1e-6)
