from dataclasses import dataclass

import pytest
import torch

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training.checkpointing import selection
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection, Installed


@dataclass
class Evaluation:
    values: list[float]

    @property
    def metrics(self):
        return {"ndcg@10": sum(self.values) / len(self.values)}

    def scores(self, metric):
        return self.values


@pytest.fixture(autouse=True)
def _weights_are_their_step(monkeypatch):
    monkeypatch.setattr(selection, "adapter_weights", lambda step: {"step": torch.tensor(step)})


def selection_of(*evaluations, installed=None):
    """The selection from these evaluations, at steps 0, 1, ...; perhaps beside one of the base as installed."""
    waiting = iter(evaluations)
    own = None if installed is None else lambda model: Installed(Evaluation(installed), "64 tokens")
    selected = CheckpointSelection(lambda step: Evaluation(next(waiting)), evaluate_as_installed=own)
    selected.evaluate_installed(0)
    for step in range(len(evaluations)):
        selected.evaluate_step(step, step)
    assert int(selected.weights["step"]) == selected.best_step
    assert selected.best.values == evaluations[selected.best_step]
    return selected


def kept(*evaluations):
    """The step that is kept."""
    return selection_of(*evaluations).best_step


BASE = [0.5, 0.5, 0.5, 0.5]
UP = [0.9, 0.7, 0.8, 0.6]


def test_nothing_that_does_not_beat_the_base_is_kept():
    assert kept(BASE) == 0
    assert kept(BASE, BASE, [0.4, 0.6, 0.5, 0.5]) == 0
    assert kept(BASE, [0.9, 0.1, 0.4, 0.5]) == 0


def test_the_latest_within_a_standard_error_of_the_highest_is_kept():
    a_little_less = [0.9, 0.6, 0.85, 0.6]  # behind by 0.0125 +- 0.031
    assert kept(BASE, UP, a_little_less) == 2
    assert kept(BASE, UP, UP) == 2


def test_a_step_that_is_clearly_behind_the_highest_is_not_kept():
    assert kept(BASE, UP, [0.85, 0.65, 0.75, 0.55]) == 1  # behind by 0.05 for every query


def test_later_steps_are_compared_with_the_highest_and_not_with_the_last_kept():
    slide = [[0.9 - 0.02 * i, 0.7, 0.8 - 0.02 * i, 0.6] for i in range(6)]
    behind = [sum(slide[0]) / 4 - sum(step) / 4 for step in slide]
    last = kept(BASE, *slide)
    assert 1 <= last < 6, "many small steps down must not add up"
    assert behind[last - 1] < 0.02


def test_a_later_step_within_a_standard_error_is_still_not_kept_if_it_is_no_better_than_the_base():
    noisy = [1.0, 0.2, 0.9, 0.0]
    assert kept([0.5, 0.5, 0.5, 0.5], [0.6, 0.5, 0.5, 0.5], noisy) == 2
    assert kept([0.55, 0.5, 0.5, 0.5], [0.6, 0.5, 0.5, 0.5], [0.9, 0.2, 0.8, 0.1]) == 1


def test_one_query_has_no_standard_error():
    assert kept([0.5], [0.7], [0.6]) == 1
    assert kept([0.5], [0.7], [0.7]) == 2


def test_a_metric_without_values_per_query_keeps_the_highest():
    class Whole(Evaluation):
        def scores(self, metric):
            return []

    values = iter([0.5, 0.8, 0.79, 0.7])
    selected = CheckpointSelection(lambda step: Whole([next(values)]))
    for step in range(4):
        selected.evaluate_step(step, step)
    assert selected.best_step == 1
    assert selected.evaluations_without_gain() == 2


def test_a_step_must_beat_the_base_as_installed_too():
    high = [0.7, 0.7, 0.7, 0.7]
    below = selection_of(BASE, [0.7, 0.6, 0.6, 0.6], installed=high)
    assert (below.best_step, below.keeps_installed, below.kept.values) == (0, True, high)
    above = selection_of(BASE, [0.7, 0.6, 0.6, 0.6], UP, [0.9, 0.6, 0.7, 0.55], installed=high)
    assert (above.best_step, above.keeps_installed, above.kept.values) == (2, False, UP)
    assert above.reference.values == high


def test_a_latest_step_within_a_standard_error_is_not_kept_where_the_installed_base_is_better():
    assert kept(BASE, UP, [0.9, 0.6, 0.85, 0.6]) == 2
    assert selection_of(BASE, UP, [0.9, 0.6, 0.85, 0.6], installed=[0.74, 0.74, 0.74, 0.74]).best_step == 1


