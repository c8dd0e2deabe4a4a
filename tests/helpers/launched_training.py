"""What tests send to the processes of a launcher: a configuration of the tiny model, and callbacks that kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from transformers import TrainerCallback

from llama_index_lora_embed import FinetuneConfig
from tests.conftest import make_dataset


def tiny_config(model: str, folder: Path, **arguments) -> FinetuneConfig:
    """A run of 18 steps in two processes, with a checkpoint every two and dropout, so that its random states matter."""
    folder.mkdir(parents=True, exist_ok=True)
    make_dataset(passages=70).save_json(folder / "train.json")
    make_dataset(passages=10, seed=7, prefix="v").save_json(folder / "val.json")
    values = {
        "dataset": str(folder / "train.json"),
        "val_dataset": str(folder / "val.json"),
        "model_id": model,
        "model_output_path": str(folder / "adapter"),
        "show_progress_bar": False,
        "device": "cpu",
        "precision": "fp32",
        "learning_rate": 2e-2,
        "epochs": 2,
        "batch_size": 4,
        "checkpoint_save_steps": 2,
        "lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2},
        **arguments,
    }
    return FinetuneConfig.from_arguments(**values)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files that make an adapter."""
    return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}


class KillOnce(TrainerCallback):
    """Kills one process at a step, but not again after that.

    Args:
        folder: Where it remembers that it did, as "killed-<rank>".
        rank: Of the process.
        step: At whose end it is killed.
        number: The signal.
        of_parent: Send it to the process that made this object instead.
    """

    def __init__(
        self, folder: Path, rank: int, step: int, number: signal.Signals = signal.SIGKILL, of_parent: bool = False
    ) -> None:
        self.mark = folder / f"killed-{rank}"
        self.rank, self.step, self.number = rank, step, number
        self.pid = os.getpid() if of_parent else None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.process_index == self.rank and state.global_step == self.step and not self.mark.exists():
            self.mark.write_text(str(state.global_step))
            os.kill(self.pid or os.getpid(), self.number)
