"""A process that trains the tiny model again and again in forked children, for tests that kill them.

It reads lines of JSON from stdin: {"model", "path", "kill", "teacher"}; "kill" is null, {"after": seconds},
{"in_save": nth disk operation of a save}, {"in_evaluation": nth call} or {"in_scoring": nth part of a teacher's
scores}, and "teacher" null or the folder of one. Each child resumes where the last one was killed. It answers with the
child's exit code, the event during which it ended, and the seconds it took.
"""

import json
import os
import signal
import sys
import time
from functools import partial

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from peft import LoraConfig

from llama_index_lora_embed.models import adapter_directory
from llama_index_lora_embed.training import teacher, trainer
from llama_index_lora_embed.training.checkpointing import checkpoints
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from tests.conftest import make_engine

torch.set_num_threads(1)  # no pool of threads that a fork would lose
teacher._PART = 40  # so that a few pairs are scored in several parts


engine = partial(
    make_engine,
    batch_size=4,
    epochs=5,
    save_checkpoints=True,
    checkpoint_save_steps=2,
    checkpoint_save_total_limit=2,
    evaluation_steps=3,
    precision="fp32",
    resume_from_checkpoint=True,
    # dropout, so that a random state that is not restored shows
    lora_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2),
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_down(owner, name: str, times: int) -> None:
    """Kill this process at the start of the nth call of a function."""
    original = getattr(owner, name)
    left = [times]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def arm(kill) -> None:
    if kill is None:
        return
    if "in_save" in kill:
        whole = trainer.write_checkpoint

        def guarded(*args, **kwargs):
            # whatever reaches the disk in a save: new files, syncs, renames, removals
            left = [kill["in_save"]]

            def audit(event, arguments):
                if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "os.mkdir"):
                    left[0] -= 1
                    if left[0] == 0:
                        die()

            sys.addaudithook(audit)
            result = whole(*args, **kwargs)
            left[0] = -1
            return result

        trainer.write_checkpoint = guarded
    if "in_evaluation" in kill:
        count_down(CheckpointSelection, "_keep", kill["in_evaluation"])
    if "in_scoring" in kill:
        count_down(teacher, "append_json_line", kill["in_scoring"])
    if "in_write" in kill:
        count_down(adapter_directory, "file_digest", kill["in_write"])


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            arm(order["kill"])
            engine(order["model"], order["path"], teacher=order["teacher"]).finetune()
            os._exit(0)
        after = (order["kill"] or {}).get("after")
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}
        latest = checkpoints.checkpoints(adapter_directory.Path(order["path"] + ".run"))
        print(json.dumps({**answer, "checkpoint": latest[-1].name if latest else None}), flush=True)


if __name__ == "__main__":
    main()
