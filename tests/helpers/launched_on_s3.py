"""A run on a cluster of its own with checkpoints on S3, whose second worker is killed once: MODEL FOLDER."""

import sys
from pathlib import Path

import fsspec
import ray

from llama_index_lora_embed import run_finetune
from llama_index_lora_embed.distributed import RayLauncher, connect
from tests.helpers.launched_training import KillOnce, files_of, tiny_config


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    connect(num_cpus=2, object_store_memory=100_000_000)
    launcher = RayLauncher(2, storage_path="s3://bucket/runs", max_failures=1)
    config = tiny_config(model, folder / "killed", save_checkpoints=True)
    run_finetune(config, launcher=launcher, callbacks=[KillOnce(folder / "killed", 1, 5)])
    assert [path for path in fs.find("bucket/runs") if path.endswith("optimizer.pt")], "checkpoints are kept"
    assert run_finetune(tiny_config(model, folder / "calm"), launcher=RayLauncher(2)).best_step > 0
    assert files_of(folder / "killed" / "adapter") == files_of(folder / "calm" / "adapter")
    steps = (folder / "killed" / "killed-1").read_text()
    ray.shutdown()
    print(f"killed after {steps} steps, equal to the calm run")


if __name__ == "__main__":
    main()
