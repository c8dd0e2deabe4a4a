"""What is trained: rows, collator and loss for the trainer, by objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor

from llama_index_lora_embed.config import FOR_PAIRS, IN_BATCH, MiningSettings, ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.models.windows import window_of
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.efficiency.gradcache import refuse_checkpointing
from llama_index_lora_embed.training.examples import (
    graded_examples,
    make_examples,
    need_negatives,
    teacher_scores,
    with_negatives,
)
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.collator import (
    ExampleBatchSampler,
    ExampleTraits,
    GroupBatchSampler,
    GroupCollator,
    TrainingGroup,
)
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss

_LOSS_EXPECTED = (
    "a sentence-transformers loss, or a callable that makes one from the model",
    "Pass the class: loss=losses.MultipleNegativesRankingLoss.",
)


@dataclass(frozen=True)
class TrainingPlan:
    """What an objective needs.

    Attributes:
        inputs: train_dataset, loss and perhaps data_collator, for the trainer.
        arguments: batch_sampler and prompts, for its `SentenceTransformerTrainingArguments`.
        divisible: Whether steps can be computed in pieces.
    """

    inputs: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    divisible: bool = False

    def in_pieces(self, size: int) -> None:
        """Compute steps in pieces of so many texts (GradCache); only where the plan is `divisible`."""
        self.inputs["data_collator"].mini_batch_size = size
        self.inputs["loss"].cached = True


def training_plan(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset | LabelledPairs,
    groups: list[TrainingGroup],
    loss: Any,
    settings: TrainingSettings,
    objective: ObjectiveSettings | None = None,
    *,
    near_duplicates: Mapping[str, str] | None = None,
    gradient_checkpointing: bool = False,
) -> TrainingPlan:
    """Rows, collator, loss, prompts and order of an objective.

    Args:
        model: Has its LoRA.
        dataset: Checked.
        groups: `make_groups(dataset, ...)`; none for labelled pairs.
        loss: None for the objective's; else a sentence-transformers loss, or a callable that makes one from the model,
            which gets columns of texts. Then only the masks of `objective` count.
        settings: Checked.
        objective: None for the default.
        near_duplicates: Passage id to the id that passages with nearly its text share; None finds them where the
            objective needs them.
        gradient_checkpointing: Whether the trainer will be told to.

    Raises:
        ConfigError: Settings that cannot be used, with each other or with this model or data.
        DatasetError: There is nothing to be told from an answer.
        ModelNotFoundError: The teacher is not there.
        UnsafeCheckpointError: The teacher's weights are a pickle only.
    """
    objective = (objective or ObjectiveSettings()).checked()
    refuse_checkpointing(gradient_checkpointing and isinstance(objective.mini_batch_size, int))
    pairs = isinstance(dataset, LabelledPairs)
    if misfits := objective.misfits(pairs=pairs, own_loss=loss is not None):
        raise ConfigError(f"{len(misfits)} thing(s) that do not go together", "those named", "Correct them:", misfits)
    if loss is not None:
        loss = _checked_loss(loss, window_of(model) is not None)
    name = objective.name_for(pairs)
    if isinstance(dataset, LabelledPairs):
        return _pairs_plan(model, dataset, _pair_loss(name, settings) if loss is None else loss)
    false_negatives = _false_negatives(dataset, groups, objective, near_duplicates)
    if loss is not None:
        rows = make_examples(dataset, groups, false_negatives)
        texts = with_negatives(dataset, rows)
        width = len(texts[0]) - 2
        in_batch = [(row.query_id, [row.passage_id, *(i for i, _ in row.negatives[:width])]) for row in rows]
        return _rows_plan(model, texts, loss, ExampleTraits.of(in_batch, false_negatives))
    if name in IN_BATCH:
        return _groups_plan(
            model, dataset, groups, settings, objective, false_negatives, divisible=not gradient_checkpointing
        )
    if name in FOR_PAIRS:
        rows = make_examples(dataset, groups, false_negatives, least=1, even=False)
        need_negatives(rows)
        return _rows_plan(model, graded_examples(dataset, rows), _pair_loss(name, settings))
    # distillation compares a list of passages; as many as mining would find
    rows = make_examples(
        dataset, groups, false_negatives, least=MiningSettings().num_negatives if name != "triplet" else 1
    )
    need_negatives(rows)
    if name == "triplet":
        texts = with_negatives(dataset, rows, most=1)  # the first hard negative is the hardest
        margin = objective.triplet_margin
        return _rows_plan(model, texts, partial(losses.TripletLoss, distance_metric=TripletDistanceMetric.COSINE,
                                                triplet_margin=margin))  # fmt: skip
    texts = with_negatives(dataset, rows)
    assert objective.teacher is not None, "checked above"
    scores = teacher_scores(objective.teacher, texts, model.device, settings.trust_remote_code)
    texts = [{**row, "label": of_row} for row, of_row in zip(texts, scores, strict=True)]
    return _rows_plan(model, texts, partial(losses.DistillKLDivLoss, similarity_fct=_Similarity(settings.temperature)))


class _Similarity:
    """Cosine similarity over a temperature, so that the softmax of the student is that of the other objectives.

    Margins (MarginMSELoss) would ask cosines to differ by as much as a teacher's scores, which have no bounds.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        return pairwise_cos_sim(left.float(), right.float()) / self.temperature


