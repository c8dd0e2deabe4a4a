"""Passages of the pages: pasted ones and those of a job's training data; and their vectors."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.service.embedding import ServedModel, Vectors
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.jobs.order import config_of
from llama_index_lora_embed.service.services import Services

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from llama_index_lora_embed.service.jobs.state import JobState

MOST = 1000
"""Passages of a page, which the server embeds while the visitor waits."""


def pasted_lines(text: str, what: str, services: Services, most: int = MOST) -> list[str]:
    """The lines of a field that are not empty, each once.

    Raises:
        ServiceError: There are none, or too many or too long ones.
    """
    found = [*dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())]
    longest = services.settings.max_row_characters
    if not found or len(found) > most or len(text) > services.settings.max_characters:
        got = f"{len(found)} {what} with {len(text)} characters" if found else f"no {what}"
        expected = f"1 to {most} with at most {services.settings.max_characters} characters"
        raise ServiceError(got, expected, "Put one on each line.", param=what)
    if long := [line for line in found if len(line) > longest]:
        raise ServiceError(f"{what} of {len(long[0])} characters", f"at most {longest}", "Split them.", param=what)
    return found


def passages_of_job(services: Services, job: JobState) -> list[BaseNode]:
    """The first `MOST` passages of a job's training data, as nodes.

    Raises:
        ServiceError: The data was deleted, because the job ended long ago.
    """
    from llama_index.core.schema import TextNode

    from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset, LabelledPairs

    data = config_of(job, services.settings).data
    path = Path(str(data.nodes or data.dataset))
    if not path.is_file():
        raise ServiceError(
            f"the training data of job {job.id!r}, which was deleted after its end",
            "a job whose data is kept, or pasted passages",
            "Paste passages.",
            param="passages",
        )
    if data.nodes is not None:
        with path.open(encoding="utf-8") as file:
            return [TextNode.from_json(line) for line in islice(file, MOST)]
    if data.kind == "pairs":
        pairs = LabelledPairs.from_json(path)
        return nodes_of(dict.fromkeys([*pairs.texts2, *(pairs.texts1 if pairs.symmetric else ())]))
    return nodes_of(EmbeddingQAFinetuneDataset.from_json(path).corpus.values())


def nodes_of(texts: Iterable[str]) -> list[BaseNode]:
    """Texts as nodes, at most `MOST`."""
    from llama_index.core.schema import TextNode

    return [TextNode(id_=f"p{number}", text=text) for number, text in enumerate(islice(texts, MOST))]


class PassageVectors:
    """The vectors of the passages that were searched last, so that the next query over them is answered at once."""

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[ServedModel, str], Vectors] = OrderedDict()

    def of(self, services: Services, model: ServedModel, texts: list[str]) -> Vectors:
        """Vectors of length 1, float32 [texts, dimensions].

        Raises:
            LoraEmbedError: As `Batcher.embed`.
        """
        key = (model, hashlib.sha256(json.dumps(texts).encode()).hexdigest())
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        vectors = unit_norm(services.batcher.submit(model, texts, "passage").result().vectors)
        with self._lock:
            self._kept[key] = vectors
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return vectors
