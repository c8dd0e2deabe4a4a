import numpy as np
import pytest
from scipy.stats import binomtest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, compare_retrieval
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.evaluation import Verdict, compare, evaluate_retrieval
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders
from llama_index_lora_embed.evaluation.significance import interval, paired_intervals, sign_test
from llama_index_lora_embed.evaluation.slices import slices_of
from tests.conftest import make_dataset


def judged(noise, dataset, seed=0):
    """An evaluation by vectors that are the further from the answer's, the more noise there is."""
    rng, own = np.random.default_rng(seed), np.random.default_rng([seed, int(100 * noise)])
    vectors = {text: rng.normal(size=16) for text in dataset.corpus.values()}
    for query_id, text in dataset.queries.items():
        vectors[text] = vectors[dataset.corpus[dataset.relevant_docs[query_id][0]]] + noise * own.normal(size=16)

    def encode(texts):
        return np.stack([vectors[text] for text in texts])

    return evaluate_encoders(encode, encode, dataset)


@pytest.fixture(scope="module")
def many():
    return make_dataset(passages=100)


@pytest.fixture(scope="module")
def both(many):
    return judged(2.0, many), judged(1.0, many)


def test_every_measure_has_its_difference_interval_and_sign_test(many, both):
    base, tuned = both
    found = compare_retrieval(base, tuned, many)
    assert found.verdict is Verdict.BETTER
    assert found.comparison == compare(base, tuned)
    assert list(found.measures) == list(base.metrics)
    for name, measured in found.measures.items():
        change = np.array(tuned.scores(name)) - np.array(base.scores(name))
        assert measured.difference == pytest.approx(change.mean())
        assert (measured.won, measured.lost) == ((change > 0).sum(), (change < 0).sum())
        assert measured.interval[0] <= measured.difference <= measured.interval[1]
        assert measured.p_value == pytest.approx(binomtest(measured.won, measured.won + measured.lost).pvalue)
    assert found.measures["ndcg@10"].interval == pytest.approx(found.comparison.interval, abs=1e-12)
    same = compare_retrieval(base, base, many)
    assert same.measures["ndcg@10"].p_value == 1
    assert (same.verdict, same.won, same.lost) == (Verdict.NO_CLEAR_DIFFERENCE, [], [])
    assert compare_retrieval(tuned, base, many).verdict is Verdict.WORSE


def test_queries_won_and_lost_with_what_each_model_found(many, both):
    base, tuned = both
    found = compare_retrieval(base, tuned, many)
    assert [q.change for q in found.won] == sorted((q.change for q in found.won), reverse=True)
    assert [q.change for q in found.lost] == sorted(q.change for q in found.lost)
    assert len(found.queries) == 200
    assert len(found.won) == found.comparison.won > len(found.lost) == found.comparison.lost > 0
    first = found.won[0]
    assert first.text == many.queries[first.query_id]
    assert first.relevant == tuple(many.relevant_docs[first.query_id])
    assert list(first.base_found) == base.rankings[first.query_id][:5]
    assert list(first.tuned_found) == tuned.rankings[first.query_id][:5]
    assert first.relevant[0] in first.tuned_found[:1]


def test_a_canary_dies_of_a_drop_beyond_its_limit(many, both):
    better, worse = (
        compare_retrieval(*both, many, regression_set=both),
        compare_retrieval(*both, many, regression_set=both[::-1]),
    )
    assert better.regression_set.alive
    assert str(better).endswith("general queries, -0.020 allowed.")
    assert not worse.regression_set.alive
    assert "REGRESSED" in str(worse)
    assert worse.verdict is Verdict.BETTER, "of the dataset itself"
    drop = -worse.regression_set.measured.difference
    assert compare_retrieval(*both, many, regression_set=both[::-1], regression_limit=drop + 1e-6).regression_set.alive
    assert not compare_retrieval(
        *both, many, regression_set=both[::-1], regression_limit=drop - 1e-6
    ).regression_set.alive
    for wrong in (-0.1, 2, True, "0.1"):
        with pytest.raises(ConfigError, match="regression_limit"):
            compare_retrieval(*both, many, regression_set=both, regression_limit=wrong)
    with pytest.raises(ConfigError, match="a regression_set dataset"):
        compare_retrieval(*both, many, regression_set=make_dataset())
    for wrong in ((make_dataset(), make_dataset()), (*both, both[0]), ()):
        with pytest.raises(ConfigError, match="regression_set with"):
            compare_retrieval(*both, many, regression_set=wrong)


def test_names_are_two_and_differ(many, both):
    for wrong in (("a", "a"), ("a",), ("a", "b", "c"), ("a", 1), ("a", " ")):
        with pytest.raises(ConfigError, match="two different texts"):
            compare_retrieval(*both, many, names=wrong)


def test_models_are_evaluated_on_dataset_and_canary(tiny_model, adapter, tmp_path):
    dataset, general = make_dataset(passages=10, seed=7, prefix="v"), make_dataset(passages=30, seed=9)
    base, tuned = LoraEmbedding(base_model=tiny_model, device="cpu"), LoraEmbedding(adapter, device="cpu")
    found = compare_retrieval(base, tuned, dataset, regression_set=general, cache_folder=tmp_path / "vectors")
    assert found.base.metrics == evaluate_retrieval(base, dataset).metrics
    assert found.tuned.metrics == evaluate_retrieval(tuned, dataset).metrics
    assert found.regression_set.queries == 60
    assert found.regression_set.measured.tuned == pytest.approx(evaluate_retrieval(tuned, general).metrics["ndcg@10"])
    assert {path.name for path in (tmp_path / "vectors").iterdir()} == {base.fingerprint, tuned.fingerprint}