def _groups_plan(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset,
    groups: list[TrainingGroup],
    settings: TrainingSettings,
    objective: ObjectiveSettings,
    false_negatives: FalseNegatives,
    divisible: bool,
) -> TrainingPlan:
    width = model.get_embedding_dimension()
    if width is not None and (wide := [d for d in objective.matryoshka_dims or () if d > width]):
        raise ConfigError(
            f"matryoshka_dims with {', '.join(map(str, wide))}",
            f"at most {width}, which is how many dimensions this model's vectors have",
            "Leave larger ones out.",
        )
    _need_any_negative(dataset, groups, false_negatives)
    pieces = objective.mini_batch_size
    collator = GroupCollator(
        model,
        dataset,
        groups,
        false_negatives,
        soft=objective.name == "soft_labels",
        mini_batch_size=None if pieces == "auto" else pieces,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    loss = MaskedInfoNCELoss(
        model,
        settings.temperature,
        cached=divisible and model.device.type == "cpu" if pieces == "auto" else pieces is not None,
        guide_margin=objective.guide_margin if objective.guide else None,
        dims=objective.matryoshka_dims or (),
    )
    rows = Dataset.from_dict({"group": list(range(len(groups)))})
    return TrainingPlan(
        {"train_dataset": rows, "data_collator": collator, "loss": loss},
        {"batch_sampler": GroupBatchSampler, "prompts": None},
        divisible,
    )


def _rows_plan(
    model: SentenceTransformer, rows: list[dict[str, Any]], loss: Any, traits: ExampleTraits | None = None
) -> TrainingPlan:
    return TrainingPlan(
        {"train_dataset": Dataset.from_list(rows), "loss": loss},
        {"batch_sampler": partial(ExampleBatchSampler, traits=traits), "prompts": column_prompts(model, rows[0])},
    )


def _pairs_plan(model: SentenceTransformer, pairs: LabelledPairs, loss: Any) -> TrainingPlan:
    rows = Dataset.from_dict({"text1": pairs.texts1, "text2": pairs.texts2, "label": [float(s) for s in pairs.scores]})
    query, passage = model.prompts.get("query") or "", model.prompts.get("document") or ""
    return TrainingPlan(
        {"train_dataset": rows, "loss": loss},
        {
            "batch_sampler": ExampleBatchSampler,
            "prompts": {"text1": passage if pairs.symmetric else query, "text2": passage},
        },
    )


def _pair_loss(name: str, settings: TrainingSettings) -> Callable[[SentenceTransformer], torch.nn.Module]:
    if name == "cosent":
        return partial(losses.CoSENTLoss, scale=1 / settings.temperature)
    return losses.CosineSimilarityLoss


def _checked_loss(loss: Any, windows: bool) -> Any:
    """A loss of the user's own, if it is one; what makes it from the model is watched until it has.

    Raises:
        ConfigError: It is no loss of sentence-transformers, now or when it is made, or not one for windows.
    """
    if isinstance(loss, torch.nn.Module):
        if not hasattr(loss, "model"):
            raise ConfigError(f"loss of type {type(loss).__name__} without .model", *_LOSS_EXPECTED)
        return _without_windows(loss) if windows else loss

    def make(model: SentenceTransformer) -> torch.nn.Module:
        made = loss(model)
        if not isinstance(made, torch.nn.Module):
            name = getattr(loss, "__qualname__", type(loss).__qualname__)
            raise ConfigError(f"loss={name}, which makes a {type(made).__name__} from the model", *_LOSS_EXPECTED)
        return _without_windows(made) if windows else made

    return make


def _without_windows(loss: torch.nn.Module) -> torch.nn.Module:
    """The loss, unless it cuts a batch into pieces itself, or gives it to another model: both take rows for texts.

    Raises:
        ConfigError: It does.
    """
    for part in loss.modules():
        if hasattr(part, "mini_batch_size") or hasattr(part, "guide"):
            raise ConfigError(
                f"window= with {type(part).__name__}",
                "a loss that leaves batches as they are",
                "objective=ObjectiveSettings(mini_batch_size=..., guide=True) does the same with windows.",
            )
    return loss


def _false_negatives(
    dataset: EmbeddingQAFinetuneDataset,
    groups: list[TrainingGroup],
    objective: ObjectiveSettings,
    near_duplicates: Mapping[str, str] | None,
) -> FalseNegatives:
    if objective.mask_near_duplicates and near_duplicates is None:
        from llama_index_lora_embed.data.filters.near_duplicates import near_duplicate_groups

        # the rest of the corpus comes into no batch
        used = dataset.answer_ids() | {i for ids in (dataset.hard_negatives or {}).values() for i in ids}
        used |= {group.passage_id for group in groups}
        near_duplicates = near_duplicate_groups({i: text for i, text in dataset.corpus.items() if i in used})
    return FalseNegatives(
        dataset, objective.sibling_window, near_duplicates if objective.mask_near_duplicates else None
    )


def _need_any_negative(
    dataset: EmbeddingQAFinetuneDataset, groups: list[TrainingGroup], false_negatives: FalseNegatives
) -> None:
    """One question with a negative is enough: others may be told from nothing now and then, but not all of them.

    Raises:
        DatasetError: No question has any.
    """
    places = false_negatives.places([group.passage_id for group in groups])
    for group in groups:
        for query_id in group.query_ids:
            if (dataset.hard_negatives or {}).get(query_id):
                return
            if len(false_negatives.among(query_id, places)) < len(groups):
                return
    raise DatasetError(
        "training passages that are all false negatives of each other (copies, neighbours in one document, or "
        "answers to the same questions)",
        "at least one passage that a question can be told from",
        "Add documents, or set sibling_window=0 in ObjectiveSettings, if neighbours do not answer each other's "
        "questions.",
    )


def column_prompts(model: SentenceTransformer, columns: Iterable[str]) -> dict[str, str]:
    """The prompts of serving for the columns that `training_plan` makes; a label has none.

    Args:
        model: Has the prompts.
        columns: Names: anchor, positive, negative_1, negative_2, ..., label.
    """
    query, passage = model.prompts.get("query") or "", model.prompts.get("document") or ""
    return {name: query if name == "anchor" else passage for name in columns if name != "label"}
