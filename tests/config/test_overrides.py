"""The fields of a configuration one by one, and texts over a file."""

import pytest

from llama_index_lora_embed import FinetuneConfig
from llama_index_lora_embed.config.overrides import config_fields, config_from
from llama_index_lora_embed.core import ConfigError


def test_every_field_has_a_kind_a_description_and_a_name_that_from_arguments_takes():
    fields = {field.path: field for field in config_fields()}
    assert all(field.kind and field.description for field in fields.values())
    assert fields["training.epochs"].name == "epochs"
    assert fields["training.epochs"].default == "5"
    assert fields["training.batch_size"].kind == "integer|auto"
    assert fields["data.filters.max_copied"].name == "filters.max_copied"
    assert fields["mining.rounds"].group == "mining"
    flat = [name for name in (field.name for field in fields.values()) if "." not in name]
    assert len(flat) == len(set(flat))
    FinetuneConfig.from_arguments(epochs=2, mining=None, objective="in_batch")


def test_texts_are_read_as_what_their_fields_take(tmp_path):
    config = config_from(
        None,
        {
            "training.epochs": "3",
            "training.learning_rate": "1e-3",
            "training.batch_size": "auto",
            "base.model_id": "123",
            "base.query_prompt": "yes: ",
            "base.window": "null",
            "objective.matryoshka_dims": "[8, 16]",
            "lora_config": "{r: 4}",
            "training.fused_lora": False,
            "output.resume_from_checkpoint": "true",
        },
    )
    assert config.training.epochs == 3
    assert config.training.batch_size == "auto"
    assert config.base.model_id == "123"
    assert config.base.query_prompt == "yes: "
    assert config.objective.matryoshka_dims == (8, 16)
    assert config.lora_config == {"r": 4}
    assert not config.training.fused_lora
    assert config.output.resume_from_checkpoint is True


@pytest.mark.parametrize("objective", ["objective: soft_labels", "objective: {name: soft_labels}"])
def test_a_field_can_be_set_inside_what_the_file_names_or_leaves_out(tmp_path, objective):
    path = tmp_path / "run.yaml"
    path.write_text(f"{objective}\nmining: null\n")
    config = config_from(path, {"objective.guide": True, "mining.rounds": "2"})
    assert (config.objective.name, config.objective.guide) == ("soft_labels", True)
    assert config.mining is not None
    assert config.mining.rounds == 2
    assert config_from(path, {}) == FinetuneConfig.from_file(path)


def test_all_errors_of_file_and_texts_come_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {epochs: 0}\n")
    with pytest.raises(ConfigError) as found:
        config_from(path, {"lora_config": "{r: ", "training.device": "gpu"})
    assert [line.split("=")[0] for line in found.value.problems] == [
        "lora_config",
        "training.epochs",
        "training.device",
    ]
