"""A run of `EmbeddingAdapterFinetuneEngine`: embed each text once, train over the vectors, compare, write."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.utils import get_cache_dir
from torch import nn

from llama_index_lora_embed.config import EmbeddingAdapterSettings, ObjectiveSettings
from llama_index_lora_embed.core.arrays import cosine
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.embedding.adapter_embedding import PROBE, adapter_manifest
from llama_index_lora_embed.embedding.identity import fingerprint_with
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding
from llama_index_lora_embed.engines.embedding_adapter_result import EmbeddingAdapterResult
from llama_index_lora_embed.engines.negatives import column_scores
from llama_index_lora_embed.engines.run_verdict import RunVerdict
from llama_index_lora_embed.evaluation.embeddings import Embedder, Side, unit_vectors
from llama_index_lora_embed.evaluation.metrics import DEPTH, compute_metrics
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_encoders, relevance
from llama_index_lora_embed.evaluation.search import FloatArray, nearest
from llama_index_lora_embed.evaluation.verdict import Verdict
from llama_index_lora_embed.models.adapter_directory import Manifest
from llama_index_lora_embed.models.embedding_adapter import LinearLayer, adapter_digest, check_shape, save_adapter
from llama_index_lora_embed.models.stored_adapter import StoredAdapter
from llama_index_lora_embed.training.checkpointing.checkpoints import clear_checkpoints, only_run
from llama_index_lora_embed.training.checkpointing.resume import describe
from llama_index_lora_embed.training.embedding_adapter import (
    IDENTITY,
    AdapterOutcome,
    AdapterSelection,
    FrozenVectors,
    MakeOptimizer,
    choose_negatives,
    train_adapter,
)
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets, corpus_targets

if TYPE_CHECKING:
    from llama_index_lora_embed.engines.embedding_adapter import EmbeddingAdapterFinetuneEngine

_SAME_LENGTH = 1.01  # longest by shortest vector; beyond it, a dot product ranks otherwise than the cosine
_SAME_VECTOR = 0.999  # cosine of the vectors of a query by the synchronous and the asynchronous method


def embed_texts(
    embed_model: BaseEmbedding, texts: Sequence[str], side: Side, settings: EmbeddingAdapterSettings
) -> FloatArray:
    """Vectors [texts, dimensions] as the model gives them, from the cache where they are in it.

    Raises:
        ConfigError: The vectors differ in dimensions.
        OutputDirectoryError: The cache cannot be written.
    """
    folder = settings.cache_folder or str(Path(get_cache_dir()) / "lora_embed")
    embedder = Embedder(embed_model, settings.num_workers, folder, settings.verbose)
    return run_async(embedder.embed(texts, side), suspends=settings.num_workers is not None)


def embed_passages(
    engine: EmbeddingAdapterFinetuneEngine, texts: Sequence[str], settings: EmbeddingAdapterSettings
) -> FloatArray:
    """Vectors [texts, dimensions] of passages: those of the engine's index where it holds them, else the model's.

    Raises:
        ConfigError: The vectors differ in dimensions.
        OutputDirectoryError: The cache cannot be written.
    """
    if engine.stored is None:
        return embed_texts(engine.embed_model, texts, "passage", settings)
    datasets = (engine.corpus_dataset, engine.val_dataset)
    known = engine.stored.by_text(*(data for data in datasets if data is not None))
    if missing := [text for text in texts if text not in known]:
        known |= dict(zip(missing, embed_texts(engine.embed_model, missing, "passage", settings), strict=True))
    return np.stack([known[text] for text in texts])


@dataclass(frozen=True, eq=False)
class _Vectors:
    """All vectors of a run, of length 1 except `probe`.

    Attributes:
        data: What is trained on, with all columns.
        val_queries: In the order of the validation set; None without one.
        val_passages: In the order of their ids.
        probe: The model's vector of `PROBE`.
        warnings: Peculiarities, a sentence each.
    """

    data: FrozenVectors
    val_queries: FloatArray | None
    val_passages: FloatArray | None
    probe: FloatArray
    warnings: list[str]

    @property
    def dimensions(self) -> int:
        return len(self.probe)

    def digest(self) -> str:
        """SHA-256 (hex) of what decides the result of a training with the same settings and data."""
        digest = hashlib.sha256()
        trained = (self.data.queries.cpu().numpy(), self.data.passages.cpu().numpy())
        for array in (*trained, self.val_queries, self.val_passages):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def execute(
    engine: EmbeddingAdapterFinetuneEngine, target: Path, settings: EmbeddingAdapterSettings, kwargs: dict[str, Any]
) -> EmbeddingAdapterResult:
    """Run an engine; see `EmbeddingAdapterFinetuneEngine.finetune`."""
    run_dir = target.with_name(target.name + ".run")
    with only_run(run_dir):
        return _run(engine, target, run_dir, settings, kwargs)


def _run(
    engine: EmbeddingAdapterFinetuneEngine,
    target: Path,
    run_dir: Path,
    settings: EmbeddingAdapterSettings,
    kwargs: dict[str, Any],
) -> EmbeddingAdapterResult:
    train, val, embed_model = engine.dataset, engine.val_dataset, engine.embed_model
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.perf_counter()
    vectors = _embed(engine, _targets(engine), settings, device)
    embedded = time.perf_counter()
    adapter = copy.deepcopy(engine.adapter_model) or LinearLayer(vectors.dimensions, vectors.dimensions, settings.bias)
    adapter = adapter.to(device)
    make_optimizer = _optimizer(settings, kwargs)
    data, negatives, tried = vectors.data, settings.negatives, dict[str, float]()
    if negatives == "auto":
        score = column_scores(data)
        chosen, tried = choose_negatives(adapter, data, settings, make_optimizer, score)
    else:
        chosen = negatives
    chosen_at = time.perf_counter()
    outcome = train_adapter(
        adapter,
        data.answered() if chosen == "answered" else data,
        settings,
        run_dir,
        selection=AdapterSelection(None if val is None else _step_evaluator(vectors, val, device)),
        make_optimizer=make_optimizer,
        run_record={
            **settings.result_affecting(),
            "vectors": vectors.digest(),
            "dataset": train.order_digest(),
            "val_dataset": None if val is None else val.order_digest(),
            "adapter": adapter_digest(adapter),
            "optimizer": describe({name: kwargs.get(name) for name in ("optimizer_class", "optimizer_params")}),
        },
    )
    evaluations = None if val is None else _evaluations(vectors, val, outcome, device)
    if evaluations is not None:
        outcome.selection.base, outcome.selection.best = evaluations
    note = " ".join([engine.hold_out_note, *vectors.warnings]).strip()
    verdict = RunVerdict.of(outcome.selection, train, val, note, continued=False)
    best_step = outcome.selection.best_step if evaluations else outcome.steps
    manifest = adapter_manifest(
        embed_model,
        vectors.dimensions,
        dataset=train.summary(),
        settings={**settings.result_affecting(), "negatives": chosen},
        metrics=verdict.metrics,
        verdict=verdict.summary,
        best_step=None if evaluations is None else best_step,
    )
    fingerprint = _write(target, manifest, embed_model, outcome, vectors.probe)
    if not settings.save_checkpoints:
        clear_checkpoints(run_dir)
    return EmbeddingAdapterResult(
        adapter_path=str(target),
        fingerprint=fingerprint,
        verdict=Verdict.NOT_EVALUATED if verdict.comparison is None else verdict.comparison.verdict,
        summary=verdict.summary,
        base_metrics=verdict.metrics.get("base", {}),
        tuned_metrics=verdict.metrics.get("tuned", {}),
        comparison=verdict.comparison,
        best_step=best_step,
        steps=outcome.steps,
        history=outcome.selection.history,
        negatives=chosen,
        negatives_tried=tried,
        warnings=vectors.warnings,
        embedding_seconds=embedded - started,
        train_seconds=outcome.train_seconds + chosen_at - embedded,
        evaluations=evaluations,
        val_dataset=val,
        trained_on=tuple(train.origins()),
    )


def _write(
    target: Path, manifest: Manifest, embed_model: BaseEmbedding, outcome: AdapterOutcome, probe: FloatArray
) -> str:
    """Write the directory; the fingerprint of the model with it."""
    import dataclasses

    adapter = outcome.adapter.cpu()
    digest = "" if outcome.is_identity else StoredAdapter(adapter, manifest).digest()
    fingerprint = fingerprint_with(embed_model, digest)
    manifest = dataclasses.replace(manifest, fingerprint=fingerprint)
    save_adapter(adapter, target, manifest, probe=probe, identity=outcome.is_identity)
    return fingerprint


def _targets(engine: EmbeddingAdapterFinetuneEngine) -> CorpusTargets:
    """The training queries and all passages as columns, those of the validation set, too, if it was held out.

    Users will ask about passages that no training query asks for. Where such passages are negatives, those of the
    validation queries have to be among them; otherwise the validation would not see what that costs.
    """
    whole = engine.corpus_dataset
    places = {"corpus": whole.corpus, "source_documents": whole.source_documents}
    train = engine.dataset.model_copy(update=places)
    objective = ObjectiveSettings()
    near_duplicates = train.near_duplicates() if objective.mask_near_duplicates else None
    false_negatives = FalseNegatives(train, objective.sibling_window, near_duplicates)
    return corpus_targets(train, make_groups(train, use_all_docs=False), false_negatives)


def _embed(
    engine: EmbeddingAdapterFinetuneEngine,
    targets: CorpusTargets,
    settings: EmbeddingAdapterSettings,
    device: torch.device,
) -> _Vectors:
    """Embed all texts of a run, each once; what does not fit the adapter is found with the first of them."""
    train, val, embed_model = engine.dataset, engine.val_dataset, engine.embed_model
    probe = embed_texts(embed_model, [PROBE], "query", settings)[0]
    _check_dimensions(engine, len(probe))
    warnings = _async_warnings(embed_model, probe)
    passage_ids = {text: passage_id for passage_id, text in reversed(targets.columns)}
    val_corpus = {} if val is None else {i: val.corpus[i] for i in sorted(val.corpus)}
    passage_ids = {**{text: i for i, text in val_corpus.items()}, **passage_ids}
    query_ids = {text: i for data in (val, train) if data is not None for i, text in data.queries.items()}
    rows: dict[Side, dict[str, FloatArray]] = {}
    sides: tuple[tuple[Side, dict[str, str]], ...] = (("query", query_ids), ("passage", passage_ids))
    for side, ids in sides:
        texts = list(ids)
        queries = side == "query"
        found = embed_texts(embed_model, texts, side, settings) if queries else embed_passages(engine, texts, settings)
        if found.shape[1] != len(probe):
            raise ConfigError(
                f"{side} vectors of {found.shape[1]} and a query vector of {len(probe)} dimensions",
                "the same number of dimensions for both",
                "Check the embedding model's settings.",
            )
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(found, axis=1)
        found = unit_vectors(found, list(ids.values()), side)
        warnings += _length_warnings(side, lengths)
        rows[side] = dict(zip(ids, found, strict=True))

    def stacked(side: Side, texts: Iterable[str]) -> FloatArray:
        return np.stack([rows[side][text] for text in texts])

    data = FrozenVectors(
        torch.from_numpy(stacked("query", (train.queries[i] for i in targets.query_ids))).to(device),
        torch.from_numpy(stacked("passage", (text for _, text in targets.columns))).to(device),
        targets,
    )
    if val is None:
        return _Vectors(data, None, None, probe, warnings)
    val_queries, val_passages = stacked("query", val.queries.values()), stacked("passage", val_corpus.values())
    return _Vectors(data, val_queries, val_passages, probe, warnings)


def _check_dimensions(engine: EmbeddingAdapterFinetuneEngine, dimensions: int) -> None:
    """Raises a ConfigError if the model's vectors are not of `dim`, or not of the adapter's dimensions."""
    problems = []
    if engine.dim is not None and engine.dim != dimensions:
        problems.append(f"dim={engine.dim}: expected {dimensions}, or None")
    if engine.adapter_model is not None:
        try:
            check_shape(engine.adapter_model, dimensions, "an adapter_model")
        except AdapterError as error:
            problems.append(f"{error.got}: expected {error.expected}")
    if problems:
        name = f"{type(engine.embed_model).__name__} {engine.embed_model.model_name!r}"
        raise ConfigError(f"{name}, whose vectors have {dimensions} dimensions", "what fits them", "Correct:", problems)


def _async_warnings(embed_model: BaseEmbedding, probe: FloatArray) -> list[str]:
    """Whether the asynchronous method gives another vector than the synchronous one, which is trained on."""
    if isinstance(embed_model, LoraEmbedding):
        return []
    separate = copy.copy(embed_model)  # a client that is made in this event loop is not left in the user's model
    try:
        vector = np.asarray(run_async(separate.aget_query_embedding(PROBE)), np.float32)
    except Exception as error:  # each model has its own errors
        return [f"The asynchronous method of {type(embed_model).__name__} fails ({type(error).__name__}: {error})."]
    similarity = cosine(vector, probe)
    if similarity >= _SAME_VECTOR:
        return []
    return [
        f"The asynchronous method of {type(embed_model).__name__} gives a query another vector than the synchronous "
        f"one, which the adapter was trained on (cosine {similarity:.3f}): do not use it."
    ]


def _length_warnings(side: Side, lengths: FloatArray) -> list[str]:
    zeros, positive = int((lengths == 0).sum()), lengths[lengths > 0]
    found = [f"{zeros} of {len(lengths)} {side} vectors are zero."] if zeros else []
    if side == "passage" and len(positive) and positive.max() > _SAME_LENGTH * positive.min():
        found.append(
            f"Passage vectors have lengths from {positive.min():.3g} to {positive.max():.3g}: they are compared by "
            "cosine here, and a vector store that compares by dot product or distance ranks otherwise."
        )
    return found


def _optimizer(settings: EmbeddingAdapterSettings, kwargs: dict[str, Any]) -> MakeOptimizer:
    cls: Any = kwargs.get("optimizer_class", torch.optim.AdamW)
    decay = {"weight_decay": 0.0} if cls is torch.optim.AdamW else {}  # the pull towards the identity is there instead
    options = {"lr": settings.learning_rate, **decay, **kwargs.get("optimizer_params", {})}

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        try:
            made: torch.optim.Optimizer = cls(parameters, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{cls.__name__} with optimizer_params={kwargs.get('optimizer_params')!r} ({error})",
                "an optimizer of torch with its own arguments",
                "optimizer_class=torch.optim.SGD, optimizer_params={'lr': 0.01}",
            ) from error
        return made

    return make


@dataclass(frozen=True)
class _StepEvaluation:
    """Metrics of a step, without what only the report needs."""

    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]]

    def scores(self, metric: str) -> list[float]:
        return [values[metric] for values in self.per_query.values()]


def _mapped(model: nn.Module, queries: FloatArray, ids: Sequence[str], device: torch.device) -> FloatArray:
    with torch.no_grad():
        vectors: FloatArray = model(torch.from_numpy(queries).to(device)).float().cpu().numpy()
    return unit_vectors(vectors.copy(), ids, "query")


def _step_evaluator(
    vectors: _Vectors, val: EmbeddingQAFinetuneDataset, device: torch.device
) -> Callable[[nn.Module], _StepEvaluation]:
    query_ids, passage_ids, grades = list(val.queries), sorted(val.corpus), relevance(val)
    queries, passages = vectors.val_queries, vectors.val_passages
    assert queries is not None
    assert passages is not None

    def evaluate(model: nn.Module) -> _StepEvaluation:
        rows, _ = nearest(_mapped(model, queries, query_ids, device), passages, DEPTH)
        ranked = {q: [passage_ids[row] for row in found] for q, found in zip(query_ids, rows, strict=True)}
        per_query = compute_metrics(ranked, grades)
        names = next(iter(per_query.values()))
        means = {name: float(np.mean([values[name] for values in per_query.values()])) for name in names}
        return _StepEvaluation(means, per_query)

    return evaluate


def _evaluations(
    vectors: _Vectors, val: EmbeddingQAFinetuneDataset, outcome: AdapterOutcome, device: torch.device
) -> tuple[RetrievalEvaluation, RetrievalEvaluation]:
    """Of the model alone and with the adapter, with all that reports need."""
    queries, passages, query_ids = vectors.val_queries, vectors.val_passages, list(val.queries)
    assert queries is not None
    assert passages is not None

    def evaluation(model: nn.Module) -> RetrievalEvaluation:
        # copies, because they are scaled in place
        mapped = _mapped(model, queries, query_ids, device)
        return evaluate_encoders(lambda _: mapped, lambda _: passages.copy(), val)

    base = evaluation(IDENTITY)
    return base, base if outcome.is_identity else evaluation(outcome.adapter)
