"""Training runs in tests: stopping them with signals, and reading what they wrote."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_index_lora_embed.training import auto_batch_size
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.conftest import make_engine

checkpointing_engine = partial(make_engine, save_checkpoints=True, checkpoint_save_steps=5)
"""The engine of a run of twelve steps with a checkpoint every five."""


def weights(path):
    """The adapter's tensors in a directory."""
    return load_file(Path(path) / "adapter_model.safetensors")


def apart(one, other):
    """The largest difference of two adapters' weights, relative to the largest weight."""
    assert one.keys() == other.keys()
    scale = max(float(weight.abs().max()) for weight in other.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


def signal_in(monkeypatch, owner, name, number, call, times=1):
    """Send this process a signal at the end of the nth call of a method."""
    original, calls = getattr(owner, name), [0]

    def sending(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, name, sending)


def stop_at(monkeypatch, step, train):
    """Press Ctrl-C in a step of a training."""
    signal_in(monkeypatch, LoraTrainer, "training_step", signal.SIGINT, step)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.undo()


def limit_memory(monkeypatch, texts):
    """Simulate a device that holds no more than so many texts at once."""
    compute = LoraTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        rows = max(t.shape[0] for name, t in inputs.items() if name.endswith("input_ids"))
        whole = sum(t.shape[0] for name, t in inputs.items() if name.endswith("input_ids"))
        chunked = getattr(self.loss, "mini_batch_size", None) or getattr(self.loss, "cached", False)
        if (rows if chunked else whole) > texts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "compute_loss", limited)
    monkeypatch.setattr(auto_batch_size, "_can_run_out", lambda device: True)
