"""Signals sent in the middle of a training."""

import os
import signal

import pytest

from llama_index_lora_embed.training.trainer import LoraTrainer


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
