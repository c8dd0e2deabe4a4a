"""One configuration: every default once, all errors at once, the same from arguments, YAML, TOML and JSON."""

import inspect
import json

import pytest

from llama_index_lora_embed import FinetuneConfig, LoraFinetuneEngine
from llama_index_lora_embed.config import (
    DataSettings,
    LLMSettings,
    MiningSettings,
    ObjectiveSettings,
    QueryFilterSettings,
    Settings,
    TrainingSettings,
)
from llama_index_lora_embed.core.errors import ConfigError

YAML = """
data: {dataset: train.json, val_fraction: 0.2, query_generators: [{kind: title}, {kind: llm, options: {n: 3}}]}
base: {model_id: an/id, window: 256}
lora_config: {r: 8, target_modules: [query, value]}
objective: {name: soft_labels, matryoshka_dims: [128, 64]}
mining: {num_negatives: 2}
training: {epochs: 3, learning_rate: 1e-3, batch_size: auto}
output: {model_output_path: runs/a, allow_changes: [epochs]}
"""
TOML = """
lora_config = {r = 8, target_modules = ["query", "value"]}
mining = {num_negatives = 2}
objective = {name = "soft_labels", matryoshka_dims = [128, 64]}
[data]
dataset = "train.json"
val_fraction = 0.2
query_generators = [{kind = "title"}, {kind = "llm", options = {n = 3}}]
[base]
model_id = "an/id"
window = 256
[training]
epochs = 3
learning_rate = 1e-3
batch_size = "auto"
[output]
model_output_path = "runs/a"
allow_changes = ["epochs"]
"""


def written(path, text):
    path.write_text(text)
    return path


def test_a_configuration_is_the_same_from_yaml_toml_json_and_arguments(tmp_path):
    config = FinetuneConfig.from_file(written(tmp_path / "run.yaml", YAML))
    assert config == FinetuneConfig.from_file(written(tmp_path / "run.toml", TOML))
    assert config == FinetuneConfig.from_file(written(tmp_path / "run.json", config.model_dump_json()))
    arguments = {
        "dataset": "train.json", "val_fraction": 0.2, "model_id": "an/id", "window": 256, "epochs": 3,
        "learning_rate": 1e-3, "batch_size": "auto", "model_output_path": "runs/a", "allow_changes": ["epochs"],
        "lora_config": {"r": 8, "target_modules": ["query", "value"]}, "mining": MiningSettings(num_negatives=2),
        "objective": ObjectiveSettings(name="soft_labels", matryoshka_dims=(128, 64)),
        "query_generators": config.data.query_generators,
    }  # fmt: skip
    assert config == FinetuneConfig.from_arguments(**arguments)
    assert (config.training.learning_rate, config.training.batch_size) == (1e-3, "auto")


