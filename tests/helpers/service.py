"""Jobs in tests of the service: a request that trains the tiny model in a moment, a job that has succeeded without
training, and reading event streams.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llama_index_lora_embed.service.jobs.state import JobSpec, JobState, Succeeded
from llama_index_lora_embed.service.services import Services
from tests.conftest import make_dataset


def pairs_of(passages: int = 24, **more: Any) -> list[dict[str, str]]:
    """Rows of a dataset that the tiny model can learn."""
    dataset = make_dataset(passages, **more)
    return [
        {"query": text, "passage": dataset.corpus[dataset.relevant_docs[i][0]]} for i, text in dataset.queries.items()
    ]


def job_request(**more: Any) -> dict[str, Any]:
    """The body of a job of nine steps."""
    body = {"pairs": pairs_of(), "epochs": 3, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32"}
    return {**body, **more}


def succeeded_job(services: Services, adapter: Path, owner: str = "local", **spec: Any) -> JobState:
    """A job of the base "tiny" whose adapter is a copy of this one."""
    created, _ = services.jobs.create(JobSpec(owner=owner, model="tiny", data="queries", **spec))
    leased = services.jobs.lease(created.id, "worker", 60)
    assert leased is not None
    shutil.copytree(adapter, services.settings.models_dir / created.id)
    return services.jobs.append(created.id, Succeeded(attempt=leased.attempt, result={"verdict": "BETTER"})).state


def sse_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each with its fields and its data as JSON."""
    found = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in fields:
            found.append({**fields, "data": json.loads(fields["data"])})
    return found
