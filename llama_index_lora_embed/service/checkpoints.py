"""Intermediate checkpoints of a job as models: an adapter directory with the weights of a step."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

from llama_index_lora_embed.config import MANIFEST_NAME
from llama_index_lora_embed.service.errors import ServiceError


def open_checkpoint(adapter: Path, step: int) -> Path:
    """The adapter directory of a checkpoint, which is made when it is first asked for.

    It lies beside the run directory, under a name with which it is deleted together with the run. As the evaluations of
    the run, it has the share of the trained change that `adapter_scale` says.

    Args:
        adapter: The adapter directory of the job, which has succeeded.
        step: Of the checkpoint.

    Raises:
        ServiceError: 404, the checkpoint is not there (any more).
        OutputDirectoryError: The disk is full.
    """
    target, checkpoint = (adapter.with_name(f"{adapter.name}.run{end}") for end in (f".step-{step}", ""))
    checkpoint /= f"checkpoint-{step}"
    if (target / MANIFEST_NAME).is_file():
        return target
    from safetensors.numpy import load_file, save_file

    from llama_index_lora_embed.models.adapter_directory import (
        WEIGHTS_NAME,
        Manifest,
        digests,
        rename_magnitudes,
        write_manifest,
        written_directory,
    )

    manifest = Manifest.read(adapter)
    if manifest is None or not (checkpoint / WEIGHTS_NAME).is_file():
        raise ServiceError(
            f"checkpoint {step} of a job",
            "one of its last checkpoints, before the data of the run is deleted",
            "GET /v1/fine_tuning/jobs/{job_id}/checkpoints lists the steps; earlier ones were replaced by later ones.",
            status=404,
            code="model_not_found",
            param="model",
        )
    with written_directory(target) as staging:
        for name in manifest.files:
            source = checkpoint / name
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source if source.is_file() else adapter / name, staging / name)
        scale = float(manifest.settings.get("adapter_scale", 1.0))
        weights = load_file(checkpoint / WEIGHTS_NAME)
        scaled = {
            name: tensor * tensor.dtype.type(scale if "lora_B" in name else 1) for name, tensor in weights.items()
        }
        save_file(scaled, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        rename_magnitudes(staging / WEIGHTS_NAME)
        files = digests(staging)
        identity = hashlib.sha256(f"{manifest.fingerprint} {files[WEIGHTS_NAME]}".encode()).hexdigest()
        verdict = f"NOT EVALUATED: the checkpoint of step {step}."
        step_of = replace(manifest, fingerprint=identity, files=files, best_step=step, verdict=verdict, metrics={})
        write_manifest(step_of, staging)
    return target
