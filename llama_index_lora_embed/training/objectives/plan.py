"""Training data, collator and loss of an objective, for the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric

from llama_index_lora_embed.config import (
    DISTILLED,
    FOR_PAIRS,
    IN_BATCH,
    MiningSettings,
    ObjectiveSettings,
    TrainingSettings,
)
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.models.windows import window_of
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.examples import (
    TrainingGroup,
    find_false_negatives,
    label_columns,
    make_examples,
    negative_columns,
    require_any_negative,
    require_negatives,
)
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.collator import GroupCollator
from llama_index_lora_embed.training.objectives.distillation import (
    DistillationLoss,
    ListwiseDistillationLoss,
    MarginDistillationLoss,
    TeacherScores,
    score_examples,
    student_spread,
    with_negatives,
)
from llama_index_lora_embed.training.objectives.frozen_passages import FrozenPassages, frozen_passages_loss
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from llama_index_lora_embed.training.objectives.query_distillation import query_distillation_loss
from llama_index_lora_embed.training.objectives.samplers import ExampleBatchSampler, ExampleTraits, GroupBatchSampler
from llama_index_lora_embed.training.teacher import Teacher


@dataclass(frozen=True)
class TrainingPlan:
    """What an objective gives the trainer.

    Attributes:
        inputs: train_dataset, loss and, for some objectives, data_collator.
        arguments: batch_sampler and prompts, for `SentenceTransformerTrainingArguments`.
        gradcache: Whether steps can be computed in chunks (GradCache).
        teacher_scores: Digest of the scores that are learnt; None without a teacher.
        negatives: What queries are compared with where only they are trained, "corpus" or "answered".
    """

    inputs: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    gradcache: bool = False
    teacher_scores: str | None = None
    negatives: str | None = None

    def use_gradcache(self, mini_batch_size: int) -> None:
        """Compute steps in chunks of this many texts; only where `gradcache` is True."""
        self.inputs["data_collator"].mini_batch_size = mini_batch_size
        self.inputs["loss"].cached = True


def training_plan(
    model: SentenceTransformer,
    dataset: TrainingData,
    groups: list[TrainingGroup],
    loss: Any,
    settings: TrainingSettings,
    objective: ObjectiveSettings | None = None,
    *,
    teacher: Teacher | None = None,
    gradient_checkpointing: bool = False,
    passages: FrozenPassages | None = None,
) -> TrainingPlan:
    """Training data, collator, loss, prompts and batch sampler of an objective.

    Args:
        model: Has its LoRA.
        dataset: Checked.
        groups: `make_groups(dataset, ...)`; empty for labelled pairs.
        loss: None for the objective's own; else a sentence-transformers loss, or a callable that makes one from the
            model, which gets columns of texts. Then only the masks of `objective` count.
        settings: Of the training.
        objective: Fits data and loss (`ObjectiveSettings.misfits`); None for the default.
        teacher: Scores the passages, if the objective learns from one.
        gradient_checkpointing: Whether the trainer will use it; then there is no GradCache.
        passages: Vectors of the passages, where only queries are trained, and their teacher.

    Raises:
        ConfigError: The objective or the loss cannot be used with this model, or the teacher's scores cannot be used.
        DatasetError: There are no negatives.
        ModelNotFoundError: The teacher does not load.
    """
    objective = objective or ObjectiveSettings()
    name = objective.name_for(dataset.kind == "pairs")
    if loss is not None:
        loss = _checked_loss(loss, window_of(model) is not None)
    if dataset.kind == "pairs":
        pairs = zip(dataset.texts1, dataset.texts2, dataset.scores, strict=True)
        rows: list[dict[str, Any]] = [{"text1": one, "text2": two, "label": float(score)} for one, two, score in pairs]
        loss = _pair_loss(name, settings) if loss is None else loss
        return _columns_plan(model, rows, loss, queries=() if dataset.symmetric else ("text1",))
    false_negatives = find_false_negatives(dataset, groups, objective, whole_corpus=passages is not None)
    if passages is not None and passages.teacher is not None:
        texts, distilled, digest = query_distillation_loss(
            model, dataset, passages, passages.teacher, settings.temperature, settings.seed
        )
        rows = [{"anchor": text, "label": at} for at, text in enumerate(texts)]
        return replace(_columns_plan(model, rows, distilled), teacher_scores=digest)
    if passages is not None:
        query_ids, frozen, negatives = frozen_passages_loss(model, dataset, groups, false_negatives, passages, settings)
        rows = [{"anchor": dataset.queries[i], "label": at} for at, i in enumerate(query_ids)]
        return replace(_columns_plan(model, rows, frozen), negatives=negatives)
    if loss is not None:
        examples = make_examples(dataset, groups, false_negatives)
        rows = negative_columns(dataset, examples)
        width = len(rows[0]) - 2
        in_batch = [(one.query_id, [one.passage_id, *(i for i, _ in one.negatives[:width])]) for one in examples]
        return _columns_plan(model, rows, loss, ExampleTraits.of(in_batch, false_negatives))
    if name in IN_BATCH:
        gradcache = not gradient_checkpointing
        return _groups_plan(model, dataset, groups, settings, objective, false_negatives, teacher, gradcache)
    equal_numbers = name not in FOR_PAIRS
    examples = make_examples(dataset, groups, false_negatives, min_negatives=1, equal_numbers=equal_numbers)
    require_negatives(examples)
    if name in FOR_PAIRS:
        return _columns_plan(model, label_columns(dataset, examples), _pair_loss(name, settings))
    distance, margin = TripletDistanceMetric.COSINE, objective.triplet_margin
    triplet_loss = partial(losses.TripletLoss, distance_metric=distance, triplet_margin=margin)
    # the first hard negative is the hardest
    return _columns_plan(model, negative_columns(dataset, examples, most=1), triplet_loss)


def _groups_plan(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset,
    groups: list[TrainingGroup],
    settings: TrainingSettings,
    objective: ObjectiveSettings,
    false_negatives: FalseNegatives,
    teacher: Teacher | None,
    gradcache: bool,
) -> TrainingPlan:
    width = model.get_embedding_dimension()
    if width is not None and (wide := [d for d in objective.matryoshka_dims or () if d > width]):
        raise ConfigError(
            f"matryoshka_dims with {', '.join(map(str, wide))}",
            f"at most {width}, the dimension of this model's embeddings",
            "Remove the larger ones.",
        )
    make_loss: Callable[..., MaskedInfoNCELoss] = MaskedInfoNCELoss
    scores = None
    if objective.name in DISTILLED:
        assert teacher is not None, "check_run requires it"
        dataset, scores, make_loss = _distilled(model, dataset, groups, objective, false_negatives, teacher)
    else:
        require_any_negative(dataset, groups, false_negatives)
    mini_batch_size = objective.mini_batch_size
    collator = GroupCollator(
        model,
        dataset,
        groups,
        false_negatives,
        soft=objective.name == "soft_labels",
        teacher_scores=None if scores is None else scores.of,
        mini_batch_size=None if mini_batch_size == "auto" else mini_batch_size,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    loss = make_loss(
        model,
        settings.temperature,
        cached=gradcache and model.device.type == "cpu" if mini_batch_size == "auto" else mini_batch_size is not None,
        guide_margin=objective.guide_margin if objective.guide else None,
        dims=objective.matryoshka_dims or (),
    )
    return TrainingPlan(
        {
            "train_dataset": Dataset.from_dict({"group": list(range(len(groups)))}),
            "data_collator": collator,
            "loss": loss,
        },
        {"batch_sampler": GroupBatchSampler, "prompts": None},
        gradcache,
        None if scores is None else scores.digest,
    )


def _distilled(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset,
    groups: list[TrainingGroup],
    objective: ObjectiveSettings,
    false_negatives: FalseNegatives,
    teacher: Teacher,
) -> tuple[EmbeddingQAFinetuneDataset, TeacherScores, Callable[..., DistillationLoss]]:
    """The dataset with the negatives that a teacher has scored, the scores, and what makes the loss."""
    least = MiningSettings().num_negatives  # as many as mining finds where it finds enough
    examples = make_examples(dataset, groups, false_negatives, min_negatives=least, equal_numbers=False)
    require_negatives(examples)
    dataset = with_negatives(dataset, examples)
    scores = score_examples(dataset, examples, teacher, model.device)
    weight = objective.weight_of_in_batch()
    if objective.name == "margin_mse":
        spreads = student_spread(model, dataset, examples), scores.spread
        return dataset, scores, partial(MarginDistillationLoss, contrastive_weight=weight, spreads=spreads)
    temperature = objective.teacher_temperature
    make_loss = partial(ListwiseDistillationLoss, contrastive_weight=weight, teacher_temperature=temperature)
    return dataset, scores, make_loss


def _columns_plan(
    model: SentenceTransformer,
    rows: list[dict[str, Any]],
    loss: Any,
    traits: ExampleTraits | None = None,
    queries: tuple[str, ...] = ("anchor",),
) -> TrainingPlan:
    """Columns of texts, of which `queries` get the model's query prompt and the others its passage prompt."""
    query, passage = model.prompts.get("query") or "", model.prompts.get("document") or ""
    prompts = {name: query if name in queries else passage for name in rows[0] if name != "label"}
    return TrainingPlan(
        {"train_dataset": Dataset.from_list(rows), "loss": loss},
        {"batch_sampler": partial(ExampleBatchSampler, traits=traits), "prompts": prompts},
    )


