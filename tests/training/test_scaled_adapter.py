import numpy as np
import pytest
from peft import LoraConfig

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import DEFAULT_BASE, MiningSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.evaluation import evaluate_retrieval
from tests.conftest import make_engine
from tests.helpers.training import checkpointing_engine, stop_at, weights

TEXTS = [f"w{i} w{i + 7}" for i in range(20)]
pytestmark = pytest.mark.filterwarnings("ignore:.*texts are longer")


def vectors(path, **kwargs):
    return np.array(LoraEmbedding(path, device="cpu", **kwargs).get_text_embedding_batch(TEXTS))


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "adapter"
    make_engine(tiny_model, path, val_dataset=None, val_fraction=0).finetune()
    return path


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_scaled_run_writes_what_the_whole_adapter_gives_at_that_scale(tiny_model, tmp_path, whole, evaluated):
    data = {} if evaluated else {"val_dataset": None, "val_fraction": 0}
    result = make_engine(tiny_model, tmp_path / "half", adapter_scale=0.5, **data).finetune()
    assert not evaluated or result.best_step == result.steps, "the last step was kept"
    assert np.abs(vectors(tmp_path / "half") - vectors(whole, adapter_scale=0.5)).max() < 1e-6
    assert np.abs(vectors(tmp_path / "half") - vectors(whole)).max() > 1e-3


def test_what_is_evaluated_is_what_is_written(tiny_model, tmp_path):
    engine = make_engine(tiny_model, tmp_path / "half", adapter_scale=0.5)
    result = engine.finetune()
    again = evaluate_retrieval(engine.get_finetuned_model(), engine.val_dataset)
    assert again.metrics["ndcg@10"] == pytest.approx(result.tuned_metrics["ndcg@10"], abs=1e-6)


def test_a_scaled_run_resumes_where_it_stopped(tiny_model, tmp_path, monkeypatch):
    checkpointing_engine(tiny_model, tmp_path / "once", adapter_scale=0.5).finetune()
    stop_at(monkeypatch, 7, checkpointing_engine(tiny_model, tmp_path / "twice", adapter_scale=0.5).finetune)
    checkpointing_engine(tiny_model, tmp_path / "twice", adapter_scale=0.5, resume_from_checkpoint=True).finetune()
    once, twice = (weights(tmp_path / name) for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(bool((once[name] == twice[name]).all()) for name in once)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"lora_config": LoraConfig(target_modules=["query"], bias="lora_only")}, "bias='lora_only'"),
        ({"lora_config": LoraConfig(target_modules=["query"], use_dora=True)}, "use_dora=True"),
        ({"continue_from": "adapter"}, "continue_from"),
        ({"mining": MiningSettings(rounds=2)}, "mining rounds=2"),
    ],
)
def test_what_is_more_than_a_new_lora_cannot_be_scaled_which_is_said_before_anything_is_loaded(
    tiny_model, tmp_path, monkeypatch, whole, more, named
):
    monkeypatch.chdir(whole.parent)
    model = DEFAULT_BASE if "continue_from" in more else tiny_model
    with pytest.raises(ConfigError, match=f"adapter_scale=0.5 with .*{named}") as error:
        make_engine(model, tmp_path / "a", adapter_scale=0.5, **more)
    assert "expected 1.0" in str(error.value) or "expected 1.0" in str(error.value.problems)
