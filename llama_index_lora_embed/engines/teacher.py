"""The teacher of a run: what is checked before anything is loaded, and what scores for the training."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding

from llama_index_lora_embed.config import DISTILLED, FinetuneConfig
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.models.base_model import check_local
from llama_index_lora_embed.models.cross_encoder import check_cross_encoder

if TYPE_CHECKING:
    from llama_index_lora_embed.evaluation.search import FloatArray
    from llama_index_lora_embed.training.objectives.query_distillation import QueryTeacher
    from llama_index_lora_embed.training.teacher import Teacher


def teacher_of(config: FinetuneConfig, given: Any | None) -> Teacher | None:
    """The teacher that was given as an object, or that the configuration names; None where there is none.

    Raises:
        LoraEmbedError: As `Teacher`.
    """
    source = config.teacher if given is None else given
    if source is None:
        return None
    from llama_index_lora_embed.training.teacher import Teacher, scores_file

    return Teacher(
        source,
        scores_file(config.output.model_output_path),
        resume=bool(config.output.resume_from_checkpoint),
        cache_folder=config.base.cache_folder,
        trust_remote_code=config.training.trust_remote_code,
        show_progress=config.training.show_progress_bar,
    )


def query_teacher_of(config: FinetuneConfig, given: Any | None) -> QueryTeacher | None:
    """The tuned model that queries learn from where they alone are trained; None where there is none.

    Raises:
        LoraEmbedError: As `open_embedding`.
    """
    source = config.teacher if given is None else given
    if source is None:
        return None
    from llama_index_lora_embed.embedding.open_embedding import open_embedding
    from llama_index_lora_embed.evaluation.embeddings import Embedder, Side
    from llama_index_lora_embed.training.objectives.query_distillation import QueryTeacher

    model: Any = source
    name = type(source).__name__
    if isinstance(source, str):
        training = config.training
        options: dict[str, Any] = {"device": training.device, "trust_remote_code": training.trust_remote_code}
        model = open_embedding(source, cache_folder=config.base.cache_folder, **options)
        name = Path(source).name
    embedder = Embedder(model, None, None, config.training.show_progress_bar)

    def encode(side: Side) -> Callable[[list[str]], FloatArray]:
        return lambda texts: run_async(embedder.embed(texts, side), suspends=False)

    return QueryTeacher(name, encode("query"), encode("passage"))


def check_local_teacher(name: str, *, query_side: bool = False) -> None:
    """What a teacher's folder shows by its files; one on the Hub is checked when training starts.

    Args:
        name: Folder or Hub id.
        query_side: Whether only queries are trained, from an embedding model.

    Raises:
        ModelNotFoundError: There is no such folder.
        ConfigError: It is no cross-encoder with one score.
    """
    if (folder := check_local(name)) is not None and not query_side:
        check_cross_encoder(folder, name)


def teacher_problems(config: FinetuneConfig, teacher: Any, *, pairs: bool, own_loss: bool) -> list[str]:
    """What does not go with a teacher, and why it is none; without one, what needs one."""
    if teacher is None:
        return config.objective.without_teacher()
    name, names = config.objective.name, " or ".join(map(repr, DISTILLED))
    if config.training.tune == "query":
        problems = [f"a teacher with objective {name!r}: expected no objective"] if name is not None else []
        if isinstance(teacher, (str, BaseEmbedding)):
            return problems
        expected = "expected a model that was tuned on both sides: an adapter's folder or Hub id, or a BaseEmbedding"
        return [*problems, f'teacher of type {type(teacher).__name__} with tune="query": {expected}']
    found = [
        ("labelled pairs", pairs, "queries and passages, which it gives scores"),
        ("a loss", own_loss, "one of the two"),
        (f"objective {name!r}", name not in (None, *DISTILLED), names),
    ]
    problems = [f"a teacher with {what}: expected {expected}" for what, wrong, expected in found if wrong]
    return problems if isinstance(teacher, str) else problems + _object_problems(teacher)


def _object_problems(teacher: Any) -> list[str]:
    """Without importing torch: who holds a model has imported it."""
    expected = "expected a cross-encoder (folder, Hub id or CrossEncoder), or a function of a list of (query, passage)"
    kind, torch, library = type(teacher).__name__, sys.modules.get("torch"), sys.modules.get("sentence_transformers")
    if library is not None and isinstance(teacher, library.CrossEncoder):
        wrong = teacher.num_labels != 1
        return (
            [f"teacher of type {kind} with {teacher.num_labels} scores: expected one with one score"] if wrong else []
        )
    model = torch is not None and isinstance(teacher, torch.nn.Module)
    if model or not callable(teacher) or isinstance(teacher, (type, BaseEmbedding)):
        return [f"teacher of type {kind}: {expected}"]
    try:
        inspect.signature(teacher).bind([])
    except TypeError as error:
        return [f"teacher of type {kind}, which cannot be called with a list alone ({error}): {expected}"]
    except ValueError:  # written in C, without a signature
        return []
    return []