def test_step_0_is_kept_as_installed_unless_what_the_run_changes_is_a_gain():
    low, high = ([value + change for value in BASE] for change in (-0.1, 0.1))
    for installed, own in ((None, True), (high, True), (BASE, True), (low, False)):
        assert selection_of(BASE, low, installed=installed).keeps_installed is own


def test_early_stopping_counts_from_the_highest_of_the_steps():
    assert selection_of(BASE, UP, BASE, installed=[1.0, 1.0, 1.0, 1.0]).evaluations_without_gain() == 1


def test_a_metric_that_is_not_reported_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"best_metric='mrr'.*one of ndcg@10"):
        CheckpointSelection(lambda step: Evaluation(BASE), "mrr").evaluate_step(0, 0)


def on_a_subset(monkeypatch, on_subset, on_all, installed=None):
    """The selection after steps 0, 1, ..., which were compared on a subset, and the calls of its evaluator."""
    calls = []

    def evaluate(step, subset=None):
        calls.append((step, subset))
        return Evaluation((on_all if subset is None else on_subset)[step])

    own = None if installed is None else lambda model: Installed(Evaluation(installed), "64 tokens")
    selected = CheckpointSelection(evaluate, subset_of=lambda base: SUBSET, evaluate_as_installed=own)
    selected.evaluate_installed(0)
    for step in range(len(on_subset)):
        selected.evaluate_step(step, step)
    model = Model()
    monkeypatch.setattr(selection, "restore_weights", lambda model, weights: model.load(weights))
    selected.restore_best(model, {"step": torch.tensor(0)})
    return selected, model, calls


class Model:
    """A model that stands for the step whose weights it has."""

    step = -1

    def load(self, weights):
        self.step = int(weights["step"])

    def __index__(self):
        return self.step


SUBSET = {"queries": ["q"], "passages": ["p"]}


def test_steps_are_compared_on_a_subset_and_base_and_best_are_evaluated_on_all(monkeypatch):
    selected, model, calls = on_a_subset(monkeypatch, [[0.6], [0.9], [0.8]], [[0.5], [0.7], [0.9]])
    assert calls[:4] == [(0, None), (0, SUBSET), (1, SUBSET), (2, SUBSET)]
    assert calls[4][1] is None
    assert len(calls) == 5
    assert (selected.best_step, model.step) == (1, 1)
    assert (selected.base.values, selected.best.values) == ([0.5], [0.7])
    assert [entry["metrics"]["ndcg@10"] for entry in selected.history] == [0.6, 0.9, 0.8]


def test_a_step_that_beats_the_base_on_the_subset_alone_is_not_kept(monkeypatch, caplog):
    selected, model, _ = on_a_subset(monkeypatch, [[0.6], [0.9]], [[0.5], [0.5]])
    assert (selected.best_step, model.step) == (0, 0)
    assert selected.best is selected.base
    assert int(selected.weights["step"]) == 0
    assert "step 1 is the best of the subset" in caplog.text
    assert "the base is kept" in caplog.text


def test_a_step_that_was_chosen_on_a_subset_must_beat_the_base_as_installed_on_all_data(monkeypatch):
    below, model, _ = on_a_subset(monkeypatch, [[0.3], [0.4]], [[0.5], [0.7]], installed=[0.7])
    assert (below.best_step, below.keeps_installed, model.step) == (0, True, 0)
    above, model, _ = on_a_subset(monkeypatch, [[0.3], [0.4]], [[0.5], [0.7]], installed=[0.6])
    assert (above.best_step, above.kept.values, model.step) == (1, [0.7], 1)


def test_without_a_subset_nothing_is_evaluated_twice(monkeypatch):
    calls = []
    selected = CheckpointSelection(lambda step: calls.append(step) or Evaluation([0.5 + step]))
    for step in range(3):
        selected.evaluate_step(step, step)
    monkeypatch.setattr(selection, "restore_weights", lambda model, weights: None)
    selected.restore_best(2, {})
    assert calls == [0, 1, 2]


def test_a_checkpoint_holds_the_subset(tmp_path):
    selected = CheckpointSelection(lambda step, subset=None: Evaluation([0.5]), subset_of=lambda base: SUBSET)
    selected.evaluate_step(0, 0)
    selected.save(tmp_path)
    resumed = CheckpointSelection(None)
    resumed.load(tmp_path)
    assert resumed.subset == SUBSET
    assert resumed.history == selected.history
