"""Presets: values for fields that are not given, whichever way a configuration is made."""

import itertools
from dataclasses import asdict
from functools import partial

import pytest

from llama_index_lora_embed import FinetuneConfig, LabelledPairs, LoraFinetuneEngine
from llama_index_lora_embed.config import PRESETS, DataSettings, TrainingSettings
from llama_index_lora_embed.config.overrides import config_from
from llama_index_lora_embed.core import ConfigError
from tests.conftest import make_dataset


def values_of(config):
    """The fields that a preset sets, and their values in a configuration."""
    groups = (config.data, config.base, config.training)
    return {name: getattr(group, name) for name in asdict(PRESETS["fast"]) for group in groups if hasattr(group, name)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_values_and_they_are_valid(name):
    config = FinetuneConfig(preset=name)
    assert values_of(config) == asdict(PRESETS[name])
    same = FinetuneConfig.from_arguments(**values_of(config))
    assert values_of(same) == values_of(config)
    assert same.digest() == config.digest()


def test_balanced_is_the_defaults_and_the_others_differ():
    assert FinetuneConfig() == FinetuneConfig(preset="balanced")
    assert FinetuneConfig().training == TrainingSettings()
    assert FinetuneConfig().data == DataSettings()
    assert all(PRESETS[one] != PRESETS[other] for one, other in itertools.combinations(PRESETS, 2))
    fast, balanced, best = (PRESETS[name] for name in ("fast", "balanced", "best"))
    assert fast.epochs < balanced.epochs <= best.epochs
    assert fast.lora_layers <= balanced.lora_layers


def test_given_values_win_over_a_preset_even_where_they_are_the_defaults(tmp_path):
    epochs = TrainingSettings().epochs
    for config in (
        FinetuneConfig.from_arguments(preset="fast", epochs=epochs),
        FinetuneConfig(preset="fast", training=TrainingSettings(epochs=epochs)),
        config_from(None, {"preset": "fast", "training.epochs": str(epochs)}),
        LoraFinetuneEngine(make_dataset(), "base", str(tmp_path / "a"), preset="fast", epochs=epochs).config,
        LoraFinetuneEngine(make_dataset(), "base", str(tmp_path / "a"), 32, None, None, epochs, preset="fast").config,
    ):
        assert config.training.epochs == epochs
        assert config.training.lora_layers == PRESETS["fast"].lora_layers


def test_an_engine_takes_a_presets_values(tmp_path):
    config = LoraFinetuneEngine(make_dataset(), "base", str(tmp_path / "a"), preset="best").config
    assert values_of(config) == asdict(PRESETS["best"])


def test_a_preset_can_be_changed_as_long_as_values_are_not_given():
    config = FinetuneConfig.from_arguments(preset="fast", batch_size=8)
    assert values_of(config.replace(preset="best")) == {**asdict(PRESETS["best"]), "batch_size": 8}
    longer = config.replace(training=config.training.replace(epochs=7))
    assert (longer.training.epochs, longer.training.lora_layers) == (7, PRESETS["fast"].lora_layers)


def test_an_unknown_preset_is_refused_with_the_names_of_the_three(tmp_path):
    for make in (
        lambda: FinetuneConfig.from_arguments(preset="quick", epochs=0),
        lambda: LoraFinetuneEngine(make_dataset(), "base", str(tmp_path / "a"), preset="quick", epochs=0),
        lambda: config_from(None, {"preset": "quick", "training.epochs": "0"}),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        problems = "\n".join(caught.value.problems)
        assert "preset='quick': expected one of 'fast', 'balanced', 'best'" in problems
        assert "training.epochs=0" in problems


@pytest.mark.parametrize("ending", ["yaml", "toml", "json"])
def test_a_file_names_a_preset_and_wins_over_it(tmp_path, ending):
    text = {
        "yaml": "preset: best\ntraining: {epochs: 3}\nobjective: {matryoshka_dims: [8, 4]}\n",
        "toml": 'preset = "best"\n[training]\nepochs = 3\n[objective]\nmatryoshka_dims = [8, 4]\n',
        "json": '{"preset": "best", "training": {"epochs": 3}, "objective": {"matryoshka_dims": [8, 4]}}',
    }[ending]
    path = tmp_path / f"run.{ending}"
    path.write_text(text)
    config = FinetuneConfig.from_file(path)
    assert values_of(config) == {**asdict(PRESETS["best"]), "epochs": 3}
    written = tmp_path / "again.json"  # every value stands in it
    written.write_text(config.model_dump_json())
    assert values_of(FinetuneConfig.from_file(written)) == values_of(config)
    assert FinetuneConfig.from_file(written).digest() == config.digest()


def test_the_defaults_for_synthetic_queries_win_over_a_preset(tmp_path, nodes):
    gentle = TrainingSettings.for_heuristic_queries()
    made = {
        name: LoraFinetuneEngine.from_nodes(nodes, "base", str(tmp_path / "a"), preset=name).config
        for name in ("fast", "best")
    }
    for name, config in made.items():
        assert config.training.epochs == gentle.epochs
        assert config.training.adapter_scale == gentle.adapter_scale
        assert config.training.batch_size == gentle.batch_size
        assert config.training.lora_layers == gentle.lora_layers == 1
        assert config.base.window is None
        assert config.data.val_fraction == PRESETS[name].val_fraction
    given = LoraFinetuneEngine.from_nodes(nodes, "base", str(tmp_path / "a"), preset="best", epochs=3, val_fraction=0.5)
    assert (given.config.training.epochs, given.config.data.val_fraction) == (3, 0.5)


def test_a_run_with_a_preset_resumes_with_it_or_its_values_and_with_no_other(tiny_model, tmp_path):
    def engine(**kwargs):
        return LoraFinetuneEngine(
            make_dataset(), tiny_model, str(tmp_path / "a"), batch_size=16, val_fraction=0, device="cpu",
            show_progress_bar=False, save_checkpoints=True, **kwargs,
        )  # fmt: skip

    fast = {
        name: value for name, value in asdict(PRESETS["fast"]).items() if name in ("epochs", "lora_layers", "window")
    }
    first = engine(preset="fast").finetune()
    for same in ({"preset": "fast"}, fast):
        assert engine(resume_from_checkpoint=True, **same).finetune().fingerprint == first.fingerprint
    with pytest.raises(ConfigError, match="epochs"):
        engine(resume_from_checkpoint=True, preset="best").finetune()


def test_pairs_and_queries_alone_keep_their_own_defaults_but_take_presets_and_given_values(tmp_path):
    pairs = LabelledPairs(["a", "b", "c"], ["d", "e", "f"], [0.0, 1.0, 0.5])
    own = TrainingSettings.for_small_batches()
    for data, more in ((pairs, {}), (make_dataset(), {"tune": "query"})):
        engine = partial(LoraFinetuneEngine, data, "base", str(tmp_path / "a"), val_fraction=0, **more)
        for name in ("epochs", "batch_size", "lora_layers"):
            assert getattr(engine().config.training, name) == getattr(own, name)
            assert getattr(engine(preset="fast").config.training, name) == getattr(PRESETS["fast"], name)
        assert engine(epochs=TrainingSettings().epochs).config.training.epochs == TrainingSettings().epochs


def test_few_passages_are_trained_in_smaller_batches(tmp_path):
    def batch_size(passages, **given):
        data = make_dataset(passages=passages)
        return LoraFinetuneEngine(data, "base", str(tmp_path / "a"), val_fraction=0, **given).config.training.batch_size

    assert [batch_size(passages) for passages in (199, 200)] == [32, 64]
    assert batch_size(199, batch_size=64) == 64
