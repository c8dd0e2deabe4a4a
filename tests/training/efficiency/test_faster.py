"""What makes a step cheaper must not change what is learnt."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.models import base_model
from llama_index_lora_embed.models.kernels.lora import fused_lora
from llama_index_lora_embed.training.efficiency import frozen_layers as prefix_module
from llama_index_lora_embed.training.efficiency.frozen_layers import TEXT_IDS, HiddenStateCache, HiddenStates
from llama_index_lora_embed.training.lora import upper_modules
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from tests.architectures import ARCHITECTURES, llama
from tests.helpers.gradients import assert_same, chunks, gradients, prepared
from tests.training.checkpointing.stops import stop_at
from tests.training.checkpointing.test_checkpoints import engine, weights


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("form", ["plain", "gradcache", "guide"])
def test_kept_outputs_of_frozen_layers_change_nothing(name, form, tmp_path):
    objective = {
        "plain": None, "gradcache": ObjectiveSettings(mini_batch_size=5), "guide": ObjectiveSettings(guide=True),
    }[form]  # fmt: skip
    path = ARCHITECTURES[name].make(tmp_path / name)
    names = upper_modules(base_model.load_base(base_model.describe_base(str(path))), 0.5)
    assert len(names) == len(ARCHITECTURES[name].targets)
    model, loss, batch = prepared(path, LoraConfig(r=4, target_modules=names), objective)
    plain = gradients(model, loss, batch)
    prefix = HiddenStateCache.of(model, 1 << 20)
    assert prefix.first == 1
    assert prefix.agrees(model, chunks(batch)[0], 1e-5)
    loss.prefix = prefix
    for _ in range(2):  # once to fill, once from what is kept
        assert_same(gradients(model, loss, batch), plain)
    lower = [p for n, p in model.named_parameters() if p.requires_grad and ".0." in n]
    assert not lower


def test_kept_outputs_go_to_disk_beyond_the_bound(tiny_model):
    states = HiddenStates(1000)
    rows = {number: torch.randn(5 + number, 8).to(torch.bfloat16) for number in range(40)}
    for number, row in rows.items():
        states.put(number, row)
    assert sum(r.numel() * 2 for r in states.held.values()) <= 1000
    assert states.file is not None
    assert all(states.get(number).equal(row) for number, row in rows.items())
    states.close()
    assert states.get(3) is None


def refuse(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["full", "nearly full", "short write"])
def test_a_full_disk_costs_time_and_not_the_run(tiny_model, tmp_path, monkeypatch, trouble):
    names = upper_modules(base_model.load_base(base_model.describe_base(tiny_model)), 0.5)
    model, loss, batch = prepared(tiny_model, LoraConfig(r=4, target_modules=names))
    plain = gradients(model, loss, batch)
    loss.prefix = HiddenStateCache.of(model, 1000, tmp_path)
    if trouble == "full":
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **kwargs: refuse())
    elif trouble == "nearly full":
        monkeypatch.setattr(prefix_module, "_LEFT_FREE", 1 << 60)
    else:
        loss.prefix.states.file = type("Short", (), {"seek": lambda *a: 0, "write": lambda *a: 1, "close": refuse})()
    with pytest.warns(UserWarning, match="no room for more"):
        first = gradients(model, loss, batch)
    assert_same(first, plain)
    assert_same(gradients(model, loss, batch), plain)
    assert not loss.prefix.states.places
    if trouble != "short write":
        loss.prefix.states.close()
        assert not list(tmp_path.iterdir())


def test_outputs_that_nothing_would_read_again_are_not_kept(tiny_model, tmp_path, monkeypatch):
    kept = []
    put = HiddenStates.put
    monkeypatch.setattr(HiddenStates, "put", lambda self, *args: (kept.append(args[0]), put(self, *args)))
    arguments = {"lora_layers": 0.5, "precision": "fp32"}
    engine(tiny_model, tmp_path / "checkpointed", **arguments).finetune(gradient_checkpointing=True)
    engine(tiny_model, tmp_path / "one", **arguments).finetune(max_steps=1)
    assert not kept
    engine(tiny_model, tmp_path / "all", **arguments).finetune()
    assert kept


def test_a_model_whose_layers_are_not_kept_says_so(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(HiddenStateCache, "agrees", lambda *args: False)
    with pytest.warns(UserWarning, match="cannot be computed apart"):
        engine(tiny_model, tmp_path / "run", lora_layers=0.5).finetune()


def test_what_others_put_in_a_layers_place_is_there_again_afterwards(tiny_model):
    names = upper_modules(base_model.load_base(base_model.describe_base(tiny_model)), 0.5)
    model, loss, batch = prepared(tiny_model, LoraConfig(r=4, target_modules=names))
    loss.prefix = HiddenStateCache.of(model, 1 << 20)
    layer, lora = loss.prefix.layers[0], next(m for m in model.modules() if isinstance(m, LoraLinear))
    theirs = [layer.forward, lora.forward]
    layer.forward, lora.forward = theirs
    with fused_lora(model) as changed:
        gradients(model, loss, batch)
    assert [layer.__dict__["forward"], lora.__dict__["forward"]] == theirs
    assert changed == len([m for m in model.modules() if isinstance(m, LoraLinear)]) - 1


def test_where_training_begins_in_the_first_layer_nothing_is_kept(tiny_model):
    model, _, batch = prepared(tiny_model)
    assert HiddenStateCache.of(model, 1 << 20) is None
    assert all(TEXT_IDS in chunk for chunk in chunks(batch))


def test_a_model_that_cannot_be_cut_in_two_is_left_alone(tmp_path):
    path = llama(tmp_path / "llama")
    model, _, batch = prepared(path, LoraConfig(r=4, target_modules=["layers.1.mlp.up_proj"]))
    prefix = HiddenStateCache.of(model, 1 << 20)
    prefix.layers[1].register_forward_hook(lambda *args: (_ for _ in ()).throw(ValueError("odd")))
    assert not prefix.agrees(model, chunks(batch)[0], 1e-3)


@pytest.mark.parametrize("switch", [{"fused_lora": False}, {"frozen_cache_mb": 0}, {"frozen_cache_mb": 0.001}])
def test_a_whole_run_learns_the_same_with_each_switch(tiny_model, tmp_path, switch):
    kwargs = {"precision": "fp32", "lora_layers": 0.5, "learning_rate": 1e-3}
    fast = engine(tiny_model, tmp_path / "fast", **kwargs).finetune()
    slow = engine(tiny_model, tmp_path / "slow", **kwargs, **switch).finetune()
    assert fast.tuned_metrics == pytest.approx(slow.tuned_metrics, abs=0.02)
    ours, theirs = weights(tmp_path / "fast"), weights(tmp_path / "slow")
    assert all(torch.allclose(w, theirs[n], atol=2e-4) for n, w in ours.items())
    assert all(".layer.1." in n for n in ours), "the upper half of two layers"


def test_the_bases_dropout_is_off_unless_it_is_asked_for(tiny_model, tmp_path, monkeypatch):
    seen = []

    def watched(self, *args, **kwargs):
        drops = [m for m in self.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        seen.append((len(drops), {module.training for module in drops}, self.prefix is None))
        return forward(self, *args, **kwargs)

    forward = MaskedInfoNCELoss.forward
    monkeypatch.setattr(MaskedInfoNCELoss, "forward", watched)
    results = {}
    for wanted in (False, True):
        seen.clear()
        results[wanted] = engine(tiny_model, tmp_path / str(wanted), lora_layers=0.5, base_dropout=wanted).finetune()
        assert seen
        # what frozen layers put out cannot be kept where they drop something else each time
        assert all(count > 0 and on == {wanted} and without == wanted for count, on, without in seen)
    assert results[False].fingerprint != results[True].fingerprint


def test_a_stopped_run_with_frozen_layers_resumes_bit_by_bit(tiny_model, tmp_path, monkeypatch):
    calm = engine(tiny_model, tmp_path / "calm", lora_layers=0.5).finetune()
    stop_at(monkeypatch, 7, engine(tiny_model, tmp_path / "run", lora_layers=0.5).finetune)
    resumed = engine(tiny_model, tmp_path / "run", lora_layers=0.5, resume_from_checkpoint=True).finetune()
    assert resumed.fingerprint == calm.fingerprint
    assert resumed.history == calm.history
