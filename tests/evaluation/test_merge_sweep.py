"""Choosing the weights of a merge on validation data."""

import pytest

from llama_index_lora_embed import LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.core.errors import BaseModelMismatchError, ConfigError, DatasetError
from llama_index_lora_embed.data.origins import TITLE
from llama_index_lora_embed.deployment import merge_adapters
from llama_index_lora_embed.evaluation import compare, tune_merge, tune_scale
from tests.conftest import make_dataset
from tests.helpers.adapters import random_adapter


@pytest.fixture(scope="module")
def adapters(adapter, tiny_model, tmp_path_factory):
    """One that has learnt something, and a random one."""
    return [adapter, random_adapter(tiny_model, tmp_path_factory.mktemp("random") / "b", 1)]


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(passages=20, seed=11, prefix="w")


@pytest.fixture(scope="module")
def sweep(adapters, dataset):
    return tune_merge(adapters, dataset, weights=[[0.7, 0.3], [0.7, 0.3], (1, 0)], device="cpu")


def test_the_base_and_each_adapter_alone_are_among_the_candidates(sweep, adapters, tiny_model, dataset):
    assert list(sweep.scores()) == [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.7, 0.3)]
    alone = [LoraEmbedding(path, device="cpu") for path in adapters]
    for weights, model in zip(
        sweep.evaluations, [LoraEmbedding(base_model=tiny_model, device="cpu"), *alone], strict=False
    ):
        own = evaluate_retrieval(model, dataset)
        assert sweep.evaluations[weights].metrics == pytest.approx(own.metrics, abs=1e-6)


def test_a_merge_is_evaluated_as_it_would_be_written(sweep, adapters, dataset, tmp_path):
    merge_adapters(adapters, tmp_path / "merged", weights=(0.7, 0.3))
    own = evaluate_retrieval(LoraEmbedding(tmp_path / "merged", device="cpu"), dataset)
    assert sweep.evaluations[0.7, 0.3].metrics == pytest.approx(own.metrics, abs=1e-6)


def test_the_best_is_compared_with_the_base(sweep):
    assert sweep.best != (0.0, 0.0)
    assert sweep.scores()[sweep.best] == max(sweep.scores().values())
    base, best = sweep.evaluations[0.0, 0.0], sweep.evaluations[sweep.best]
    others = base.per_query.keys() - sweep.chosen_on
    assert sweep.comparison == compare(base, best, query_ids=[i for i in base.per_query if i in others])
    assert sweep.comparison.queries == len(others) == 20


def test_the_verdict_knows_what_the_adapters_were_trained_on(adapter):
    """Headings that no adapter was trained on tell more than synthetic queries of the kinds trained on."""
    dataset = make_dataset(passages=32, seed=11, prefix="w")
    headings = dataset.model_copy(update={"query_origins": dict.fromkeys(dataset.queries, TITLE)})
    sweep = tune_merge([adapter, adapter], headings, weights=[], device="cpu")
    base, best = sweep.evaluations[0.0, 0.0], sweep.evaluations[sweep.best]
    others = [i for i in base.per_query if i not in sweep.chosen_on]
    assert sweep.comparison == compare(base, best, query_ids=others, trained_on={"human"})
    assert sweep.comparison != compare(base, best, query_ids=others)
    assert tune_scale(adapter, headings, scales=[0, 1], device="cpu").comparison == sweep.comparison


def test_among_ties_the_weights_closest_to_the_base_are_chosen(adapters):
    dataset = make_dataset(passages=2, questions=1, seed=11, prefix="w")
    sweep = tune_merge(adapters, dataset, metric="recall@10", weights=[], device="cpu")  # ten of two passages
    assert set(sweep.scores().values()) == {1.0}
    assert sweep.best == (0.0, 0.0)
    assert sweep.comparison.difference == 0


def test_the_default_weights_are_around_the_mean(adapters):
    dataset = make_dataset(passages=4, questions=1, seed=11, prefix="w")
    sweep = tune_merge(adapters, dataset, combination="ties", density=0.5, rank=4, device="cpu")
    assert list(sweep.evaluations) == [
        *((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)),
        *((0.5, 0.5), (0.25, 0.25), (0.75, 0.25), (0.25, 0.75)),
    ]


def test_adapters_of_different_bases_are_refused(adapter, other_tiny_model, dataset, tmp_path):
    foreign = random_adapter(other_tiny_model, tmp_path / "foreign", 0)
    with pytest.raises(BaseModelMismatchError, match="different base models"):
        tune_merge([adapter, foreign], dataset, device="cpu")


@pytest.mark.parametrize("weights", [0.5, "mean", [0.5, 0.5], [[0.5]], [[0.5, None]]])
def test_weights_that_do_not_fit_are_refused(adapters, dataset, weights):
    with pytest.raises(ConfigError, match="weights="):
        tune_merge(adapters, dataset, weights=weights, device="cpu")


def test_wrong_arguments_are_refused(adapters, dataset):
    with pytest.raises(ConfigError, match=r"metric='f1'.*ndcg@10"):
        tune_merge(adapters, dataset, metric="f1")
    with pytest.raises(ConfigError, match="a list of folders"):
        tune_merge("runs/a", dataset)
    with pytest.raises(DatasetError):
        tune_merge(adapters, make_dataset(passages=0))
    with pytest.raises(ConfigError, match="combination='mean'"):
        tune_merge(adapters, dataset, combination="mean", device="cpu")
