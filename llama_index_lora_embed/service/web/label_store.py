"""Labellings of the page on disk: a folder for each with its pool and the answers, which outlive the models."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import ConfigDict

from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.service.database import new_id
from llama_index_lora_embed.service.embedding import Batcher, ServedModel, Side
from llama_index_lora_embed.service.errors import ServiceError, not_found
from llama_index_lora_embed.service.files import disk_error

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from llama_index_lora_embed.evaluation.judging.label import Labelling

_ID = re.compile(r"label-[A-Za-z0-9]{24}")
_MOST = 50  # labellings of one token
_TOP_K = 5


class ServedEmbedding(BaseEmbedding):
    """A model of the service as LlamaIndex's embedding model."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    batcher: Batcher
    served: ServedModel
    embed_batch_size: int = 256

    def _embed(self, texts: list[str], side: Side) -> list[list[float]]:
        found: list[list[float]] = self.batcher.submit(self.served, texts, side).result().vectors.tolist()
        return found

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed([text], "passage")[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts, "passage")

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed([query], "query")[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


@dataclass(frozen=True)
class LabellingInfo:
    """What a labelling is about.

    Attributes:
        id: The prefix "label-" and 24 characters.
        owner: Id of the token that began it.
        model: Name of the tuned model.
        created: Seconds since 1970.
        pairs: Passages to be graded, over all queries.
    """

    id: str
    owner: str
    model: str
    created: float
    pairs: int


class LabelStore:
    """The labellings of the page.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(
        self, owner: str, model: str, queries: Sequence[str], nodes: Sequence[BaseNode], models: dict[str, Any]
    ) -> LabellingInfo:
        """Pool the passages of the models for each query, and store them.

        Args:
            owner: Id of the token.
            model: Name of the tuned model.
            queries: Texts.
            nodes: All passages.
            models: Embedding models by name.

        Raises:
            ServiceError: 400, the owner has too many labellings; 507, the disk is full.
            LoraEmbedError: As `label_queries`.
        """
        from llama_index_lora_embed.evaluation.judging.grades import THRESHOLD
        from llama_index_lora_embed.evaluation.judging.pool import make_pool

        if len(self.list(owner)) >= _MOST:
            raise ServiceError(f"{_MOST} labellings of this token", "fewer", "Delete one that you have downloaded.")
        pool = make_pool(
            list(queries), list(nodes), models, top_k=_TOP_K, threshold=THRESHOLD, max_queries=None, seed=0,
            column=None, num_workers=None, cache_folder=None, show_progress=False,
        )  # fmt: skip
        pairs = sum(map(len, pool.passages.values()))
        info = LabellingInfo(new_id("label-"), owner, model, time.time(), pairs)
        folder = self._folder / info.id
        try:
            folder.mkdir(parents=True)
            for name, value in (("pool", asdict(pool)), ("info", asdict(info))):
                with whole_file(folder / f"{name}.json") as file:
                    json.dump(value, file)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise disk_error(error) from error
        return info

    def list(self, owner: str | None) -> list[LabellingInfo]:
        """Labellings, newest first; owner as `JobStore.list`."""
        found = [self._info(path) for path in self._folder.glob("label-*/info.json")]
        return sorted((i for i in found if owner in (None, i.owner)), key=lambda i: i.created, reverse=True)

    def open(self, labelling_id: str, owner: str | None) -> tuple[LabellingInfo, Labelling]:
        """A labelling with its answers.

        Raises:
            ServiceError: 404, there is none of this id, or it belongs to another owner.
        """
        from llama_index_lora_embed.evaluation.judging.label import Labelling
        from llama_index_lora_embed.evaluation.judging.pool import Pool

        info = self.get(labelling_id, owner)
        folder = self._folder / info.id
        values = json.loads((folder / "pool.json").read_text(encoding="utf-8"))
        pool = Pool(**{**values, "retrievers": tuple(values["retrievers"])})
        return info, Labelling(pool, folder / "answers.jsonl")

    def get(self, labelling_id: str, owner: str | None) -> LabellingInfo:
        """What a labelling is about; raises as `open`."""
        path = self._folder / labelling_id / "info.json"
        if _ID.fullmatch(labelling_id) and path.is_file():
            info = self._info(path)
            if owner in (None, info.owner):
                return info
        raise not_found("labelling", labelling_id, "The page /label lists yours.")

    def delete(self, labelling_id: str, owner: str | None) -> None:
        """Delete a labelling with its answers; raises as `open`."""
        shutil.rmtree(self._folder / self.get(labelling_id, owner).id)

    @staticmethod
    def _info(path: Path) -> LabellingInfo:
        return LabellingInfo(**json.loads(path.read_text(encoding="utf-8")))
