"""The hidden-state cache of frozen layers must not change what is learnt."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.models import base_model
from llama_index_lora_embed.models.kernels.lora import fused_lora
from llama_index_lora_embed.training.efficiency import frozen_layers
from llama_index_lora_embed.training.efficiency.frozen_layers import TEXT_IDS, HiddenStateCache, HiddenStateStore
from llama_index_lora_embed.training.lora import upper_modules
from tests.architectures import ARCHITECTURES, llama
from tests.helpers.gradients import assert_same, chunks, gradients, prepared
from tests.helpers.training import checkpointing_engine as engine
from tests.helpers.training import stop_at, weights


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("form", ["plain", "gradcache", "guide"])
def test_the_hidden_state_cache_changes_no_gradient(name, form, tmp_path):
    objective = {
        "plain": None, "gradcache": ObjectiveSettings(mini_batch_size=5), "guide": ObjectiveSettings(guide=True),
    }[form]  # fmt: skip
    path = ARCHITECTURES[name].make(tmp_path / name)
    names = upper_modules(base_model.load_base(base_model.describe_base(str(path))), 0.5)
    assert len(names) == len(ARCHITECTURES[name].targets)
    model, loss, batch = prepared(path, LoraConfig(r=4, target_modules=names), objective)
    plain = gradients(model, loss, batch)
    cache = HiddenStateCache.of(model, 1 << 20)
    assert cache.first == 1
    assert cache.agrees(model, chunks(batch)[0], 1e-5)
    loss.hidden_state_cache = cache
    for _ in range(2):  # computed, then read from the cache
        assert_same(gradients(model, loss, batch), plain)
    lower = [p for n, p in model.named_parameters() if p.requires_grad and ".0." in n]
    assert not lower


def test_hidden_states_beyond_the_memory_limit_go_to_disk(tiny_model):
    store = HiddenStateStore(1000)
    states = {number: torch.randn(5 + number, 8).to(torch.bfloat16) for number in range(40)}
    for number, of_text in states.items():
        store.put(number, of_text)
    assert sum(t.numel() * 2 for t in store.in_memory.values()) <= 1000
    assert store.file is not None
    assert all(store.get(number).equal(of_text) for number, of_text in states.items())
    store.close()
    assert store.get(3) is None


def refuse(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["full", "nearly full", "short write"])
def test_a_full_disk_costs_time_and_not_the_run(tiny_model, tmp_path, monkeypatch, trouble):
    names = upper_modules(base_model.load_base(base_model.describe_base(tiny_model)), 0.5)
    model, loss, batch = prepared(tiny_model, LoraConfig(r=4, target_modules=names))
    plain = gradients(model, loss, batch)
    loss.hidden_state_cache = HiddenStateCache.of(model, 1000, tmp_path)
    if trouble == "full":
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **kwargs: refuse())
    elif trouble == "nearly full":
        monkeypatch.setattr(frozen_layers, "_MIN_FREE_BYTES", 1 << 60)
    else:
        loss.hidden_state_cache.store.file = type(
            "Short", (), {"seek": lambda *a: 0, "write": lambda *a: 1, "close": refuse}
        )()
    with pytest.warns(UserWarning, match="hidden-state cache is full"):
        first = gradients(model, loss, batch)
    assert_same(first, plain)
    assert_same(gradients(model, loss, batch), plain)
    assert not loss.hidden_state_cache.store.on_disk
    if trouble != "short write":
        loss.hidden_state_cache.store.close()
        assert not list(tmp_path.iterdir())


def test_hidden_states_that_would_not_be_read_again_are_not_stored(tiny_model, tmp_path, monkeypatch):
    stored = []
    put = HiddenStateStore.put
    monkeypatch.setattr(HiddenStateStore, "put", lambda self, *args: (stored.append(args[0]), put(self, *args)))
    arguments = {"lora_layers": 0.5, "precision": "fp32"}
    engine(tiny_model, tmp_path / "checkpointed", **arguments).finetune(gradient_checkpointing=True)
    engine(tiny_model, tmp_path / "one", **arguments).finetune(max_steps=1)
    assert not stored
    engine(tiny_model, tmp_path / "all", **arguments).finetune()
    assert stored


def test_a_model_whose_frozen_layers_cannot_be_cached_warns(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(HiddenStateCache, "agrees", lambda *args: False)
    with pytest.warns(UserWarning, match="cannot be computed apart"):
        engine(tiny_model, tmp_path / "run", lora_layers=0.5).finetune()


def test_forward_functions_that_others_have_set_are_restored(tiny_model):
    names = upper_modules(base_model.load_base(base_model.describe_base(tiny_model)), 0.5)
    model, loss, batch = prepared(tiny_model, LoraConfig(r=4, target_modules=names))
    loss.hidden_state_cache = HiddenStateCache.of(model, 1 << 20)
    layer, lora = loss.hidden_state_cache.layers[0], next(m for m in model.modules() if isinstance(m, LoraLinear))
    theirs = [layer.forward, lora.forward]
    layer.forward, lora.forward = theirs
    with fused_lora(model) as changed:
        gradients(model, loss, batch)
    assert [layer.__dict__["forward"], lora.__dict__["forward"]] == theirs
    assert changed == len([m for m in model.modules() if isinstance(m, LoraLinear)]) - 1


def test_there_is_no_cache_if_the_first_layer_is_trained(tiny_model):
    model, _, batch = prepared(tiny_model)
    assert HiddenStateCache.of(model, 1 << 20) is None
    assert all(TEXT_IDS in chunk for chunk in chunks(batch))


def test_a_model_whose_layers_cannot_run_apart_is_found_out(tmp_path):
    path = llama(tmp_path / "llama")
    model, _, batch = prepared(path, LoraConfig(r=4, target_modules=["layers.1.mlp.up_proj"]))
    cache = HiddenStateCache.of(model, 1 << 20)
    cache.layers[1].register_forward_hook(lambda *args: (_ for _ in ()).throw(ValueError("odd")))
    assert not cache.agrees(model, chunks(batch)[0], 1e-3)


@pytest.mark.parametrize("switch", [{"fused_lora": False}, {"frozen_cache_mb": 0}, {"frozen_cache_mb": 0.001}])
def test_a_whole_run_learns_the_same_with_each_switch(tiny_model, tmp_path, switch):
    kwargs = {"precision": "fp32", "lora_layers": 0.5, "learning_rate": 1e-3}
    fast = engine(tiny_model, tmp_path / "fast", **kwargs).finetune()
    slow = engine(tiny_model, tmp_path / "slow", **kwargs, **switch).finetune()
    assert fast.tuned_metrics == pytest.approx(slow.tuned_metrics, abs=0.02)
    ours, theirs = weights(tmp_path / "fast"), weights(tmp_path / "slow")
    assert all(torch.allclose(w, theirs[n], atol=2e-4) for n, w in ours.items())
    assert all(".layer.1." in n for n in ours), "the upper half of two layers"


def test_a_stopped_run_with_frozen_layers_resumes_bit_by_bit(tiny_model, tmp_path, monkeypatch):
    calm = engine(tiny_model, tmp_path / "calm", lora_layers=0.5).finetune()
    stop_at(monkeypatch, 7, engine(tiny_model, tmp_path / "run", lora_layers=0.5).finetune)
    resumed = engine(tiny_model, tmp_path / "run", lora_layers=0.5, resume_from_checkpoint=True).finetune()
    assert resumed.fingerprint == calm.fingerprint
    assert resumed.history == calm.history
