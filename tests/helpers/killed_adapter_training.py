"""A process that trains an embedding adapter again and again in forked children, for tests that kill them.

It reads lines of JSON from stdin: {"path", "kill"}; "kill" is null or {event: number}: the nth text that is paid for,
the nth step, the nth disk operation of a checkpoint, or the nth of the adapter directory. Each child resumes where the
last one was killed. It answers with the child's exit code.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from llama_index_lora_embed import EmbeddingAdapterFinetuneEngine
from llama_index_lora_embed.evaluation import embeddings
from llama_index_lora_embed.models import adapter_directory
from llama_index_lora_embed.training import embedding_adapter as training
from tests.conftest import make_dataset
from tests.helpers.embedding_models import PaidEmbedding

torch.set_num_threads(1)  # no pool of threads that a fork would lose
embeddings._SAVE_SECONDS = 0  # whatever was paid for is on disk at once

_ON_DISK = ("open", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "os.mkdir")


def count_down(owner, name: str, times: int) -> None:
    """Kill this process at the start of the nth call of a function."""
    original, left = getattr(owner, name), [times]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def count_disk(owner, name: str, times: int) -> None:
    """Kill this process at the nth disk operation within the calls of a function."""
    original, left, within = getattr(owner, name), [times], [False]

    def audit(event, arguments):
        if within[0] and event in _ON_DISK:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def guarded(*args, **kwargs):
        within[0] = True
        result = original(*args, **kwargs)
        within[0] = False
        return result

    sys.addaudithook(audit)
    setattr(owner, name, guarded)


def arm(kill) -> None:
    for event, number in (kill or {}).items():
        if event == "paid":
            count_down(PaidEmbedding, "_vector", number)
        if event == "step":
            count_down(torch.optim.AdamW, "step", number)
        if event == "in_save":
            count_disk(training, "write_checkpoint", number)
        if event == "in_write":
            count_disk(adapter_directory, "replace_directory", number)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            arm(order["kill"])
            path = Path(order["path"])
            EmbeddingAdapterFinetuneEngine(
                make_dataset(),
                PaidEmbedding(ledger=str(path.with_suffix(".ledger"))),
                model_output_path=path,
                epochs=3,
                negatives="answered",
                val_dataset=make_dataset(passages=10, seed=7, prefix="v"),
                save_checkpoints=True,
                checkpoint_save_steps=2,
                resume_from_checkpoint=True,
                cache_folder=path.with_suffix(".cache"),
            ).finetune()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
