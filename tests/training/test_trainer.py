"""The trainer: dropout of the base, and errors of a step."""

import pytest
import torch

from llama_index_lora_embed.core.errors import DeviceMemoryError
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from llama_index_lora_embed.training.trainer import out_of_memory
from tests.conftest import shown
from tests.helpers.training import checkpointing_engine as engine
from tests.helpers.training import limit_memory


def test_the_bases_dropout_is_off_unless_base_dropout_is_set(tiny_model, tmp_path, monkeypatch):
    seen = []

    def watched(self, *args, **kwargs):
        drops = [m for m in self.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        seen.append((len(drops), {module.training for module in drops}, self.hidden_state_cache is None))
        return forward(self, *args, **kwargs)

    forward = MaskedInfoNCELoss.forward
    monkeypatch.setattr(MaskedInfoNCELoss, "forward", watched)
    results = {}
    for wanted in (False, True):
        seen.clear()
        results[wanted] = engine(tiny_model, tmp_path / str(wanted), lora_layers=0.5, base_dropout=wanted).finetune()
        assert seen
        # with dropout, frozen layers have other outputs each time, which cannot be cached
        assert all(count > 0 and on == {wanted} and without_cache == wanted for count, on, without_cache in seen)
    assert results[False].fingerprint != results[True].fingerprint


def test_a_step_that_does_not_fit_is_explained_with_numbers(tiny_model, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 5)
    with pytest.raises(DeviceMemoryError) as caught:
        engine(tiny_model, tmp_path / "run", batch_size=16).finetune()
    text = str(caught.value)
    assert "batch_size=16 with texts of up to 12 tokens" in text
    assert "ObjectiveSettings(mini_batch_size=4)" in text
    assert "batch_size=8" in text
    assert "batch_size='auto'" in text
    assert "max_seq_length" not in text, "texts of twelve tokens are short"


@pytest.mark.parametrize(
    ("step", "advice"),
    [
        ({"batch_size": 32, "tokens": 400}, ["mini_batch_size=8", "batch_size=16", "max_seq_length=200"]),
        (
            {"batch_size": 64, "tokens": 100, "mini_batch_size": 4},
            ["from 4 to 2", "batch_size=32", "max_seq_length=64"],
        ),
        ({"batch_size": 8, "tokens": 40, "mini_batch_size": 1}, ["batch_size=4"]),
        ({"batch_size": 32, "tokens": 40, "gradcache": False}, ["batch_size=16"]),
        ({"batch_size": 2, "tokens": 40, "gradcache": False}, []),
    ],
    ids=shown,
)
def test_an_out_of_memory_error_suggests_only_what_can_be_done(step, advice):
    step = {"mini_batch_size": None, "gradcache": True, **step}
    error = out_of_memory(error=torch.OutOfMemoryError("CUDA out of memory."), **step)
    assert all(piece in error.hint for piece in advice)
    assert ("mini_batch_size" in error.hint) == any("mini_batch" in p or "from" in p for p in advice)
    assert ("batch_size=" in error.hint.replace("batch_size='auto'", "").replace("mini_batch_size", "")) == any(
        p.startswith("batch_size=") for p in advice
    )
    assert ("max_seq_length" in error.hint) == any("max_seq_length" in p for p in advice)
    assert "a smaller base" in error.hint
