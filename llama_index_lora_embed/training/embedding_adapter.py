"""Training of an embedding adapter over vectors that are known: those of queries move, those of passages stay."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from llama_index_lora_embed.config import EmbeddingAdapterSettings
from llama_index_lora_embed.core.errors import NonFiniteLossError, OutputDirectoryError, warn_user
from llama_index_lora_embed.core.files import append_json_line
from llama_index_lora_embed.models.embedding_adapter import BaseAdapter, save_adapter
from llama_index_lora_embed.training.checkpointing.checkpoints import LOG_NAME, open_run, step_of, write_checkpoint
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.checkpointing.signals import StopRequest
from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets
from llama_index_lora_embed.training.objectives.full_corpus import full_corpus_loss

logger = logging.getLogger(__name__)
IDENTITY = nn.Identity()
"""Stands for the base in evaluations: step 0, whatever map training starts from."""

_WEIGHTS, _OPTIMIZER, _RANDOM = "adapter.safetensors", "optimizer.pt", "random.pt"
_CHECKPOINTS_KEPT = 2
_FEWEST_EVALUATIONS = 4  # also of a run of one epoch
_FOLDS = 3
_CHOICE_QUERIES = 600  # on which `negatives` is chosen; more would not change the choice

Optimizer = torch.optim.Optimizer
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True, eq=False)
class FrozenVectors:
    """Vectors of length 1, float32, of the queries and of the columns that they are compared with.

    Attributes:
        queries: [queries, dimensions], in the order of `targets.query_ids`.
        passages: [columns, dimensions], in the order of `targets.columns`.
        targets: Which columns are relevant to which query.
    """

    queries: Tensor
    passages: Tensor
    targets: CorpusTargets

    def part(self, rows: Sequence[int], columns: Sequence[int]) -> FrozenVectors:
        """Some of the queries, compared with some of the columns."""
        return FrozenVectors(self.queries[list(rows)], self.passages[list(columns)], self.targets.part(rows, columns))

    def answered(self) -> FrozenVectors:
        """All queries, compared with those passages that answer one of them."""
        rows = range(len(self.queries))
        return self.part(rows, self.targets.answered(rows))


class AdapterSelection(CheckpointSelection):
    """The selection of LoRA checkpoints for adapters; step 0 is `IDENTITY`, which has no weights."""

    def evaluate_step(self, model: nn.Module, step: int) -> dict[str, float]:
        """Evaluate a step, unless it was evaluated before a resume."""
        if self.evaluator is None or any(entry["step"] == step for entry in self.history):
            return {}
        evaluation = self.evaluate(model)  # type: ignore[arg-type]
        self.history.append({"step": step, "metrics": dict(evaluation.metrics)})
        if step == 0:
            self.base = evaluation
        if self._keep(evaluation.scores(self.metric)):
            self.best_step, self.best = step, evaluation
            self.weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
        return dict(evaluation.metrics)


@dataclass(frozen=True)
class AdapterOutcome:
    """What training gave.

    Attributes:
        adapter: With the weights of the step that is kept, or those that training started from if none beat the base.
        is_identity: Whether no step beat the base, so that vectors are to stay as they are.
        selection: The evaluations.
        steps: Number of steps of the run.
        train_seconds: Wall time of this process's steps, without evaluations.
    """

    adapter: BaseAdapter
    is_identity: bool
    selection: AdapterSelection
    steps: int
    train_seconds: float


def total_steps(queries: int, settings: EmbeddingAdapterSettings) -> int:
    """Number of steps of a run."""
    return settings.epochs * math.ceil(queries / settings.batch_size)


def run_steps(
    adapter: BaseAdapter, data: FrozenVectors, settings: EmbeddingAdapterSettings, optimizer: Optimizer, after: int = 0
) -> Iterator[tuple[int, float]]:
    """Train, and yield the number of each step with its loss, the pull included.

    The loss is `full_corpus_loss` plus identity_weight / queries x the distance to the identity: the same as a ridge of
    that weight on the sum over all queries. The order of an epoch depends on the seed and the epoch alone, so that a
    run can go on `after` any step.

    Raises:
        NonFiniteLossError: The loss or its gradient is NaN or infinite.
    """
    count, batch = len(data.queries), settings.batch_size
    per_epoch, total = math.ceil(count / batch), total_steps(count, settings)
    warmup = int(total * settings.warmup_ratio)
    weight = settings.identity_weight / count
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    order: list[int] = []
    for step in range(after, total):
        epoch, at = divmod(step, per_epoch)
        if at == 0 or not order:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        rows = order[at * batch : (at + 1) * batch]
        rate = (step + 1) / (warmup + 1) if step < warmup else (total - step) / (total - warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        given = data.queries[rows]
        mapped = adapter(given)
        loss = full_corpus_loss(mapped, data.passages, data.targets.batch(rows), settings.temperature)
        if weight:
            loss = loss + weight * _distance(adapter, given, mapped)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"a loss of {loss.item()} with a gradient of norm {norm.item()} at step {step + 1}",
                "finite numbers",
                f"Lower learning_rate (now {settings.learning_rate:g}) or raise temperature; nothing was written.",
            )
        optimizer.step()
        yield step + 1, loss.item()


def _distance(adapter: BaseAdapter, given: Tensor, mapped: Tensor) -> Tensor:
    """|W - I|², and for a map that is not linear, how far it moves these vectors: equal for evenly spread ones."""
    distance = adapter.distance_from_identity() if hasattr(adapter, "distance_from_identity") else None
    if distance is not None:
        return distance
    return given.shape[-1] * (mapped - given).square().sum(dim=-1).mean()


def choose_negatives(
    adapter: BaseAdapter,
    data: FrozenVectors,
    settings: EmbeddingAdapterSettings,
    make_optimizer: MakeOptimizer,
    score: Callable[[Tensor, Sequence[int]], list[float]],
) -> tuple[str, dict[str, float]]:
    """`negatives="auto"`: what did better on folds of the training queries, which never share a passage.

    Args:
        adapter: What training starts from; it is not changed.
        data: Training queries and all columns.
        settings: Of the run.
        make_optimizer: Makes the optimizer of an adapter's parameters.
        score: A metric of each query from mapped vectors and the rows of the queries, searching all columns.

    Returns:
        "corpus" or "answered", and the mean of the metric for either; no means where there is nothing to choose.
    """
    relevant = data.targets.relevant
    if len(data.targets.answered(range(len(relevant)))) == len(data.targets.columns):
        return "corpus", {}
    rng = random.Random(settings.seed)
    rows = sorted(rng.sample(range(len(relevant)), min(len(relevant), _CHOICE_QUERIES)))
    passages = sorted({relevant[row][0] for row in rows})
    rng.shuffle(passages)
    if len(passages) < _FOLDS:
        return "answered", {}
    fold_of = {column: number % _FOLDS for number, column in enumerate(passages)}
    scores: dict[str, list[float]] = {"answered": [], "corpus": []}
    for fold in range(_FOLDS):
        held_out = [row for row in rows if fold_of[relevant[row][0]] == fold]
        kept = [row for row in rows if fold_of[relevant[row][0]] != fold]
        for name, values in scores.items():
            columns = data.targets.answered(kept) if name == "answered" else range(len(data.targets.columns))
            trial = copy.deepcopy(adapter)
            for _ in run_steps(trial, data.part(kept, columns), settings, make_optimizer([*trial.parameters()])):
                pass
            with torch.no_grad():
                values += score(trial.eval()(data.queries[held_out]), held_out)
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return ("corpus" if means["corpus"] > means["answered"] else "answered"), means


def train_adapter(
    adapter: BaseAdapter,
    data: FrozenVectors,
    settings: EmbeddingAdapterSettings,
    run_dir: Path,
    *,
    selection: AdapterSelection,
    make_optimizer: MakeOptimizer,
    run_record: dict[str, Any],
) -> AdapterOutcome:
    """Train an adapter and keep the step that evaluated best; the base is step 0.

    Evaluations come at the end of each epoch, and at least four times. A run that was killed at any moment ends with
    the same weights, bit for bit, when it is resumed on the same kind of device.

    Args:
        adapter: Its weights are what training starts from; it is on the device of `data`.
        data: What is trained on, without columns that are not to be negatives.
        settings: Of the run.
        run_dir: Where log and checkpoints are.
        selection: Evaluates and chooses.
        make_optimizer: Makes the optimizer of the parameters.
        run_record: What decides the result; a resumed run must have the same.

    Raises:
        ConfigError: The checkpoint to resume from is of another run.
        NonFiniteLossError: The loss is NaN or infinite.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    start = copy.deepcopy(adapter.state_dict())
    checkpoint, _ = open_run(run_dir, run_record, settings.resume_from_checkpoint)
    total = total_steps(len(data.queries), settings)
    every = min(math.ceil(len(data.queries) / settings.batch_size), max(1, total // _FEWEST_EVALUATIONS))
    optimizer = make_optimizer([parameter for parameter in adapter.parameters() if parameter.requires_grad])
    started, saved = time.perf_counter(), 0
    with torch.random.fork_rng(), StopRequest() as stop:
        torch.manual_seed(settings.seed)
        if checkpoint is not None:
            saved = _load(checkpoint, adapter, optimizer, selection)
        selection.evaluate_step(IDENTITY, 0)
        adapter.train()
        losses: list[float] = []
        with tqdm(total=total, initial=saved, desc="training", disable=not settings.verbose) as bar:
            for step, loss in run_steps(adapter, data, settings, optimizer, after=saved):
                losses.append(loss)
                if step % every == 0 or step == total:
                    metrics = selection.evaluate_step(adapter.eval(), step)
                    adapter.train()
                    _log(run_dir, step, losses, metrics)
                    losses.clear()
                due = step % settings.checkpoint_save_steps == 0
                if due and settings.model_checkpoint_path is not None:
                    _save_step(adapter, Path(settings.model_checkpoint_path).expanduser() / f"step_{step}")
                stopping = stop.requested()
                if stopping or (due and settings.save_checkpoints):
                    saved = _save(run_dir, step, adapter, optimizer, selection, run_record)
                bar.update()
                if stopping:
                    break
    stop.deliver()
    selection.base = selection.base or (selection.evaluate(IDENTITY) if selection.evaluator else None)  # type: ignore[arg-type]
    is_identity = selection.evaluator is not None and selection.best_step == 0
    if is_identity:  # no weights that were found to be worse
        adapter.load_state_dict(start)
    elif selection.weights:
        adapter.load_state_dict(selection.weights)
    adapter.eval()
    if selection.evaluator is not None and selection.best is None:
        selection.best = selection.base if is_identity else selection.evaluate(adapter)  # type: ignore[arg-type]
    return AdapterOutcome(adapter, is_identity, selection, total, time.perf_counter() - started - selection.seconds)


def _save(
    run_dir: Path,
    step: int,
    adapter: BaseAdapter,
    optimizer: Optimizer,
    selection: AdapterSelection,
    run_record: dict[str, Any],
) -> int:
    """Write a checkpoint of this step, or none where the disk is full; the step."""

    def write(folder: Path) -> None:
        tensors = {name: t.detach().cpu().contiguous() for name, t in adapter.state_dict().items()}
        save_file(tensors, folder / _WEIGHTS)
        torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        torch.save({"cpu": torch.get_rng_state(), "cuda": cuda}, folder / _RANDOM)
        selection.save(folder)

    target = run_dir / f"checkpoint-{step}"
    try:
        write_checkpoint(target, write, run_record, _CHECKPOINTS_KEPT)
    # torch.save turns a full disk into a RuntimeError, safetensors into an error of its own
    except (OSError, RuntimeError, SafetensorError) as error:
        warn_user(
            f"The checkpoint of step {step} could not be written to {str(target)!r} ({type(error).__name__}: {error}). "
            "Earlier checkpoints are intact."
        )
    return step


def _load(checkpoint: Path, adapter: BaseAdapter, optimizer: Optimizer, selection: AdapterSelection) -> int:
    """Restore everything from a checkpoint, which `open_run` has verified; its step."""
    adapter.load_state_dict(load_file(checkpoint / _WEIGHTS))
    optimizer.load_state_dict(torch.load(checkpoint / _OPTIMIZER, weights_only=True))
    states = torch.load(checkpoint / _RANDOM, weights_only=True)
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    selection.load(checkpoint)
    return step_of(checkpoint)


def _save_step(adapter: BaseAdapter, path: Path) -> None:
    try:
        save_adapter(adapter, path)
    except OutputDirectoryError as error:  # the run is worth more than a copy of it on the way
        warn_user(f"The adapter of this step could not be saved: {error}")


def _log(run_dir: Path, step: int, losses: Sequence[float], metrics: dict[str, float]) -> None:
    """Append the mean loss since the last evaluation and this one's metrics to the log."""
    entries: list[dict[str, Any]] = [{"step": step, "loss": round(sum(losses) / len(losses), 6)}] if losses else []
    if metrics:
        entries.append({"step": step, **{f"eval_{name}": round(value, 4) for name, value in metrics.items()}})
    try:
        for entry in entries:
            append_json_line(run_dir / LOG_NAME, {**entry, "time": round(time.time(), 3)})
    except OSError as error:  # a full disk must not end the run
        logger.warning("step %d could not be logged: %s", step, error)
