"""Whether an index holds the vectors of a model: its stamp says so, or some of its texts are embedded again."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.core.errors import ConfigError, WrongIndexError, warn_user
from llama_index_lora_embed.data.stored_vectors import StoredVectors
from llama_index_lora_embed.deployment.index_stamp import IndexStamp, read_index_stamp

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_SAMPLE = 32  # texts that are embedded again
_SAME_MODEL = 0.99
"""Cosine of a stored vector with that of the same text and model. Quantised stores stay above it; all-MiniLM-L6-v2 with
another limit of tokens is below it on long texts, and any other model on all."""


def verify_vectors(target: Any, stored: StoredVectors, embed_model: BaseEmbedding) -> None:
    """Check that the vectors of an index come from this model.

    The stamp decides where there is one (`stamp_index`). Without one, or with that of another class over the same model
    (`HuggingFaceEmbedding` and `LoraEmbedding`), up to 32 of the stored texts, evenly spaced, are embedded again and
    compared with their vectors. A warning is issued where only few of them differ, where the store keeps no texts, and
    where another class stamped it.

    Args:
        target: What `stored` was read from; it may be unable to hold a stamp.
        stored: Its vectors.
        embed_model: The model that they should come from.

    Raises:
        WrongIndexError: The stamp is of another model; or the vectors have another length, or differ from this
            model's.
    """
    own, stamp = IndexStamp.of(embed_model), None
    if not isinstance(target, StoredVectors):
        with suppress(ConfigError):  # the store cannot hold one
            stamp = read_index_stamp(target)
    of_another_class = stamp is not None and stamp.may_be(own)
    if stamp is not None and not of_another_class:
        stamp.check(own)
    name = embed_model.model_name
    if own.dimensions != stored.dimensions:
        raise WrongIndexError(
            f"an index with vectors of {stored.dimensions} dimensions, and {name!r} with {own.dimensions}",
            "the model that built the index",
            "Pass that model, or read another index.",
        )
    if stamp is not None and not of_another_class:
        return
    rows = [row for row, has_text in enumerate(stored.has_text) if has_text]
    if not rows:
        warn_user(f"The store keeps no texts, so that it is not known whether its vectors are those of {name!r}.")
        return
    rows = [rows[int(at)] for at in np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int))]
    again = unit_norm(np.asarray(embed_model.get_text_embedding_batch([stored.texts[row] for row in rows]), np.float32))
    cosines = (again * unit_norm(stored.vectors[rows])).sum(axis=1)
    far = [
        f"{stored.ids[row]!r}: {cosine:.3f}" for row, cosine in zip(rows, cosines, strict=True) if cosine < _SAME_MODEL
    ]
    median = float(np.median(cosines))
    if median < _SAME_MODEL:
        raise WrongIndexError(
            f"an index that was built by another model than {name!r}: of {len(rows)} of its passages that were "
            f"embedded again, {len(far)} have another vector (median cosine {median:.3f})",
            f"vectors of {name!r} (cosine {_SAME_MODEL} or above)",
            "Pass the model that built the index, with its pooling, prompts and limit of tokens. The cosines:",
            far,
        )
    if far:
        warn_user(
            f"{len(far)} of {len(rows)} passages that were embedded again have another vector in the store: they were "
            f"embedded from another text or by another model than {name!r} ({', '.join(far[:3])})."
        )
    if stamp is not None:
        warn_user(
            f"The index was stamped with {stamp.model_class} {stamp}, and its vectors are those of {own.model_class}, "
            "too: stamp_index(index, embed_model, replace=True) records that, so that verify_index takes this model."
        )
