"""llama-index-finetuning 0.4.2's `EmbeddingAdapterFinetuneEngine`: `python -m speed.old_embedding_adapter JOB.json`.

Runs in the environment "llama-index-finetuning". The engine has its own defaults (batches of 10, learning rate 2e-5)
but for the number of epochs; it embeds both texts of each pair again whenever the pair comes up. Writes the seconds of
the training by the clock and the processor, the vectors of the test queries, and the time that the adapter adds to a
query.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding

QUERIES_TIMED = 2000


class Constant(BaseEmbedding):
    """An embedding model that takes no time."""

    vector: list[float]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self.vector

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self.vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.vector


def added_microseconds(make: Any, dimensions: int) -> float:
    """Median time of a query by `make(model)`, less that of the model alone; the model takes no time."""
    constant = Constant(vector=np.random.default_rng(0).normal(size=dimensions).tolist())
    medians = []
    for model in (constant, make(constant)):
        seconds = []
        for _ in range(QUERIES_TIMED):
            started = time.perf_counter()
            model.get_query_embedding("query")
            seconds.append(time.perf_counter() - started)
        medians.append(statistics.median(seconds))
    return 1e6 * (medians[1] - medians[0])


def main() -> None:
    from llama_index.embeddings.adapter import AdapterEmbeddingModel
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.finetuning import EmbeddingAdapterFinetuneEngine, EmbeddingQAFinetuneDataset

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    train = EmbeddingQAFinetuneDataset.from_json(job["train"])
    embed_model = HuggingFaceEmbedding(model_name=job["model"], device="cpu")
    started, worked = time.perf_counter(), time.process_time()
    engine = EmbeddingAdapterFinetuneEngine(
        train, embed_model, epochs=job["epochs"], model_output_path=job["output"], device="cpu"
    )
    engine.finetune()
    result = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - worked}
    tuned = engine.get_finetuned_model(device="cpu")
    queries = [tuned.get_query_embedding(text) for text in job["test_queries"]]
    np.save(job["vectors"], np.array(queries, np.float32))
    added = added_microseconds(lambda model: AdapterEmbeddingModel(model, job["output"], device="cpu"), len(queries[0]))
    Path(job["result"]).write_text(json.dumps({**result, "added_us": added}), encoding="utf-8")


if __name__ == "__main__":
    main()
