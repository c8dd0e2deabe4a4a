import numpy as np
import pytest

from llama_index_lora_embed.evaluation.significance import paired_intervals, percentile_interval, sign_test


def test_intervals_are_percentiles_of_resampled_means():
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 1, (200, 3))
    for column, (low, high) in zip(values.T, paired_intervals(values), strict=True):
        error = column.std() / np.sqrt(200)
        assert low == pytest.approx(column.mean() - 1.96 * error, abs=0.25 * error)
        assert high == pytest.approx(column.mean() + 1.96 * error, abs=0.25 * error)
    assert paired_intervals(values) == paired_intervals(values)
    assert paired_intervals(values) != paired_intervals(values, seed=1)
    assert percentile_interval(list(range(101))) == (2.5, 97.5)
    assert paired_intervals(values[:1]) == [(-1, 1)] * 3
    assert sign_test(0, 0) == 1
    assert sign_test(10, 0) == pytest.approx(2 / 2**10)


@pytest.mark.parametrize("count", [10, 12, 30])
def test_equal_models_rarely_differ_on_few_queries(count):
    """Intervals of equally good models exclude 0 in about one of twenty cases, whatever the number of queries."""
    rng, wrong = np.random.default_rng(count), 0
    for seed in range(300):
        change = rng.choice([0, 0, -1, 1], count) * rng.choice([0.1, 0.4, 0.6], count)
        low, high = paired_intervals(change[:, None], seed=seed)[0]
        wrong += low > 0 or high < 0
    assert wrong / 300 < 0.09
