"""mteb on an adapter directory: the figures are those of `evaluate_retrieval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding, evaluate_retrieval
from tests.conftest import make_dataset

mteb = pytest.importorskip("mteb")
pytestmark = pytest.mark.extended


def retrieval_task() -> Any:
    """A retrieval task of mteb on queries and passages of the tests."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    data = make_dataset(passages=40, seed=3)

    class OwnPassages(AbsTaskRetrieval):  # type: ignore[misc]  # mteb is not installed where types are checked
        metadata = TaskMetadata(
            name="OwnPassages",
            description="Passages of random words.",
            type="Retrieval",
            dataset={"path": "none/none", "revision": "1"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            texts = {"corpus": data.corpus, "queries": data.queries}
            parts: dict[str, Any] = {
                name: Dataset.from_list([{"id": i, "text": text} for i, text in found.items()])
                for name, found in texts.items()
            }
            relevant = {query_id: dict.fromkeys(ids, 1) for query_id, ids in data.relevant_docs.items()}
            self.dataset = {"default": {"test": {**parts, "relevant_docs": relevant, "top_ranked": None}}}
            self.data_loaded = True

    return OwnPassages()


def test_mteb_evaluates_a_directory_with_the_figures_of_this_package(adapter: Path) -> None:
    model = SentenceTransformer(str(adapter), device="cpu")
    found = mteb.evaluate(model, [retrieval_task()], cache=None, show_progress_bar=False)
    (score,) = found.task_results[0].scores["test"]
    expected = evaluate_retrieval(LoraEmbedding(adapter), make_dataset(passages=40, seed=3)).metrics
    assert score["ndcg_at_10"] == pytest.approx(expected["ndcg@10"], abs=1e-4)
    assert score["mrr_at_10"] == pytest.approx(expected["mrr@10"], abs=1e-4)
