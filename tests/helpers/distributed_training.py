"""A training by several processes: `torchrun --nproc-per-node 2 -m tests.helpers.distributed_training ORDERS`.

ORDERS is a JSON file: model, path, arguments of the engine and of its finetune(), and the step at which to stop.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from transformers import TrainerCallback

from llama_index_lora_embed import LoraFinetuneEngine
from llama_index_lora_embed.config import ObjectiveSettings
from tests.conftest import make_dataset
from tests.helpers.labelled_pairs import make_pairs


class FirstGradient(TrainerCallback):
    def __init__(self, path, stop_at):
        self.path = path
        self.stop_at = stop_at

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            save_file(grads, f"{self.path}.gradient-{args.process_index}")
        if state.global_step == self.stop_at and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    orders = json.loads(Path(sys.argv[1]).read_text())
    arguments = {
        "val_dataset": make_dataset(passages=10, seed=7, prefix="v"),
        "show_progress_bar": False,
        "device": "cpu",
        "precision": "fp32",
        "learning_rate": 1e-3,
        "epochs": 2,
        "save_checkpoints": True,
        "checkpoint_save_steps": 2,
        **orders["arguments"],
    }
    if objective := orders.get("objective"):
        arguments["objective"] = ObjectiveSettings(**objective)
    engine = LoraFinetuneEngine(make_dataset(passages=70), orders["model"], orders["path"], **arguments)
    if orders.get("pairs"):
        engine = LoraFinetuneEngine(make_pairs(), orders["model"], orders["path"], **arguments)
    callback = FirstGradient(orders["path"], orders.get("stop_at", -1))
    result = engine.finetune(callbacks=[callback], max_grad_norm=1e9, **orders.get("finetune", {}))
    rank = dist.get_rank() if dist.is_initialized() else 0
    said = {"fingerprint": result.fingerprint, "history": result.history, "steps": result.steps}
    Path(f"{orders['path']}.said-{rank}").write_text(json.dumps(said))
    assert engine.get_finetuned_model(device="cpu").fingerprint == result.fingerprint


if __name__ == "__main__":
    main()
