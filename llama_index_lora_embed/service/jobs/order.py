"""From a request to a job: everything about it is checked at once, its data written, and the job enqueued.

Both faces of the API create jobs by `order`.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.core.errors import ConfigError, LoraEmbedError
from llama_index_lora_embed.service.data import JobData, Rows, read_data
from llama_index_lora_embed.service.database import new_id
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.files import disk_error
from llama_index_lora_embed.service.jobs.state import JobSpec, JobState
from llama_index_lora_embed.service.settings import ServiceSettings

if TYPE_CHECKING:
    from llama_index_lora_embed.service.services import Services

ALLOWED_ARGUMENTS = (
    *("adapter_scale", "base_dropout", "batch_size", "best_metric", "early_stopping_patience", "epochs"),
    *("evaluation_steps", "learning_rate", "length_coverage", "lora_alpha", "lora_layers", "lora_r", "max_grad_norm"),
    *("max_seq_length", "mining", "objective", "precision", "seed", "selection_passages", "temperature", "tune"),
    *("preset", "warmup_ratio", "weight_decay"),
    *("filters", "max_eval_passages", "on_overlap", "use_all_docs", "val_fraction"),
    *("passage_prompt", "pooling", "query_prompt", "window"),
)
"""Fields of `FinetuneConfig` that a request may set, by their own names: none of them is a path or runs code."""
_NOT_IN_MINING = ("memory_mb", "show_progress_bar")
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_GROUP = re.compile(r"^(data|base|training)\.")


def order(
    services: Services,
    *,
    owner: str,
    model: str,
    training: Rows | None,
    validation: Rows | None = None,
    arguments: Mapping[str, Any] | None = None,
    query_origin: str | None = None,
    suffix: str | None = None,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    request_digest: str | None = None,
    problems: list[str] | None = None,
) -> tuple[JobState, bool]:
    """Create a job.

    Args:
        services: Of the application.
        owner: Id of the caller's token.
        model: Base model, a name of `settings.allowed_models`.
        training: Rows of training data (`data.inline_rows`, `data.file_rows`); None where `problems` says why there are
            none.
        validation: The same for validation; None holds some of the training data out.
        arguments: Fields of `FinetuneConfig` of `ALLOWED_ARGUMENTS`.
        query_origin: How the queries came about, where the data does not say it: "human", or "llm".
        suffix: Part of the name of the tuned model.
        metadata: The client's labels.
        extra: What the face wants back (`JobSpec.extra`).
        request_digest: See `JobStore.create`.
        problems: What is wrong with the request otherwise, to be reported together; a reader of rows may still add
            to it.

    Returns:
        The job, and whether it is new.

    Raises:
        ServiceError: 400, with everything that is wrong in `.problems`; 429, there are too many jobs; 507, the disk is
            full.
    """
    settings, arguments = services.settings, dict(arguments or {})
    problems = [] if problems is None else problems
    if model not in settings.allowed_models:
        problems.append(f"model={model!r:.80}: expected one of {', '.join(map(repr, settings.allowed_models))}")
    if suffix is not None and not _SUFFIX.fullmatch(suffix):
        problems.append(f"suffix={suffix!r:.80}: expected up to 64 letters, digits, '-' and '_'")
    config = _checked_arguments(arguments, problems)
    train = None if training is None else read_data(training, settings, problems, query_origin)
    val = None if validation is None else read_data(validation, settings, problems, query_origin)
    if val is not None and train is not None and val.kind != ("pairs" if train.kind == "pairs" else "queries"):
        problems.append(f"validation data of the kind {val.kind!r} for training data of the kind {train.kind!r}")
    job_id = new_id("ftjob-")
    if not problems and train is not None and config is not None:
        located = _located(config, settings, job_id, model)
        _check_run(located, train, val, problems, {settings.allowed_models[model]: model})
    if problems or train is None:
        raise ServiceError(
            f"a request with {len(problems)} problem(s)",
            "a model of the list, data, and fields of FinetuneConfig",
            "Correct them all:",
            problems,
            param=re.split(r"[=:\[,. ]", problems[0])[0] if problems else None,
        )
    spec = JobSpec(
        owner=owner,
        model=model,
        data=train.kind,
        validation=val is not None,
        arguments=arguments,
        suffix=suffix,
        metadata=dict(metadata or {}),
        extra=dict(extra or {}),
    )
    folder = settings.jobs_dir / job_id
    try:
        folder.mkdir(parents=True)
        train.write(_data_file(folder, "training", train.kind))
        if val is not None:
            val.write(_data_file(folder, "validation", val.kind))
        state, new = services.submit(spec, job_id=job_id, request_digest=request_digest)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(error) from error
        raise
    if not new:
        shutil.rmtree(folder, ignore_errors=True)
    return state, new


def config_of(job: JobState, settings: ServiceSettings) -> FinetuneConfig:
    """The run of a job, with the paths of this service.

    Raises:
        ServiceError: The job's base model is not allowed any more.
    """
    spec = job.spec
    if spec.model not in settings.allowed_models:
        raise ServiceError(
            f"the base model {spec.model!r}, which is not allowed any more",
            "a model of allowed_models",
            "Allow it again, or create a job with another model.",
            code="model_not_allowed",
            param="model",
        )
    config = _located(FinetuneConfig.from_arguments(**spec.arguments), settings, job.id, spec.model)
    folder = settings.jobs_dir / job.id
    training = str(_data_file(folder, "training", spec.data))
    kind = "pairs" if spec.data == "pairs" else "queries"
    data = config.data.replace(
        dataset=None if spec.data == "nodes" else training,
        nodes=training if spec.data == "nodes" else None,
        val_dataset=str(_data_file(folder, "validation", kind)) if spec.validation else None,
        kind=kind,
    )
    return config.replace(data=data)


def sweep_folders(services: Services, older_than_s: float = 3600.0) -> None:
    """Delete folders of data whose job was never created, because the server was killed in between."""
    folders = {folder.name: folder for folder in services.settings.jobs_dir.iterdir()}
    for name in folders.keys() - services.jobs.known(list(folders)):
        with suppress(OSError):  # another process may be removing it too
            if time.time() - folders[name].stat().st_mtime > older_than_s:
                shutil.rmtree(folders[name], ignore_errors=True)


def _data_file(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{name}.{'jsonl' if kind == 'nodes' else 'json'}"


def _located(config: FinetuneConfig, settings: ServiceSettings, job_id: str, model: str) -> FinetuneConfig:
    """The configuration with what the service decides: base, output, checkpoints, device."""
    return config.replace(
        base=config.base.replace(model_id=settings.allowed_models[model]),
        training=config.training.replace(
            save_checkpoints=True,
            checkpoint_save_steps=settings.checkpoint_steps,
            checkpoint_save_total_limit=2,
            show_progress_bar=False,
            device=settings.device,
            trust_remote_code=False,
        ),
        mining=None if config.mining is None else config.mining.replace(show_progress_bar=False),
        output=config.output.replace(model_output_path=str(settings.models_dir / job_id), resume_from_checkpoint=True),
    )


def _checked_arguments(arguments: dict[str, Any], problems: list[str]) -> FinetuneConfig | None:
    """The configuration of a request's arguments; None if some are wrong, which are then in `problems`."""
    before = len(problems)
    for name in sorted(arguments.keys() - set(ALLOWED_ARGUMENTS)):
        problems.append(f"{name}: unknown; expected one of {', '.join(ALLOWED_ARGUMENTS)}")
    allowed = {name: value for name, value in arguments.items() if name in ALLOWED_ARGUMENTS}
    mining = allowed.get("mining")
    if isinstance(mining, Mapping):
        problems += [f"mining.{name}: the service decides it" for name in _NOT_IN_MINING if name in mining]
    for name, value in allowed.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            problems.append(f"{name}: half a character (a lone surrogate), which is not UTF-8")
    try:
        config = FinetuneConfig.from_arguments(**allowed)
    except ConfigError as error:
        problems += [_GROUP.sub("", line) for line in error.problems]
        return None
    return config if len(problems) == before else None


def _check_run(
    config: FinetuneConfig, train: JobData, val: JobData | None, problems: list[str], names: Mapping[str, str]
) -> None:
    """What is wrong about data and configuration together, as a run would find before it loads anything."""
    from llama_index_lora_embed.engines.validation import check_run

    try:
        check_run(config, train.dataset, None if val is None else val.dataset)
    except LoraEmbedError as error:
        found = error.problems or [str(error)]
        problems += [without_paths(_GROUP.sub("", line), config, names) for line in found]


def without_paths(message: str, config: FinetuneConfig, names: Mapping[str, str]) -> str:
    """A message without the folders of this service, which are nobody else's business.

    Args:
        message: Of an error.
        config: The run.
        names: Folder of a base model to its public name.
    """
    for place, name in names.items():
        message = message.replace(place, name)
    return message.replace(str(Path(config.output.model_output_path).parent), "<models>")
