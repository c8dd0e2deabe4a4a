"""`examine`: what is installed here, what the machine has, and what a run of a configuration will do."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.core.errors import LoraEmbedError, attempt
from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.engines.dry_run import DryRun, dry_run, free_mb

_LIBRARIES = ("llama-index-core", "sentence-transformers", "transformers", "peft", "torch")
_SAMPLE_PASSAGES, _SAMPLE_WORDS = 64, 120


@dataclass(frozen=True)
class Environment:
    """Versions and hardware.

    Attributes:
        versions: Of Python, this package and the libraries that it stands on.
        system: Operating system and processor.
        cores: That this process may use.
        threads: That torch computes with.
        memory_mb: Of the machine; None where it is not known.
        device: torch device that a run takes.
        device_name: Of an accelerator; "" for a CPU.
        device_memory_mb: Of an accelerator; None for a CPU.
        precision: That "auto" stands for on the device.
        free_mb: Free disk space where the adapter will be written.
    """

    versions: dict[str, str]
    system: str
    cores: int
    threads: int
    memory_mb: float | None
    device: str
    device_name: str
    device_memory_mb: float | None
    precision: str
    free_mb: float

    @classmethod
    def of(cls, config: FinetuneConfig) -> Environment:
        """That of this process, for the device and the output path of a configuration."""
        import torch
        from sentence_transformers.util import get_device_name

        from llama_index_lora_embed import __version__
        from llama_index_lora_embed.models.kernels.precision import resolve_precision

        device = torch.device(config.training.device or get_device_name())
        cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        versions = {"python": platform.python_version(), "llama-index-lora-embed": __version__}
        return cls(
            versions=versions | {name: metadata.version(name) for name in _LIBRARIES},
            system=f"{platform.platform()} ({platform.processor() or platform.machine()})",
            cores=cores,
            threads=torch.get_num_threads(),
            memory_mb=_memory_mb(),
            device=str(device),
            device_name="" if cuda is None else cuda.name,
            device_memory_mb=None if cuda is None else cuda.total_memory / 2**20,
            precision=resolve_precision(config.training.precision, device),
            free_mb=free_mb(config.output.model_output_path),
        )

    def __str__(self) -> str:
        memory = "" if self.memory_mb is None else f", {self.memory_mb:,.0f} MB of memory"
        name = f" ({self.device_name}, {self.device_memory_mb:,.0f} MB)" if self.device_name else ""
        return "\n".join(
            [
                "versions: " + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
                f"system: {self.system}, {self.cores} cores of which torch uses {self.threads}{memory}",
                f"device: {self.device}{name}, training in {self.precision}",
                f"disk: {self.free_mb:,.0f} MB free for the output",
            ]
        )


@dataclass(frozen=True)
class Examination:
    """What `examine` found.

    Attributes:
        environment: Versions and hardware.
        model: The base or the adapter that a run starts from: its place, parameters, dimensions, length and prompts; {}
            if it does not load.
        run: What a run will do: on the data that the configuration names, or else on a made-up sample of 64 passages of
            120 words; None if that cannot be said.
        sample: Whether it is the sample.
        problems: What a run would fail with.
    """

    environment: Environment
    model: dict[str, Any]
    run: DryRun | None
    sample: bool
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(self.environment)]
        if self.model:
            lines.append("model: " + ", ".join(f"{name} {value}" for name, value in self.model.items()))
        if self.run is not None:
            what = f"a made-up sample of {_SAMPLE_PASSAGES} passages" if self.sample else "the run"
            lines += [f"on {what}:", *(f"  {line}" for line in str(self.run).splitlines())]
            if self.sample and self.run.trial is not None:
                trial = self.run.trial
                minutes = 1000 * trial.steps / _SAMPLE_PASSAGES * trial.step_seconds / 60
                lines.append(f"1,000 passages of {_SAMPLE_WORDS} words would train in about {minutes:.1f} min")
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


def examine(config: FinetuneConfig, *, seconds: float = 1.0) -> Examination:
    """Look at the machine and at a run, and measure a second of its work; problems are collected, not raised.

    Args:
        config: The run; without data in it, a sample is taken.
        seconds: Of work.
    """
    errors: list[LoraEmbedError] = []
    model = attempt(lambda: _describe_model(config), errors) or {}
    sample = config.data.dataset is None and config.data.nodes is None
    objects: dict[str, Any] = {"dataset": _sample()} if sample else {}
    found = None
    if model:
        found = attempt(lambda: dry_run(config, seconds=seconds, **objects), errors)
    problems = [line for error in errors for line in (error.problems or [str(error)])]
    return Examination(Environment.of(config), model, found, sample, problems)


def _describe_model(config: FinetuneConfig) -> dict[str, Any]:
    from llama_index_lora_embed.engines.starting_model import StartingModel

    model, base, parent, _ = StartingModel(config).load()
    prompts = {name: model.prompts.get(task) or "" for name, task in (("query", "query"), ("passage", "document"))}
    return {
        "path": parent["path"] if parent is not None else str(base.path),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dimensions": model.get_embedding_dimension(),
        "max_seq_length": model.max_seq_length,
        "prompts": prompts,
    }


def _sample() -> EmbeddingQAFinetuneDataset:
    """Passages of ordinary English words, each with a query, all different."""
    words = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()  # noqa: SIM905
    texts = [
        " ".join(words[(place * (number + 3) + number) % len(words)] for place in range(_SAMPLE_WORDS))
        for number in range(_SAMPLE_PASSAGES)
    ]
    corpus = {f"p{number}": f"{number}. {text}" for number, text in enumerate(texts)}
    return EmbeddingQAFinetuneDataset(
        queries={f"q{number}": f"{number}. {text[:40]}?" for number, text in enumerate(texts)},
        corpus=corpus,
        relevant_docs={f"q{number}": [f"p{number}"] for number in range(_SAMPLE_PASSAGES)},
        source_documents={passage_id: passage_id for passage_id in corpus},
    )


def _memory_mb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    except (AttributeError, ValueError, OSError):  # Windows
        return None
