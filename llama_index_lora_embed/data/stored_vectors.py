"""Passages with the vectors that an index holds of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from llama_index.core.schema import BaseNode, MetadataMode
from numpy.typing import NDArray

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset

COSINE = "cosine"
FloatArray = NDArray[np.float32]
_SAME_NORM = 1e-3  # relative; vectors of length 1 differ by less, in float16, too


@dataclass(frozen=True, eq=False)
class StoredVectors:
    """What an index holds. `read_vectors` makes it; for a store that it does not know, make it yourself.

    Attributes:
        nodes: The passages, with all that the store keeps of them. Their text is empty where it keeps none.
        vectors: float32 [nodes, dimensions], of any norm but 0.
        metric: What the store ranks by: "cosine", or the store's own name for it.

    Raises:
        DatasetError: There are no vectors; some are zero or not finite, or their number is not that of the nodes; or
            two nodes have one id.
    """

    nodes: Sequence[BaseNode]
    vectors: FloatArray
    metric: str = COSINE

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.nodes):
            raise DatasetError(
                f"vectors of shape {self.vectors.shape} for {len(self.nodes)} nodes",
                "a vector for each node, [nodes, dimensions]",
                "StoredVectors(nodes, vectors)",
            )
        if not len(self.nodes):
            raise DatasetError(
                "a vector store without vectors",
                "one that holds the vectors of an index",
                "Check its name or folder, or build the index first.",
            )
        if repeated := [node_id for node_id, count in Counter(self.ids).items() if count > 1]:
            raise DatasetError(
                f"{len(repeated)} ids with several vectors each", "one vector for each id", "Remove these:", repeated
            )
        norms = np.linalg.norm(self.vectors, axis=1)
        problems = [
            f"{node_id!r}: {'the zero vector' if norm == 0 else 'NaN or infinity'}"
            for node_id, norm in zip(self.ids, norms, strict=True)
            if norm == 0 or not np.isfinite(norm)
        ]
        if problems:
            raise DatasetError(
                f"{len(problems)} of {len(self)} stored vectors that no query can be compared with",
                "finite vectors that are not zero",
                "Embed these nodes again, or delete them from the store:",
                problems,
            )

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the nodes, which a retriever returns."""
        return [node.node_id for node in self.nodes]

    @cached_property
    def texts(self) -> list[str]:
        """Texts as indexing embedded them (`MetadataMode.EMBED`).

        Where the store keeps no text, the digest of the id stands for it, which is like no other text.
        """
        digests = (hashlib.sha256(node_id.encode()).hexdigest() for node_id in self.ids)
        return [text if text.strip() else digest for text, digest in zip(self._embedded, digests, strict=True)]

    @cached_property
    def has_text(self) -> list[bool]:
        """Whether the store keeps the text of each passage."""
        return [bool(text.strip()) for text in self._embedded]

    @cached_property
    def _embedded(self) -> list[str]:
        return [node.get_content(metadata_mode=MetadataMode.EMBED) for node in self.nodes]

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return int(self.vectors.shape[1])

    @property
    def norms_differ(self) -> bool:
        """Whether the vectors have different norms, so that cosine similarity ranks them unlike other metrics."""
        norms = np.linalg.norm(self.vectors, axis=1)
        return bool(norms.max() - norms.min() > _SAME_NORM * norms.max())

    def by_text(self, *datasets: EmbeddingQAFinetuneDataset) -> dict[str, FloatArray]:
        """The vectors by the texts that datasets have under the ids of the store; of equal texts the last one's."""
        rows = {node_id: row for row, node_id in enumerate(self.ids)}
        return {text: self.vectors[rows[i]] for data in datasets for i, text in data.corpus.items()}

    def digest(self) -> str:
        """SHA-256 (hex) of ids and vectors."""
        digest = hashlib.sha256("\0".join(self.ids).encode())
        digest.update(np.ascontiguousarray(self.vectors).data)
        return digest.hexdigest()

    def corpus_for(self, dataset: EmbeddingQAFinetuneDataset, name: str = "dataset") -> EmbeddingQAFinetuneDataset:
        """The dataset over all passages of the store, whatever its own corpus says of them.

        Args:
            dataset: Its passage ids are ids of the store's nodes.
            name: For messages.

        Raises:
            DatasetError: The store does not have some of its passages.
        """
        known = set(self.ids)
        if missing := [i for i in dataset.corpus if i not in known]:
            raise DatasetError(
                f"{len(missing)} of {len(dataset.corpus)} passages of the {name} that are not among the {len(self)} of "
                f"the store (e.g. {missing[0]!r}; the store has e.g. {self.ids[0]!r})",
                "passages whose ids are those of the store's nodes",
                "Make the dataset from the nodes of the index, or take these passages out "
                "(dataset.subset(queries, passages)):",
                missing,
            )
        given = dataset.corpus
        pairs = zip(self.ids, self.texts, self.has_text, strict=True)
        sources = {node.node_id: node.ref_doc_id or dataset.source_of(node.node_id) for node in self.nodes}
        return dataset.model_copy(
            update={
                "corpus": {i: text if has_text else given.get(i, text) for i, text, has_text in pairs},
                "source_documents": sources if any(i != source for i, source in sources.items()) else None,
            }
        )
