"""The teacher of a distillation: it scores queries with passages once, and a file keeps its scores."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from llama_index_lora_embed.core.errors import ConfigError, warn_user
from llama_index_lora_embed.core.files import append_json_line, read_json_lines
from llama_index_lora_embed.models.base_model import describe_base
from llama_index_lora_embed.models.cross_encoder import check_cross_encoder, load_cross_encoder, weights_digest
from llama_index_lora_embed.training import distributed

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

Pair: TypeAlias = tuple[str, str]
"""A query and a passage."""

logger = logging.getLogger(__name__)
_PART = 1024  # pairs scored between two writes; a killed run loses no more


class Teacher:
    """A cross-encoder, or a function of (query, passage) pairs, with the file of its scores.

    A score belongs to the teacher's weights, a query and a passage: whatever run needs it again finds it in the file.
    What a function computes cannot be seen: its scores are found by its name, and only by a run that resumes.

    Args:
        source: Folder or Hub id of a cross-encoder, a `CrossEncoder`, or a function that returns a number for each
            pair of a list.
        file: JSON lines, each with the scores of some pairs.
        resume: Whether this run continues another.
        cache_folder: Of huggingface_hub.
        trust_remote_code: As in `TrainingSettings`.
        show_progress: Show a progress bar.

    Attributes:
        name: For messages and the manifest, without the path of a folder.

    Raises:
        ModelNotFoundError: There is no such model.
        UnsafeCheckpointError: Its weights are stored as a pickle only.
        ConfigError: It is no cross-encoder with one score.
    """

    def __init__(
        self,
        source: str | CrossEncoder | Callable[[list[Pair]], Any],
        file: Path,
        *,
        resume: bool = False,
        cache_folder: str | None = None,
        trust_remote_code: bool = False,
        show_progress: bool = False,
    ) -> None:
        from sentence_transformers import CrossEncoder

        self.source = source
        self.file = file
        self.trust_remote_code = trust_remote_code
        self.show_progress = show_progress
        self.base = describe_base(source, cache_folder=cache_folder) if isinstance(source, str) else None
        self.reuse = True
        if self.base is not None:
            check_cross_encoder(self.base.path, str(source))
            self.name = self.base.model_id if self.base.revision else self.base.path.name
            self.identity = self.base.weights_sha256
        elif isinstance(source, CrossEncoder):
            self.name, self.identity = type(source).__name__, weights_digest(source)
        else:
            self.name = getattr(source, "__qualname__", type(source).__qualname__)
            self.identity, self.reuse = self.name, resume
        self._known: dict[str, float] | None = None

    def scores(self, pairs: Sequence[Pair], device: torch.device) -> list[float]:
        """The teacher's score of each pair, logits where it is a cross-encoder; computed where the file has none.

        Several processes get those of the main process.

        Raises:
            ModelNotFoundError: The model does not load.
            ConfigError: The teacher returns something other than a finite number for each pair.
        """
        return distributed.on_main(lambda: self._scores(pairs, device))

    def _scores(self, pairs: Sequence[Pair], device: torch.device) -> list[float]:
        if self._known is None:
            self._known = self._read()
        known, keys = self._known, {pair: _key(pair) for pair in pairs}
        missing = [pair for pair, key in keys.items() if key not in known]
        logger.info("%d of %d pairs of query and passage are scored by %s", len(missing), len(keys), self.name)
        if missing:
            self._add(missing, keys, known, device)
            gc.collect()  # a model that was loaded is freed before training
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return [known[keys[pair]] for pair in pairs]

    def _add(self, pairs: list[Pair], keys: dict[Pair, str], known: dict[str, float], device: torch.device) -> None:
        score = self._scorer(device)
        for start in range(0, len(pairs), _PART):
            part = pairs[start : start + _PART]
            found = dict(zip((keys[pair] for pair in part), self._numbers(score(part), part), strict=True))
            known.update(found)
            self._keep(found)

    def _read(self) -> dict[str, float]:
        if not self.file.exists():
            return {}
        if not self.reuse:
            self.file.unlink()
            return {}
        entries = [entry for entry in read_json_lines(self.file) if entry.get("teacher") == self.identity]
        return {key: score for entry in entries for key, score in entry["scores"].items()}

    def _keep(self, found: dict[str, float]) -> None:
        try:
            append_json_line(self.file, {"teacher": self.identity, "scores": found})
        except OSError as error:
            warn_user(
                f"The teacher's scores could not be written to {str(self.file)!r} ({error}). Training goes on; a run "
                "that resumes will compute them again."
            )

    def _scorer(self, device: torch.device) -> Callable[[list[Pair]], Any]:
        """The teacher as a function of pairs; a model by name is loaded."""
        from sentence_transformers import CrossEncoder

        if self.base is not None:
            model = load_cross_encoder(self.base, str(device), self.trust_remote_code)
        elif isinstance(self.source, CrossEncoder):
            model = self.source
        else:
            return self.source  # type: ignore[return-value]  # a path has a base
        # logits, because a sigmoid makes the best passages alike
        return partial(model.predict, activation_fn=torch.nn.Identity(), show_progress_bar=self.show_progress)

    def _numbers(self, values: Any, pairs: list[Pair]) -> list[float]:
        expected = f"a finite number for each of {len(pairs)} pairs"
        hint = "Pass a cross-encoder with one score, or a function that returns a list of numbers."
        try:
            array = np.asarray(values.tolist() if hasattr(values, "tolist") else list(values), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"teacher {self.name}, which returned {values!r:.80} ({error})", expected, hint
            ) from error
        if array.shape != (len(pairs),):
            raise ConfigError(f"teacher {self.name}, which returned an array of shape {array.shape}", expected, hint)
        if wrong := np.flatnonzero(~np.isfinite(array)).tolist():
            query, passage = pairs[wrong[0]]
            raise ConfigError(
                f"teacher {self.name}, which returned NaN or infinity for {len(wrong)} of them, first for "
                f"{query!r:.80} and {passage!r:.80}",
                expected,
                hint,
            )
        numbers: list[float] = array.tolist()
        return numbers


def scores_file(model_output_path: str | os.PathLike[str]) -> Path:
    """Where a run keeps its teacher's scores: beside the output."""
    return Path(f"{os.path.abspath(os.path.expanduser(model_output_path))}.teacher.jsonl")


def _key(pair: Pair) -> str:
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:32]