def _pair_loss(name: str, settings: TrainingSettings) -> Callable[[SentenceTransformer], torch.nn.Module]:
    if name == "cosent":
        return partial(losses.CoSENTLoss, scale=1 / settings.temperature)
    return losses.CosineSimilarityLoss


def _checked_loss(loss: Any, windows: bool) -> Any:
    """The user's loss, or a callable that makes it from the model; raises ConfigError for what cannot be used."""

    def check(made: Any) -> torch.nn.Module:
        if not isinstance(made, torch.nn.Module):
            name = getattr(loss, "__qualname__", type(loss).__qualname__)
            raise ConfigError(
                f"loss={name}, which makes a {type(made).__name__} from the model",
                "a sentence-transformers loss, or a callable that makes one from the model",
                "Pass the class: loss=losses.MultipleNegativesRankingLoss.",
            )
        for part in made.modules() if windows else ():
            if hasattr(part, "mini_batch_size") or hasattr(part, "guide"):  # both assume one row of tokens per text
                raise ConfigError(
                    f"window= with {type(part).__name__}",
                    "a loss that neither splits batches nor has a guide model",
                    "objective=ObjectiveSettings(mini_batch_size=..., guide=True) does the same with windows.",
                )
        return made

    return check(loss) if isinstance(loss, torch.nn.Module) else lambda model: check(loss(model))
