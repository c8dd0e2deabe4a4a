"""A run on the passages of an existing index, whose vectors are used as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import PrivateAttr

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.questions.base import QueryGenerator
from llama_index_lora_embed.data.readers.vector_stores import read_vectors
from llama_index_lora_embed.data.stored_vectors import StoredVectors
from llama_index_lora_embed.data.training_data import from_huggingface
from llama_index_lora_embed.deployment.index_model import verify_vectors
from llama_index_lora_embed.engines.run import FinetuneRun, prepare, run_from_nodes
from llama_index_lora_embed.engines.starting_model import StartingModel
from llama_index_lora_embed.engines.validation import check_run

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from peft import LoraConfig


def run_from_store(
    arguments: dict[str, Any],
    store: Any,
    dataset: Any | None,
    val_dataset: Any | None,
    query_generators: Iterable[QueryGenerator] | None,
    llm: LLM | None,
    *,
    loss: Any | None = None,
    lora_config: LoraConfig | None = None,
    teacher: Any | None = None,
) -> FinetuneRun:
    """A run with `tune="query"` on everything that a vector store holds; see `LoraFinetuneEngine.from_vector_store`.

    The store is checked first, then the arguments, then that the base made the vectors; an LLM is paid after that.

    Raises:
        ConfigError: Wrong arguments, or a store that cannot list its vectors.
        DatasetError: The store holds nothing or unusable vectors, or lacks passages of a dataset.
        WrongIndexError: The base did not make the store's vectors.
    """
    stored = read_vectors(store)
    if (tune := arguments.setdefault("tune", "query")) != "query":
        raise ConfigError(
            f"tune={tune!r} with a vector store",
            'tune="query", because its vectors stay as they are',
            "To tune both sides, pass the nodes: LoraFinetuneEngine.from_nodes(nodes, ...).",
        )
    dataset = from_huggingface(dataset, "dataset")
    val_dataset = from_huggingface(val_dataset, "val_dataset")
    # refuses a loss
    config = check_run(arguments, dataset, val_dataset, loss=loss, lora_config=lora_config, teacher=teacher).config
    # every passage is searched: their vectors are there
    config = config.replace(data=config.data.replace(max_eval_passages=len(stored)))
    train, val = (_over(stored, data, name) for data, name in ((dataset, "dataset"), (val_dataset, "val_dataset")))
    base = StartingModel(config).embedding()
    verify_vectors(store, stored, base)
    if train is None:
        embedding = _StoredPassages(base, stored)
        nodes = [node for node, has_text in zip(stored.nodes, stored.has_text, strict=True) if has_text]
        run = run_from_nodes(
            config, nodes, val, query_generators, llm, lora_config=lora_config, embed_model=embedding, teacher=teacher
        )
    else:
        run = prepare(config, train, val, lora_config=lora_config, teacher=teacher)
    # the passages that a split takes out of the training set are in the index all the same
    train, val = _over(stored, run.dataset), _over(stored, run.val_dataset)
    return replace(run, dataset=train or run.dataset, val_dataset=val, stored=stored)


def _over(stored: StoredVectors, dataset: Any | None, name: str = "dataset") -> EmbeddingQAFinetuneDataset | None:
    return None if dataset is None else stored.corpus_for(EmbeddingQAFinetuneDataset.coerce(dataset, name), name)


class _StoredPassages(BaseEmbedding):
    """A model with the store's vectors for the passages that the store holds."""

    _model: BaseEmbedding = PrivateAttr()
    _rows: dict[str, int] = PrivateAttr()
    _stored: StoredVectors = PrivateAttr()

    def __init__(self, model: BaseEmbedding, stored: StoredVectors) -> None:
        super().__init__(model_name=model.model_name, embed_batch_size=model.embed_batch_size)
        self._model, self._stored = model, stored
        self._rows = {text: row for row, text in enumerate(stored.texts)}

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._model.get_query_embedding(query)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await self._model.aget_query_embedding(query)

    def _get_text_embedding(self, text: str) -> Embedding:
        row = self._rows.get(text)
        return self._model.get_text_embedding(text) if row is None else self._stored.vectors[row].tolist()
