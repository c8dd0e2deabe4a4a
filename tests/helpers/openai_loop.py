"""The whole loop with OpenAI's client alone: upload, create, poll, embed. Also a script, for another version of it.

`python openai_loop.py <base url> <token> <training file>` prints what `fine_tune_and_embed` returns, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from openai import OpenAI

TEXTS = ["w1 w2 w3", "w10 w20", "w7 w8 w9 w7"]
_ENDED = ("succeeded", "failed", "cancelled")


def finished(client: OpenAI, job_id: str, seconds: float = 300) -> Any:
    """The job when it has ended."""
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in _ENDED:
        assert time.monotonic() < deadline, job
        time.sleep(0.3)
    return job


def fine_tune_and_embed(client: OpenAI, path: str) -> dict[str, Any]:
    """Fine-tune the model "tiny" on a file, and embed `TEXTS` with the result and with the base."""
    with open(path, "rb") as training:
        file = client.files.create(file=training, purpose="fine-tune")
    file = client.files.wait_for_processing(file.id)
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="handbook",
        seed=3,
        metadata={"team": "docs"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 5.0},
            },
        },
    )
    ended = finished(client, job.id)
    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=3)]  # page by page
    points = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert ended.status == "succeeded", (ended.error, events)
    tuned = client.embeddings.create(model=ended.fine_tuned_model, input=TEXTS)
    floats = client.embeddings.create(model=ended.fine_tuned_model, input=TEXTS, encoding_format="float")
    return {
        "job": ended.model_dump(),
        "file": file.model_dump(),
        "events": events,
        "checkpoints": [point.step_number for point in points],
        "checkpoint": client.embeddings.create(model=points[0].fine_tuned_model_checkpoint, input=TEXTS[0])
        .data[0]
        .embedding,
        "vectors": [item.embedding for item in tuned.data],
        "floats": [item.embedding for item in floats.data],
        "tokens": tuned.usage.prompt_tokens,
        "base": client.embeddings.create(model="tiny", input=TEXTS[0]).data[0].embedding,
        "models": [model.id for model in client.models.list()],
    }


if __name__ == "__main__":
    base_url, token, training_file = sys.argv[1:]
    print(json.dumps(fine_tune_and_embed(OpenAI(base_url=base_url, api_key=token), training_file)))