def test_all_errors_of_a_file_come_at_once_with_their_paths(tmp_path):
    text = """
training: {epochs: 3.5, learning_rate: fast, lerning_rate: 1, seed: -1, device: gpu}
objective: {name: distillation, guide: true}
mining: {num_negatives: 0}
data: {query_generators: [{kind: titel}]}
base: {pooling: CLS}
output: 5
outputs: {}
"""
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig.from_file(written(tmp_path / "run.yml", text))
    assert sorted(caught.value.problems) == [
        "base.pooling='CLS': expected one of 'cls', 'lasttoken', 'max', 'mean', 'mean_sqrt_len_tokens', 'weightedmean' "
        "or None",
        "data.query_generators[0].kind='titel': expected one of 'title', 'lead', 'definition', "
        "'inverse_cloze', 'neighbour', 'metadata', 'query_log', 'llm'",
        "mining.num_negatives=0: expected a whole number of at least 1",
        "objective: guide=True with name='distillation': only for 'in_batch', 'soft_labels'",
        "output=5: expected OutputSettings or a mapping of its fields",
        "outputs: unknown; did you mean 'output'?",
        "training.device='gpu': expected text such as 'cpu', 'cuda', 'cuda:1', 'mps' or None",
        "training.epochs=3.5: expected a whole number of at least 1",
        "training.learning_rate='fast': expected a number above 0",
        "training.lerning_rate: unknown; did you mean 'learning_rate'?",
        "training.seed=-1: expected a whole number of at least 0 and below 4294967296",
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.yaml", "training: [", "cannot be read"),
        ("run.toml", "training = ", "cannot be read"),
        ("run.yaml", "- 1", "a list at the top"),
        ("run.ini", "", r"ends in \.yaml, \.yml, \.toml, \.json"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, name, text, said):
    with pytest.raises(ConfigError, match=said):
        FinetuneConfig.from_file(written(tmp_path / name, text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        FinetuneConfig.from_file(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("settings", "wrong", "said"),
    [
        (TrainingSettings, {"batch_size": True}, "batch_size=True: expected a whole number of at least 1 or 'auto'"),
        (TrainingSettings, {"epochs": "2"}, "epochs='2'"),
        (TrainingSettings, {"learning_rate": float("nan")}, "learning_rate=nan"),
        (TrainingSettings, {"warmup_ratio": 1}, "warmup_ratio=1"),
        (TrainingSettings, {"best_metric": " "}, "best_metric=' '"),
        (DataSettings, {"on_overlap": "ignore"}, "one of 'drop', 'raise'"),
        (LLMSettings, {"timeout": 0}, "timeout=0: expected a number above 0 or None"),
        (QueryFilterSettings, {"copy_min_words": 3}, "copy_min_words=3"),
        (MiningSettings, {"range_min": 10, "range_max": 12}, "range_max=12: expected at least range_min"),
        (ObjectiveSettings, {"matryoshka_dims": [8, 8]}, "matryoshka_dims"),
        (ObjectiveSettings, {"name": "triplet", "guide": True}, "only for 'in_batch', 'soft_labels'"),
        (ObjectiveSettings, {"guide_margin": 0.1}, "set guide=True"),
        (ObjectiveSettings, {"name": "triplet", "contrastive_weight": 0.1}, "only for 'distillation', 'margin_mse'"),
    ],
)
def test_settings_refuse_what_cannot_be_used(settings, wrong, said):
    with pytest.raises(ConfigError, match=said) as caught:
        settings(**wrong)
    assert len(caught.value.problems) == 1


def test_settings_are_frozen_and_replaced_with_their_checks():
    settings = TrainingSettings(epochs=3)
    with pytest.raises(ValueError, match="frozen"):
        settings.epochs = 4
    assert settings.replace(seed=1) == TrainingSettings(epochs=3, seed=1)
    with pytest.raises(ConfigError, match="seed=-1"):
        settings.replace(seed=-1)


def test_every_field_of_the_schema_has_a_description():
    schema = FinetuneConfig.model_json_schema()
    models = {"FinetuneConfig": schema, **schema["$defs"]}
    assert {"TrainingSettings", "MiningSettings", "ObjectiveSettings", "QueryFilterSettings"} <= models.keys()
    for name, model in models.items():
        for field, described in model["properties"].items():
            assert described.get("description"), f"{name}.{field}"
    json.dumps(schema)


def test_the_digest_changes_with_what_decides_the_result_and_with_nothing_else():
    plain = FinetuneConfig()
    same = FinetuneConfig.from_arguments(
        model_output_path="elsewhere", device="cpu", save_checkpoints=True, show_progress_bar=False, objective=None
    )
    assert plain.digest() == same.digest()
    others = [
        {"epochs": 3}, {"pooling": "cls"}, {"val_fraction": 0.2}, {"objective": "triplet"},
        {"mining": MiningSettings()}, {"lora_config": {"r": 4}}, {"use_all_docs": True},
    ]  # fmt: skip
    digests = {FinetuneConfig.from_arguments(**other).digest() for other in others}
    assert len(digests | {plain.digest()}) == len(others) + 1


def test_every_keyword_of_the_engine_is_a_field_with_the_same_default():
    config, objects = FinetuneConfig(), {"self", "dataset", "val_dataset", "loss", "lora_config"}
    objects |= {"objective", "mining", "teacher"}
    leaves = {
        name: getattr(group, name)
        for group in (config.data, config.base, config.training, config.output)
        for name in type(group).model_fields
    }
    leaves["preset"] = config.preset
    parameters = inspect.signature(LoraFinetuneEngine.__init__).parameters
    assert len(parameters) - 1 >= 16 + 20
    for name, parameter in parameters.items():
        if name not in objects:
            assert leaves[name] == parameter.default, name


def test_no_field_stands_in_two_groups():
    groups = (FinetuneConfig().data, FinetuneConfig().base, FinetuneConfig().training, FinetuneConfig().output)
    names = [name for group in groups for name in type(group).model_fields]
    assert len(names) == len(set(names))
    assert all(isinstance(group, Settings) for group in groups)