def test_slices_cover_what_they_say(tiny_model):
    dataset = make_dataset(passages=30)
    ids = list(dataset.queries)
    for number, query_id in enumerate(ids):
        dataset.queries[query_id] = " ".join(f"w{i:03d}" for i in range(number % 9 + 4)) + ("?" if number % 2 else "")
    dataset.query_origins = {i: ("title" if number < 10 else "people") for number, i in enumerate(ids)}
    dataset.corpus["p0"] = " ".join(["w1"] * 100)
    model = LoraEmbedding(base_model=tiny_model, device="cpu")  # reads 16 tokens
    found = {(by, name): members for by, name, members in slices_of(dataset, model, {"mine": ids[:3]})}
    by = {}
    for kind, name in found:
        by.setdefault(kind, []).append(name)
    assert [name.split()[0] for name in by["length"]] == ["up", "up", "more"]
    assert by["style"] == ["question", "keywords", "statement"]
    assert by["origin"] == ["people", "title"]
    assert by["source"][-1] == "5 others"
    assert by["truncated"] == ["passage whole", "passage cut"]
    assert found["truncated", "passage cut"] == ["q0-0", "q0-1"]
    assert found["own", "mine"] == ids[:3]
    for kind in ("length", "style", "origin", "source", "truncated"):
        members = [i for name in by[kind] for i in found[kind, name]]
        assert sorted(members) == sorted(ids), f"{kind} has every query once"
    limits = [int(name.split()[-2]) for name in by["length"]]
    sizes = [[len(dataset.queries[i]) for i in found["length", name]] for name in by["length"]]
    assert max(sizes[0]) == limits[0] < min(sizes[1])
    assert max(sizes[1]) == limits[1] == limits[2] < min(sizes[2])
    assert "truncated" not in {kind for kind, _, _ in slices_of(dataset, object())}, "nobody knows what it reads"


def test_slices_are_compared_and_those_that_cannot_be_are_refused(many, both):
    ids = list(many.queries)
    found = compare_retrieval(*both, many, slices={"first": ids[:50], "one": ids[:1]})
    mine = {s.name: s for s in found.slices if s.by == "own"}
    change = [both[1].per_query[i]["ndcg@10"] - both[0].per_query[i]["ndcg@10"] for i in ids[:50]]
    assert mine["first"].queries == 50
    assert mine["first"].measured.difference == pytest.approx(np.mean(change))
    assert mine["one"].measured.interval == (-1, 1), "one query says nothing of others"
    with pytest.raises(DatasetError, match="slice") as caught:
        compare_retrieval(*both, many, slices={"empty": [], "odd": ["nowhere"], "text": "no-id"})
    assert len(caught.value.problems) == 3
    as_arrays = compare_retrieval(*both, many, slices={"first": np.array(ids[:50]), "one": iter(ids[:1])})
    assert [s.queries for s in as_arrays.slices if s.by == "own"] == [50, 1]
    assert "'empty' has no queries" in caught.value.problems[0]


def test_evaluations_of_other_queries_are_refused(many, both):
    other = make_dataset(passages=5)
    with pytest.raises(DatasetError, match="which are not the same"):
        compare_retrieval(*both, other)
    larger = many.model_copy(update={"corpus": {**many.corpus, "more": "w1"}})
    with pytest.raises(DatasetError, match="different datasets"):
        compare(both[0], judged(1.0, larger))
    with pytest.raises(DatasetError, match="200 queries and 100 passages, and a dataset of 200 and 101"):
        compare_retrieval(*both, larger)
    with pytest.raises(DatasetError, match="with 1 problem"):
        compare_retrieval(*both, EmbeddingQAFinetuneDataset(queries={"q": "x"}, corpus={"p": "y"}, relevant_docs={}))


def test_intervals_are_percentiles_of_resampled_means():
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 1, (200, 3))
    for column, (low, high) in zip(values.T, paired_intervals(values), strict=True):
        error = column.std() / np.sqrt(200)
        assert low == pytest.approx(column.mean() - 1.96 * error, abs=0.25 * error)
        assert high == pytest.approx(column.mean() + 1.96 * error, abs=0.25 * error)
    assert paired_intervals(values) == paired_intervals(values)
    assert paired_intervals(values) != paired_intervals(values, seed=1)
    assert interval(list(range(101))) == (2.5, 97.5)
    assert paired_intervals(values[:1]) == [(-1, 1)] * 3
    assert sign_test(0, 0) == 1
    assert sign_test(10, 0) == pytest.approx(2 / 2**10)


@pytest.mark.parametrize("count", [10, 12, 30])
def test_a_verdict_is_rarely_wrong_on_few_questions(count):
    """Of models that are equally good: one verdict in twenty by chance, whatever the number of questions."""
    rng, wrong = np.random.default_rng(count), 0
    for seed in range(300):
        change = rng.choice([0, 0, -1, 1], count) * rng.choice([0.1, 0.4, 0.6], count)
        low, high = paired_intervals(change[:, None], seed=seed)[0]
        wrong += low > 0 or high < 0
    assert wrong / 300 < 0.09


def test_so_few_questions_that_one_decides_have_no_verdict():
    for count in (1, 2, 4):
        few = make_dataset(passages=count)
        found = compare_retrieval(judged(9.0, few), judged(0.01, few), few)
        assert found.verdict is Verdict.NO_CLEAR_DIFFERENCE
        assert "too few to tell" in str(found)
