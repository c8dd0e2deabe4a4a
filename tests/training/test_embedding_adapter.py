"""Training of an embedding adapter over known vectors."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llama_index_lora_embed.config import EmbeddingAdapterSettings
from llama_index_lora_embed.core.errors import ConfigError, NonFiniteLossError
from llama_index_lora_embed.models.embedding_adapter import LinearLayer, TwoLayerNN
from llama_index_lora_embed.training import embedding_adapter as training
from llama_index_lora_embed.training.embedding_adapter import (
    AdapterOutcome,
    AdapterSelection,
    FrozenVectors,
    choose_negatives,
    run_steps,
    train_adapter,
)
from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets
from tests.helpers.embedding_models import turned
from tests.helpers.training import signal_in

D = 12
SETTINGS = EmbeddingAdapterSettings(batch_size=4, epochs=4, identity_weight=1.0, checkpoint_save_steps=3)


def frozen(queries: int = 20, unasked: int = 6, seed: int = 0) -> FrozenVectors:
    """A query for each of the first passages, whose vector is that passage's, turned, with some noise."""
    rng = np.random.default_rng(seed)
    passages = rng.normal(size=(queries + unasked, D))
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    asked = passages[:queries] @ turned(D).T + 0.05 * rng.normal(size=(queries, D))
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    columns = [(f"p{i}", f"text {i}") for i in range(queries + unasked)]
    targets = CorpusTargets(
        [f"q{i}" for i in range(queries)],
        columns,
        [[i] for i in range(queries)],
        [[1.0]] * queries,
        [[(i + 1) % queries] for i in range(queries)],
        [[] for _ in range(queries)],
    )
    return FrozenVectors(torch.tensor(asked).float(), torch.tensor(passages).float(), targets)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


class Found:
    """An evaluation by the share of queries whose passage is the nearest."""

    def __init__(self, hits: Tensor) -> None:
        self.hits = hits.double().tolist()
        self.metrics = {"ndcg@10": sum(self.hits) / len(self.hits)}

    def scores(self, metric: str) -> list[float]:
        return self.hits


def evaluator(data: FrozenVectors) -> Any:
    def evaluate(model: nn.Module) -> Found:
        with torch.no_grad():
            nearest = (model(data.queries) @ data.passages.T).argmax(dim=1)
        return Found(nearest == torch.arange(len(data.queries)))

    return evaluate


def train(
    run_dir: Path, data: FrozenVectors | None = None, adapter: Any = None, evaluate: bool = True, **settings: Any
) -> AdapterOutcome:
    data = data or frozen()
    return train_adapter(
        adapter or LinearLayer(D, D),
        data,
        SETTINGS.replace(**settings),
        run_dir,
        selection=AdapterSelection(evaluator(data) if evaluate else None),
        make_optimizer=adamw,
        run_record={"learning_rate": 0.02},
    )


def weights(outcome: AdapterOutcome) -> list[Tensor]:
    return [tensor.clone() for tensor in outcome.adapter.state_dict().values()]


def same(one: AdapterOutcome, other: AdapterOutcome) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_a_turned_space_is_learnt(tmp_path: Path) -> None:
    outcome = train(tmp_path / "a.run", epochs=30)
    base, best = outcome.selection.base, outcome.selection.best
    assert base is not None
    assert best is not None
    assert base.metrics["ndcg@10"] < 0.3
    assert best.metrics["ndcg@10"] > 0.9
    assert not outcome.is_identity
    assert [entry["step"] for entry in outcome.selection.history] == [*range(0, 151, 5)]
    log = (tmp_path / "a.run" / "log.jsonl").read_text()
    assert '"loss"' in log
    assert '"eval_ndcg@10"' in log


def test_the_seed_decides_the_result_and_nothing_else_does(tmp_path: Path) -> None:
    first = train(tmp_path / "a.run")
    adapter = LinearLayer(D, D)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(first, train(tmp_path / "b.run", adapter=adapter))
    assert torch.equal(torch.get_rng_state(), before), "the user's random state is left alone"
    assert not same(first, train(tmp_path / "c.run", seed=7))


def test_the_pull_keeps_the_map_near_the_identity(tmp_path: Path) -> None:
    moved = [
        train(tmp_path / f"{weight}.run", evaluate=False, identity_weight=weight).adapter.distance_from_identity()
        for weight in (0.0, 100.0, 10_000.0)
    ]
    assert moved[0] > moved[1] > moved[2]  # type: ignore[operator]
    assert moved[2] < 0.2 * moved[0]  # type: ignore[operator]
    free, pulled = (
        train(tmp_path / f"two-{weight}.run", adapter=TwoLayerNN(D, 8, D), evaluate=False, identity_weight=weight)
        for weight in (0.0, 1000.0)
    )
    given = frozen().queries
    with torch.no_grad():
        moved_less, moved_more = (float((outcome.adapter(given) - given).norm()) for outcome in (pulled, free))
    assert moved_less < 0.8 * moved_more


