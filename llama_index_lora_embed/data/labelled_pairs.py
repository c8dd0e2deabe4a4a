"""Labelled pairs: two texts, and how similar they are or whether the second answers the first.

Labels are 0 or 1, or graded between them. Unlike in query logs (`readers.query_logs`), a row that cannot be used is an
error and not left out: metrics over fewer pairs than the file has would pass for metrics over all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from llama_index_lora_embed.core.errors import DatasetError, SplitError, warn_user
from llama_index_lora_embed.core.files import write_json
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.grouping import check_fraction, draw_groups, groups_sharing
from llama_index_lora_embed.data.readers.files import Entry, PairsReport, number, numbered, path_entries
from llama_index_lora_embed.data.readers.labelled import (
    Columns,
    Scale,
    faults,
    read_rows,
    refuse_classes,
    scale_hint,
)
from llama_index_lora_embed.data.text import normalise

logger = logging.getLogger(__name__)

_STRATA = 5  # of graded labels in a split
_CONTRADICTION = 0.5  # half of the scale; annotators differ by less


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of texts with labels.

    Attributes:
        texts1: First text of each pair.
        texts2: Second text of each pair.
        scores: Label of each pair, from 0 to 1. True, "1", "yes" and NumPy's numbers become floats; what is not a
            number stays as it is, and `check` names it.
        source: What they were read from; None if not known. `digest` and == ignore it.
        symmetric: True embeds both texts as passages (`get_text_embedding`), False the first as a query.

    Raises:
        DatasetError: A field is not a list, or `symmetric` is neither True nor False.
    """

    kind: ClassVar[Literal["pairs"]] = "pairs"
    texts1: list[str] = field(repr=False)
    texts2: list[str] = field(repr=False)
    scores: list[float] = field(repr=False)
    source: str | None = field(default=None, compare=False)
    symmetric: bool = True

    def __post_init__(self) -> None:
        for name in ("texts1", "texts2", "scores"):
            values = getattr(self, name)
            if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
                raise DatasetError(f"{name}={values!r:.80}", "a list", "Pass one value for each pair.")
            object.__setattr__(self, name, [number(value) if name == "scores" else value for value in values])
        if self.symmetric not in (True, False):
            hint = "False if the first texts are queries."
            raise DatasetError(f"symmetric={self.symmetric!r:.80}", "True or False", hint)
        object.__setattr__(self, "symmetric", bool(self.symmetric))

    def __len__(self) -> int:
        return len(self.texts1)

    def __str__(self) -> str:
        kinds = f"{self.positives} labelled 1, {len(self) - self.positives} labelled 0" if self.binary else "graded"
        roles = "both texts passages" if self.symmetric else "a query and a passage"
        return f"{len(self)} pairs ({kinds}; {roles})" + (f" from {self.source}" if self.source else "")

    @property
    def binary(self) -> bool:
        """Whether every label is exactly 0 or 1."""
        return all(score in (0, 1) for score in self.scores)

    @property
    def positives(self) -> int:
        """Number of pairs labelled exactly 1."""
        return sum(score == 1 for score in self.scores)

    @classmethod
    def coerce(cls, value: Any, name: str = "pairs") -> LabelledPairs:
        """This class from itself, its fields, a path, or what `from_rows` takes; errors call it `name`.

        Raises:
            ConfigError: A column is missing, or the file has another ending.
            DatasetError: It is none of these, or has a row that is not a labelled pair.
        """
        if isinstance(value, cls):
            return value
        is_path = isinstance(value, (str, os.PathLike))
        if saved := _saved(value) if is_path else _own_fields(value):
            return cls(**saved)
        return cls.from_file(value) if is_path else replace(cls.from_rows(value, source=name), source=None)

    @classmethod
    def from_rows(
        cls,
        rows: Any,
        *,
        columns: Columns = None,
        scale: Scale = None,
        symmetric: bool | None = None,
        source: str | None = None,
    ) -> LabelledPairs:
        """Take pairs from tuples, from mappings, from a pandas DataFrame or from a Hugging Face dataset.

        Args:
            rows: Iterable of (text, text, label), mappings or sentence-transformers' InputExamples.
            columns: Keys that are not recognised: {"text1": ..., "text2": ..., "score": ...}, as far as needed; or all
                three in a tuple: first text (the query), second text (the passage), label.
            scale: Lowest and highest possible label, such as (0, 5) for STS; None is (0, 1).
            symmetric: See the class. None means False where the columns are named as a query and a passage
                (question and answer, ...), True otherwise.
            source: Name for messages.

        Raises:
            ConfigError: A column is missing, or `scale` is invalid.
            DatasetError: There is no row; rows are not labelled pairs, of which every one is named; a dict of splits
                is not one of them; or a Hugging Face dataset's labels are classes such as entailment, whose numbers
                are not degrees of similarity (RTE and QNLI give 0 to the pairs that belong together).
        """
        not_rows = (str, bytes, Mapping, EmbeddingQAFinetuneDataset)
        if isinstance(rows, not_rows) or not isinstance(rows, Iterable):
            keys = f" with the keys {', '.join(map(repr, rows))}" if isinstance(rows, Mapping) else ""
            raise DatasetError(
                f"{source or 'rows'} of type {type(rows).__name__}{keys}",
                "a list of (text, text, label), a DataFrame or a datasets.Dataset",
                "From a dict of datasets, pass one split: dataset['train']; LabelledPairs.from_file(path) reads files.",
            )
        refuse_classes(rows, columns)
        return cls._read(numbered(rows), columns, scale, symmetric, source)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        columns: Columns = None,
        scale: Scale = None,
        symmetric: bool | None = None,
    ) -> LabelledPairs:
        """Read pairs from a .parquet, .csv, .tsv, .jsonl or .json file (UTF-8; the latter four also with .gz after it).

        The first line of a table names its columns. Arguments and errors are those of `from_rows`.

        Raises:
            ConfigError: Also if the file has another ending.
            DatasetError: Also if the file does not exist or has lines that cannot be read; every one is named.
        """
        if not os.path.isfile(path) or _saved(path) is not None:
            got = f"{os.fspath(path)!r}, which {'save_json wrote' if os.path.isfile(path) else 'is not a file'}"
            hint = "Check the path; LabelledPairs.from_json(path) reads what save_json wrote."
            raise DatasetError(got, "a table, or JSON with one pair in each line", hint)
        report = PairsReport()
        entries = list(path_entries(Path(path), "", report))
        if report.skipped:
            got = f"{os.fspath(path)!r} with {report.skipped.total()} places that cannot be read"
            raise DatasetError(got, "a complete file", "Correct these:", report.places)
        return cls._read(entries, columns, scale, symmetric, Path(path).name)

    @classmethod
    def _read(
        cls, entries: Iterable[Entry], columns: Columns, scale: Scale, symmetric: bool | None, source: str | None
    ) -> LabelledPairs:
        texts1, texts2, scores, roles = read_rows(entries, columns, scale, source)
        return cls(texts1, texts2, scores, source, not roles if symmetric is None else symmetric)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> LabelledPairs:
        """Read what `save_json` wrote.

        Raises:
            DatasetError: The file does not exist, is not JSON, or has other content.
        """
        if (saved := _saved(path)) is None:
            raise DatasetError(
                f"{os.fspath(path)!r}, which does not exist or has other content",
                "the JSON file of labelled pairs",
                "Write one with pairs.save_json(path); LabelledPairs.from_file(path) reads tables and JSON lines.",
            )
        return cls(**saved)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the pairs; a reader sees the old file or the new one, never half of it.

        Raises:
            DatasetError: A text or a label is invalid, so that it could not be read again.
        """
        if problems := faults(self.texts1, self.texts2, self.scores, (0.0, 1.0), "pair {}".format):
            raise DatasetError(f"pairs with {len(problems)} problem(s)", "texts and labels", "Correct these:", problems)
        write_json(path, vars(self))

    def digest(self) -> str:
        """SHA-256 (hex) over texts, labels, their order and `symmetric`; `source` is left out."""
        text = json.dumps([self.texts1, self.texts2, self.scores, self.symmetric], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def order_digest(self) -> str:
        """The same as `digest`, which depends on the order already."""
        return self.digest()

    def summary(self) -> dict[str, Any]:
        """What an adapter's manifest records of its training set."""
        return {"digest": self.digest(), "pairs": len(self), "binary": self.binary, "symmetric": self.symmetric}

    def problems(self) -> list[str]:
        """One line for each problem that would crash or spoil training or evaluation; pairs are counted from 0."""
        lengths = {name: len(getattr(self, name)) for name in ("texts1", "texts2", "scores")}
        found = faults(self.texts1, self.texts2, self.scores, (0.0, 1.0), "pair {}".format)
        if len(set(lengths.values())) > 1:
            found.insert(0, f"lengths differ: {', '.join(f'{count} {name}' for name, count in lengths.items())}")
        if found:
            return found
        if len(set(self.scores)) == 1:
            found.append(f"every label is {self.scores[0]:g}, so that there is nothing to learn")
        # case counts here: "polish" and "Polish" differ
        alike: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, pair in enumerate(zip(self.texts1, self.texts2, strict=True)):
            key = [" ".join(text.split()) for text in pair]
            alike[tuple(sorted(key) if self.symmetric else key)].append(index)
        for places in alike.values():
            labels = [self.scores[i] for i in places]
            if max(labels) - min(labels) > _CONTRADICTION:
                shown = ", ".join(f"{i} ({self.scores[i]:g})" for i in places)
                text = self.texts1[places[0]]
                found.append(f"pairs {shown} are the same, but their labels contradict each other: {text!r:.80}")
        return found

    def check(self, name: str = "pairs") -> LabelledPairs:
        """These pairs, if there are any and they have no `problems()`; errors call them `name`.

        Raises:
            DatasetError: There are no pairs; a text is invalid or empty; a label is invalid or outside 0 to 1; all
                labels are equal; or a pair occurs with labels more than half of the scale apart. `.problems` lists
                all of them.
        """
        if not (self.texts1 or self.texts2 or self.scores):
            raise DatasetError(f"{name} without a single pair", "pairs with different labels", "Check their source.")
        if problems := self.problems():
            raise DatasetError(
                f"{name} with {len(problems)} problem(s)",
                "pairs of two texts with labels from 0 to 1, not all of them the same",
                f"{scale_hint(self.scores, (0.0, 1.0))}Correct or remove these:",
                problems,
            )
        return self

    def overlap(self, other: LabelledPairs) -> list[int]:
        """Indices of the pairs that `other` has, too, in either order and ignoring case and spaces."""
        known = {frozenset(map(normalise, pair)) for pair in zip(other.texts1, other.texts2, strict=True)}
        pairs = zip(self.texts1, self.texts2, strict=True)
        return [index for index, pair in enumerate(pairs) if frozenset(map(normalise, pair)) in known]

    def shared_texts(self, other: LabelledPairs) -> list[int]:
        """Indices of the pairs with a text that `other` has in any pair, ignoring case and spaces."""
        known = {normalise(text) for text in (*other.texts1, *other.texts2)}
        pairs = zip(self.texts1, self.texts2, strict=True)
        return [index for index, pair in enumerate(pairs) if not known.isdisjoint(map(normalise, pair))]

    def subset(self, indices: Iterable[int]) -> LabelledPairs:
        """The pairs at these indices, in this order."""
        kept = list(indices)
        texts1, texts2 = [self.texts1[i] for i in kept], [self.texts2[i] for i in kept]
        return LabelledPairs(texts1, texts2, [self.scores[i] for i in kept], self.source, self.symmetric)

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[LabelledPairs, LabelledPairs]:
        """Split into training and validation so that texts which belong together are on one side.

        Pairs labelled above 0 that share a text (ignoring case and spaces), directly or through others, stay together.
        A pair labelled 0 goes with its first text. Its second text, such as a passage that was drawn as a random
        negative, may be on both sides, because it would tie all pairs together otherwise: `val.shared_texts(train)`
        finds these pairs, their number is logged, and the verdict of a run names it.

        Groups are drawn in a random order, and one is held out if that brings the number of held-out pairs of each
        label (of each fifth of them, if they are graded) nearer to its share, so that labels keep their proportions as
        far as the groups allow. Warns (UserWarning) where the share held out is less than half or more than twice of
        `fraction`.

        Args:
            fraction: Share of the pairs to hold out, above 0 and below 1.
            seed: Random seed of the order in which groups are drawn; both sides are in the order of the pairs.

        Raises:
            ConfigError: `fraction` is not between 0 and 1.
            DatasetError: See `check`.
            SplitError: All pairs are tied together, or a side would have one label only.
        """
        check_fraction(fraction, "fraction")
        self.check("pairs to split")
        texts = [(normalise(a), normalise(b)) for a, b in zip(self.texts1, self.texts2, strict=True)]
        ties = [pair if score > 0 else pair[:1] for pair, score in zip(texts, self.scores, strict=True)]
        # equal pairs stay together in either order; normalised texts hold no line break
        groups = groups_sharing((*tied, "\n".join(sorted(pair))) for tied, pair in zip(ties, texts, strict=True))
        random.Random(seed).shuffle(groups)
        strata = [int(score) for score in self.scores]
        if not self.binary:
            parts = min(_STRATA, max(2, int(fraction * len(self) / 2)))  # so that two of each can be held out
            for rank, index in enumerate(sorted(range(len(self)), key=self.scores.__getitem__)):
                strata[index] = rank * parts // len(self)
        held = draw_groups(groups, strata, fraction) if len(groups) > 1 else set()
        train, val = (self.subset(i for i in range(len(self)) if (i in held) is side) for side in (False, True))
        if min(len(set(train.scores)), len(set(val.scores))) < 2:
            text, count = Counter(text for tied in ties for text in {*tied}).most_common(1)[0]
            raise SplitError(
                f"{len(self)} pairs in {len(groups)} group(s) without a common text, too few for every label twice",
                "groups of pairs without a common text (second texts of pairs labelled 0 aside), with different labels "
                "for training and for validation",
                "Add pairs of other texts, pass validation pairs of your own, or leave out pairs that tie others "
                f"together: {text!r:.60} ties {count} of them.",
            )
        if not 0.5 <= len(val) / max(2, fraction * len(self)) <= 2:
            warn_user(
                f"{len(val)} of {len(self)} pairs are held out for a fraction of {fraction:g}, because pairs that "
                f"share a text stay together, up to {max(map(len, groups))}. You can pass validation pairs of your own."
            )
        if shared := len(val.shared_texts(train)):
            logger.info(
                "%d of %d held-out pairs have a text in a training pair; one of both is labelled 0", shared, len(val)
            )
        return train, val


def _saved(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The fields that `save_json` wrote; None for other content."""
    with suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as file:
        if file.read(1) == "{":  # tables are not read twice
            return _own_fields(json.loads("{" + file.read()))
    return None


def _own_fields(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Mapping) or not {"texts1", "texts2", "scores"} <= value.keys():
        return None
    return {item.name: value[item.name] for item in fields(LabelledPairs) if item.name in value}
