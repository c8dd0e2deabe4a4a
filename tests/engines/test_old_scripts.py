"""What scripts of llama-index-finetuning's engine do: build a loss on its model, name local models, run again."""

import os
import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from llama_index_lora_embed import FinetuneConfig, LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError
from llama_index_lora_embed.engines.starting_model import StartingModel
from tests.conftest import make_engine


class NamesItsModelOtherwise(torch.nn.Module):
    """A loss whose model no trainer can exchange for the one it trains."""

    def __init__(self, model):
        super().__init__()
        self.model, self.encoder = None, model

    def forward(self, features, labels):
        queries, passages = (self.encoder(dict(part))["sentence_embedding"] for part in features)
        return torch.nn.functional.cross_entropy(queries @ passages.T / 0.05, torch.arange(len(queries)))


@pytest.fixture
def loaded(monkeypatch):
    """The models that are loaded to be trained."""
    models = []
    load = StartingModel.load

    def counted(self, *args):
        models.append(load(self, *args))
        return models[-1]

    monkeypatch.setattr(StartingModel, "load", counted)
    return models


def test_the_model_of_the_engine_is_the_one_that_is_trained(tiny_model, tmp_path, loaded):
    engine = make_engine(tiny_model, tmp_path / "run", epochs=6)
    assert not loaded, "an engine loads nothing before it must"
    base = engine.model.encode("w1 w2 w3")
    assert isinstance(engine.model, SentenceTransformer)
    assert torch.equal(torch.tensor(base), torch.tensor(SentenceTransformer(tiny_model).encode("w1 w2 w3")))
    engine.loss = NamesItsModelOtherwise(engine.model)
    assert engine.loss.encoder is engine.model
    assert engine.finetune().best_step > 0
    assert len(loaded) == 1
    tuned = engine.model.encode("w1 w2 w3")
    assert abs(tuned - base).max() > 1e-3
    served = LoraEmbedding(tmp_path / "run", device="cpu").get_text_embedding("w1 w2 w3")
    assert abs(tuned - served).max() < 1e-5
    assert engine.model is engine.model


def test_a_second_run_starts_from_the_base_again(tiny_model, tmp_path, loaded):
    engine = make_engine(tiny_model, tmp_path / "run", epochs=1)
    before = engine.model
    first = engine.finetune()
    again = engine.finetune()
    assert [model is before for model, *_ in loaded] == [True, False]
    assert again.base_metrics == first.base_metrics
    assert again.fingerprint == first.fingerprint


def test_wrong_arguments_of_finetune_do_not_cost_the_model_that_a_loss_was_built_on(tiny_model, tmp_path, loaded):
    engine = make_engine(tiny_model, tmp_path / "run", epochs=1)
    engine.loss = losses.MultipleNegativesRankingLoss(engine.model)
    with pytest.raises(ConfigError, match="learning_rat"):
        engine.finetune(learning_rat=1)
    engine.finetune()
    assert len(loaded) == 1


def test_what_is_no_loss_is_refused_when_it_is_set(tiny_model, tmp_path):
    engine = make_engine(tiny_model, tmp_path / "run", objective=ObjectiveSettings(guide=True))
    for wrong, said in ((5, "loss of type int"), (losses.CoSENTLoss, "a loss together with")):
        with pytest.raises(ConfigError, match=said):
            engine.loss = wrong
    assert engine.loss is None


def test_local_models_are_named_as_llama_index_does(tiny_model, adapter, tmp_path):
    place = f"local:{tiny_model}"
    named = LoraEmbedding(base_model=place, device="cpu")
    assert named.fingerprint == LoraEmbedding(base_model=tiny_model, device="cpu").fingerprint
    assert named.base_model == named.model_name == tiny_model
    assert LoraEmbedding(f"local:{adapter}", device="cpu").adapter_path == str(adapter)
    assert make_engine(place, tmp_path / "run").config.base.model_id == tiny_model
    assert make_engine("local:BAAI/bge-small-en", tmp_path / "run").config.base.model_id == "BAAI/bge-small-en"
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"base: {{model_id: 'local:{tiny_model}', continue_from: 'local:{adapter}'}}")
    base = FinetuneConfig.from_file(run_file).base
    assert (base.model_id, base.continue_from) == (tiny_model, str(adapter))


def test_the_output_of_the_old_engine_is_recognised_as_a_full_model(tiny_model, dataset, tmp_path):
    out = tmp_path / "exp_finetune"
    shutil.copytree(tiny_model, out)
    with pytest.raises(OutputDirectoryError, match="a full model, written by llama-index-finetuning's") as caught:
        LoraFinetuneEngine(dataset, tiny_model, str(out))
    assert f"another model_output_path. Training starts from what is there with model_id='{out}'" in str(caught.value)
    assert make_engine(out, tmp_path / "adapter").config.base.model_id == str(out)


def test_an_adapter_of_other_libraries_is_recognised_in_the_output_directory(tiny_model, adapter, dataset, tmp_path):
    out = shutil.copytree(adapter, tmp_path / "run")
    os.remove(out / "finetune.json")
    with pytest.raises(OutputDirectoryError, match=r"sentence-transformers or peft wrote.*continue_from="):
        LoraFinetuneEngine(dataset, tiny_model, str(out))
    shutil.copytree(tiny_model, tmp_path / "plain")
    os.remove(tmp_path / "plain" / "modules.json")
    with pytest.raises(OutputDirectoryError, match="a full model, written by transformers"):
        LoraFinetuneEngine(dataset, tiny_model, str(tmp_path / "plain"))