def test_the_base_is_step_0_whatever_training_starts_from(tmp_path: Path) -> None:
    data = frozen()
    data = FrozenVectors(data.passages[:20], data.passages, data.targets)  # nothing can be gained
    adapter = TwoLayerNN(D, 8, D)
    start = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    outcome = train(tmp_path / "a.run", data, adapter)
    assert outcome.is_identity
    found = outcome.adapter.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in start.items()), "no weights that were found to be worse"
    assert outcome.selection.best_step == 0
    assert outcome.selection.best is outcome.selection.base
    assert outcome.selection.history[0]["metrics"] == {"ndcg@10": 1.0}


@pytest.mark.parametrize("step", [1, 3, 4, 8, 20])
def test_a_run_that_is_stopped_at_a_step_and_resumed_ends_with_the_same_weights(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dropping(LinearLayer):
        """Random in training, so that a random state that is not restored shows."""

        def forward(self, embed: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(embed), 0.1, self.training)

    calm = train(tmp_path / "calm.run", adapter=Dropping(D, D))
    signal_in(monkeypatch, torch.optim.AdamW, "step", signal.SIGINT, step)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a.run", adapter=Dropping(D, D))
    monkeypatch.undo()
    assert (tmp_path / "a.run" / f"checkpoint-{step}").is_dir()
    resumed = train(tmp_path / "a.run", adapter=Dropping(D, D), resume_from_checkpoint=True)
    assert same(calm, resumed)
    assert resumed.selection.history == calm.selection.history
    assert resumed.selection.best_step == calm.selection.best_step


def test_checkpoints_are_kept_on_request_and_another_run_does_not_resume_from_them(tmp_path: Path) -> None:
    train(tmp_path / "a.run", save_checkpoints=True, model_checkpoint_path=str(tmp_path / "steps"))
    assert sorted(path.name for path in (tmp_path / "a.run").glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-18"]
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {f"step_{n}" for n in (3, 6, 9, 12, 15, 18)}
    assert LinearLayer.load(tmp_path / "steps" / "step_9").distance_from_identity() > 0
    with pytest.raises(ConfigError, match="another run"):
        train_adapter(
            LinearLayer(D, D),
            frozen(),
            SETTINGS.replace(resume_from_checkpoint=True),
            tmp_path / "a.run",
            selection=AdapterSelection(None),
            make_optimizer=adamw,
            run_record={"learning_rate": 0.5},
        )


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(training, "write_checkpoint", full)
    with pytest.warns(UserWarning, match="no space left"):
        outcome = train(tmp_path / "a.run", save_checkpoints=True)
    monkeypatch.undo()
    assert same(outcome, train(tmp_path / "b.run"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    data = frozen()
    data.queries[3] = float("nan")
    with pytest.raises(NonFiniteLossError, match="learning_rate"):
        for _ in run_steps(LinearLayer(D, D), data, SETTINGS, adamw([nn.Parameter(torch.zeros(1))])):
            pass


def test_every_step_of_a_warmup_learns() -> None:
    adapter = LinearLayer(D, D)
    optimizer, settings = adamw([*adapter.parameters()]), SETTINGS.replace(warmup_ratio=0.2)
    peak = optimizer.param_groups[0]["lr"]
    rates = [optimizer.param_groups[0]["lr"] / peak for _ in run_steps(adapter, frozen(), settings, optimizer)]
    assert rates[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1])  # of 20 steps


def test_the_negatives_are_those_that_did_better_on_folds() -> None:
    scored = []

    def nearest(data: FrozenVectors) -> Any:
        def score(mapped: Tensor, rows: Any) -> list[float]:
            scored.append(list(rows))
            return (mapped @ data.passages.T).argmax(dim=1).eq(torch.tensor(rows)).double().tolist()

        return score

    settings, adapter = SETTINGS.replace(epochs=12), LinearLayer(D, D)
    # what nobody asks for lies where all queries are drawn to, and only as negatives it teaches them to keep away
    data = frozen(unasked=40)
    data.passages[20:] = nn.functional.normalize(torch.ones(D) + 0.3 * data.passages[20:], dim=1)
    data.queries[:] = nn.functional.normalize(data.passages[:20] + 0.5 * torch.ones(D), dim=1)
    chosen, means = choose_negatives(adapter, data, settings, adamw, nearest(data))
    assert chosen == "corpus"
    assert means["corpus"] > means["answered"]
    assert adapter.distance_from_identity() == 0
    assert sorted(row for fold in scored[::2] for row in fold) == list(range(20)), "each query is held out once"
    assert scored[::2] == scored[1::2], "both are scored on the same"
    # where nearly all passages are asked for, those of the queries that are held out would be learnt to be wrong
    few = frozen(unasked=1)
    assert choose_negatives(adapter, few, settings, adamw, nearest(few))[0] == "answered"
    assert choose_negatives(adapter, few.answered(), settings, adamw, nearest(few)) == ("corpus", {})
