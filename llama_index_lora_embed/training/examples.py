"""Rows for losses that take columns of texts: a question, its passage, negatives, and a label where there is one."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llama_index_lora_embed.core.errors import ConfigError, DatasetError, ModelNotFoundError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.models.base_model import describe_base
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.collator import TrainingGroup


@dataclass
class Example:
    """A question, a passage that answers it, and passages that do not.

    Attributes:
        query_id: The question.
        passage_id: Node of its passage.
        passage: Text of its passage, which can be cut.
        negatives: (node, text), hard negatives first.
    """

    query_id: str
    passage_id: str
    passage: str
    negatives: list[tuple[str, str]]


def make_examples(
    dataset: EmbeddingQAFinetuneDataset,
    groups: list[TrainingGroup],
    false_negatives: FalseNegatives,
    *,
    least: int = 0,
    even: bool = True,
) -> list[Example]:
    """A row for each question and passage that it is trained against.

    Its negatives are the question's hard negatives. Where these are too few, passages of other groups that are no
    false negatives follow, each row beginning to look further on than the row before.

    Args:
        dataset: Checked dataset.
        groups: Its groups.
        false_negatives: Which passages cannot be negatives.
        least: Negatives that a row gets, if there are so many.
        even: Give all rows as many as the row with the most hard negatives has.
    """
    curated = dataset.hard_negatives or {}
    pairs = [(query_id, group) for group in groups for query_id in group.query_ids]
    width = max([least, *(len(curated.get(q, ())) for q, _ in pairs)]) if even else least
    rows: list[Example] = []
    for number, (query_id, group) in enumerate(pairs):
        negatives = [(i, dataset.corpus[i]) for i in curated.get(query_id, ())]
        easy = _others(groups, number, query_id, false_negatives) if len(negatives) < width else iter(())
        there = {text for _, text in negatives}
        while len(negatives) < width and (other := next(easy, None)) is not None:
            if other.passage not in there:
                there.add(other.passage)
                negatives.append((other.passage_id, other.passage))
        rows.append(Example(query_id, group.passage_id, group.passage, negatives))
    return rows


def _others(
    groups: list[TrainingGroup], start: int, query_id: str, false_negatives: FalseNegatives
) -> Iterator[TrainingGroup]:
    for step in range(1, len(groups)):
        group = groups[(start + step) % len(groups)]
        if not false_negatives.excludes(query_id, group.passage_id):
            yield group


def with_negatives(
    dataset: EmbeddingQAFinetuneDataset, rows: list[Example], most: int | None = None
) -> list[dict[str, Any]]:
    """Columns anchor, positive, negative_1, negative_2, ...: as many of the last as every row has.

    Args:
        dataset: Has the questions' texts.
        rows: What `make_examples` made.
        most: Negative columns at most.
    """
    width = min((len(row.negatives) for row in rows), default=0)
    width = width if most is None else min(width, most)
    return [
        {
            "anchor": dataset.queries[row.query_id],
            "positive": row.passage,
            **{f"negative_{n}": text for n, (_, text) in enumerate(row.negatives[:width], 1)},
        }
        for row in rows
    ]


def need_negatives(rows: Sequence[Example]) -> None:
    """Check that every row has a negative.

    Raises:
        DatasetError: Some have none; the questions are named.
    """
    if without := sorted({row.query_id for row in rows if not row.negatives}):
        raise DatasetError(
            f"{len(without)} question(s) without any passage that could be a negative",
            "passages of other documents, or that stand further away in the same",
            "Add passages, give these questions hard_negatives, or lower sibling_window:",
            without,
        )


def graded_examples(dataset: EmbeddingQAFinetuneDataset, rows: list[Example]) -> list[dict[str, Any]]:
    """Columns anchor, positive, label: each row's passage with its relevance, each of its negatives with 0."""
    pairs: list[dict[str, Any]] = []
    for row in rows:
        question = dataset.queries[row.query_id]
        score = float(dataset.score(row.query_id, row.passage_id))
        pairs.append({"anchor": question, "positive": row.passage, "label": score})
        pairs += [{"anchor": question, "positive": text, "label": 0.0} for _, text in row.negatives]
    return pairs


def teacher_scores(
    teacher: str, rows: list[dict[str, Any]], device: torch.device, trust_remote_code: bool
) -> list[list[float]]:
    """Scores of a cross-encoder, before any sigmoid, for each row's positive and negatives.

    The model is loaded for this and freed again. It sees texts without prompts.

    Args:
        teacher: Folder or id on the Hub.
        rows: What `with_negatives` made.
        device: Where to compute.
        trust_remote_code: Run code that the model brings along.

    Raises:
        ModelNotFoundError: There is no model, or it does not load.
        UnsafeCheckpointError: Its weights are a pickle only.
        ConfigError: It is no cross-encoder with one score, or its scores are not finite.
    """
    from safetensors import SafetensorError
    from sentence_transformers import CrossEncoder

    expected = "a cross-encoder with one score, such as cross-encoder/ms-marco-MiniLM-L6-v2"
    hint = "Pass the folder or the id of one as teacher=."
    base = describe_base(teacher)
    config_file = base.path / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    kinds = config.get("architectures") or []
    # sentence-transformers would put a head of random weights on any other model
    if config_file.exists() and not any("SequenceClassification" in kind for kind in kinds):
        raise ConfigError(f"teacher={teacher!r}, which is a {', '.join(kinds) or 'model'}", expected, hint)
    try:
        model = CrossEncoder(
            str(base.path),
            device=str(device),
            trust_remote_code=trust_remote_code,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"teacher={teacher!r}, which does not load ({type(error).__name__}: {error})", expected, hint
        ) from error
    if model.num_labels != 1:
        raise ConfigError(f"teacher={teacher!r} with {model.num_labels} scores", expected, hint)
    columns = [name for name in rows[0] if name != "anchor"]
    pairs = list(dict.fromkeys((row["anchor"], row[name]) for row in rows for name in columns))
    scores = np.asarray(
        model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False),
        dtype=np.float32,
    ).reshape(len(pairs))
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not np.isfinite(scores).all():
        raise ConfigError(f"teacher={teacher!r}, whose scores are NaN or infinite", "finite scores", hint)
    of_pair = dict(zip(pairs, scores.tolist(), strict=True))
    return [[of_pair[row["anchor"], row[name]] for name in columns] for row in rows]
