"""Training an adapter further."""

import json
import re
import shutil

import pytest
from peft import LoraConfig

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine, evaluate_retrieval
from llama_index_lora_embed.config import DEFAULT_BASE
from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError, ModelNotFoundError
from llama_index_lora_embed.data import LLMQueryGenerator
from llama_index_lora_embed.engines.starting_model import StartingModel
from tests.conftest import make_dataset, make_engine
from tests.helpers.llms import FakeLLM
from tests.helpers.training import weights

NEW = make_dataset(passages=20, seed=5, prefix="n")
VAL = make_dataset(passages=10, seed=7, prefix="v")


def engine(parent, path, data=NEW, model_id=DEFAULT_BASE, **kwargs):
    settings = {"epochs": 3, "precision": "fp32", **kwargs}
    return make_engine(model_id, path, data, continue_from=parent, **settings)


def test_an_adapter_is_trained_further_in_a_new_directory_that_names_its_parent(adapter, tmp_path):
    before = {p.name: p.read_bytes() for p in adapter.iterdir() if p.is_file()}
    result = engine(adapter, tmp_path / "child").finetune()
    parent, child = (json.loads((path / "finetune.json").read_text()) for path in (adapter, tmp_path / "child"))
    assert parent["parent"] is None
    assert child["parent"] == {"path": str(adapter), "fingerprint": parent["fingerprint"]}
    assert child["base"] == parent["base"]
    assert child["max_seq_length"] >= parent["max_seq_length"]
    assert "adapter that it continues" in result.summary
    assert {p.name: p.read_bytes() for p in adapter.iterdir() if p.is_file()} == before
    old, new = weights(adapter), weights(tmp_path / "child")
    assert old.keys() == new.keys()
    assert any(not old[name].equal(new[name]) for name in old)


def test_step_0_is_the_adapter_that_is_continued(adapter, tmp_path):
    result = engine(adapter, tmp_path / "child").finetune()
    of_parent = evaluate_retrieval(LoraEmbedding(adapter, device="cpu"), VAL).metrics
    assert result.base_metrics == pytest.approx(of_parent, abs=1e-6)
    of_child = evaluate_retrieval(LoraEmbedding(tmp_path / "child", device="cpu"), VAL).metrics
    assert result.tuned_metrics == pytest.approx(of_child, abs=1e-6)


def test_if_nothing_is_gained_the_parents_vectors_are_written(adapter, tmp_path):
    with pytest.warns(UserWarning, match="gives the vectors of the adapter that it continues"):
        result = engine(adapter, tmp_path / "child", learning_rate=1e-10, epochs=1).finetune()
    assert result.best_step == 0
    old, new = weights(adapter), weights(tmp_path / "child")
    assert all(old[name].equal(new[name]) for name in old)


def test_it_resumes_like_any_other_run(adapter, tmp_path, monkeypatch):
    from tests.helpers.training import stop_at

    calm = engine(adapter, tmp_path / "calm").finetune()
    stop_at(monkeypatch, 4, engine(adapter, tmp_path / "run").finetune)
    resumed = engine(adapter, tmp_path / "run", resume_from_checkpoint=True).finetune()
    assert resumed.fingerprint == calm.fingerprint
    assert resumed.base_metrics == calm.base_metrics


def test_it_cannot_be_trained_into_its_own_directory(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "own")
    with pytest.raises(ConfigError, match="which is model_output_path itself"):
        engine(tmp_path / "own", tmp_path / "own")


@pytest.mark.parametrize("place", ["own.previous", "own.run/kept", "link", "out"])
def test_an_adapter_that_writing_would_destroy_cannot_be_continued(adapter, tmp_path, place):
    shutil.copytree(adapter, tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    if place == "out":  # the other way round: the link is written to, and so what it leads to
        shutil.copytree(adapter, tmp_path / "real")
        (tmp_path / "out").symlink_to(tmp_path / "real")
        with pytest.raises(ConfigError, match="which is model_output_path itself"):
            engine(tmp_path / "real", tmp_path / "out")
        return
    if not (tmp_path / place).exists():
        shutil.copytree(adapter, tmp_path / place)
    with pytest.raises(ConfigError, match="expected another model_output_path"):
        engine(tmp_path / place, tmp_path / "own")


@pytest.mark.parametrize("place", ["own2", "own.running", "own.run.20260101-000000-1", "own-previous"])
def test_an_adapter_beside_the_output_can_be_continued(adapter, tmp_path, place):
    shutil.copytree(adapter, tmp_path / place)
    continued = engine(tmp_path / place, tmp_path / "own")
    assert continued.config.base.continue_from == str(tmp_path / place)


def test_a_base_cannot_be_continued(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"without adapter_config\.json: expected an adapter"):
        engine(tiny_model, tmp_path / "x")


def test_the_revision_is_that_of_the_adapter(adapter, tmp_path):
    """Two commits of an adapter in a cache of the Hub; the first is older."""
    repository = tmp_path / "hub" / "models--me--adapter"
    old, new = "a" * 40, "b" * 40
    shutil.copytree(adapter, repository / "snapshots" / old)
    newer = engine(adapter, repository / "snapshots" / new).finetune()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(new)
    parents = {}
    for revision in (None, old):
        out = tmp_path / f"of-{revision}"
        made = engine("me/adapter", out, revision=revision, cache_folder=str(tmp_path / "hub"), epochs=1)
        made.finetune()
        parents[revision] = json.loads((out / "finetune.json").read_text())["parent"]["fingerprint"]
    assert parents == {None: newer.fingerprint, old: LoraEmbedding(adapter, device="cpu").fingerprint}


def test_queries_for_nodes_are_filtered_by_the_adapter_that_is_continued(adapter, nodes, tmp_path):
    class Llm(FakeLLM):
        def answer(self, prompt):
            return "question: " + " ".join(re.findall(r"w[0-9]+", prompt)[:5])

    generator = LLMQueryGenerator(llm=Llm(), journal=str(tmp_path / "journal.jsonl"))
    made = LoraFinetuneEngine.from_nodes(
        nodes,
        model_output_path=str(tmp_path / "child"),
        continue_from=adapter,
        query_generators=[generator],
        device="cpu",
    )
    assert made.data_report.filtered.given == 12
    judge = StartingModel(made.config).embedding()
    assert judge.fingerprint == LoraEmbedding(adapter, device="cpu").fingerprint


@pytest.mark.parametrize(
    "more", [{"lora_config": LoraConfig(r=4)}, {"pooling": "cls"}, {"quantized": True}, {"continue_from": 3}]
)
def test_settings_of_the_adapter_cannot_be_chosen_again(adapter, tmp_path, more):
    with pytest.raises(ConfigError, match=next(iter(more))):
        LoraFinetuneEngine(
            NEW, model_output_path=str(tmp_path / "x"), val_dataset=VAL, **{"continue_from": adapter, **more}
        )


def test_a_parent_that_is_missing_or_damaged_or_of_another_base_is_refused(
    adapter, tmp_path, tiny_model, other_tiny_model
):
    with pytest.raises(ModelNotFoundError):
        engine(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(BaseModelMismatchError):
        engine(adapter, tmp_path / "x", model_id=other_tiny_model).finetune()
    shutil.copytree(adapter, tmp_path / "cut")
    content = (tmp_path / "cut" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(content[:-9])
    with pytest.raises(AdapterError, match="changed or cut short"):
        engine(tmp_path / "cut", tmp_path / "x").finetune()
    assert not (tmp_path / "x").exists()
    assert engine(adapter, tmp_path / "y", model_id=tiny_model).finetune().adapter_path == str(tmp_path / "y")
