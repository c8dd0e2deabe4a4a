import random
import warnings
from collections import Counter

import numpy as np
import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
)
from sklearn.metrics import roc_auc_score

from llama_index_lora_embed import LabelledPairs, LoraEmbedding
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, NonFiniteLossError
from llama_index_lora_embed.evaluation import evaluate_pairs
from llama_index_lora_embed.evaluation.pairs import best_threshold, evaluate_pair_encoders, pair_metrics
from tests.conftest import WORDS


class TableEmbedding(BaseEmbedding):
    """Gives texts the vectors of a table, and records the requests."""

    table: dict[str, list[float]]
    requested: dict[str, list[str]] = Field(default_factory=lambda: {"query": [], "text": []})

    def _get_query_embedding(self, query):
        self.requested["query"].append(query)
        return self.table[query]

    async def _aget_query_embedding(self, query):
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text):
        self.requested["text"].append(text)
        return self.table[text]


def random_pairs(count=120, seed=0, graded=False, **kwargs):
    rng = random.Random(seed)
    texts = [" ".join(rng.sample(WORDS, rng.randint(2, 9))) for _ in range(count)]  # some texts occur twice
    # pairs of a text with itself all have the similarity 1, and rounding would decide their order
    chosen = {tuple(sorted(rng.sample(texts, 2))) for _ in range(count)}
    scores = [rng.random() if graded else float(rng.random() < 0.4) for _ in chosen]
    return LabelledPairs(*zip(*sorted(chosen), strict=True), scores, **kwargs)


def from_table(table, **kwargs):
    def encode(texts):
        return np.array([table[text] for text in texts], dtype=np.float32)

    return evaluate_pair_encoders(encode, encode, LabelledPairs(**kwargs))


@pytest.mark.parametrize("seed", range(3))
def test_binary_metrics_agree_with_sentence_transformers(tiny_model, seed):
    pairs = random_pairs(seed=seed)
    ours = evaluate_pairs(LoraEmbedding(base_model=tiny_model, device="cpu"), pairs)
    evaluator = BinaryClassificationEvaluator(pairs.texts1, pairs.texts2, [int(score) for score in pairs.scores])
    theirs = evaluator(SentenceTransformer(tiny_model, device="cpu"))
    assert ours.metrics["average_precision"] == pytest.approx(theirs["cosine_ap"], abs=1e-6)
    assert ours.metrics["accuracy"] == pytest.approx(theirs["cosine_accuracy"], abs=1e-6)
    assert ours.threshold == pytest.approx(theirs["cosine_accuracy_threshold"], abs=1e-6)
    assert list(ours.metrics) == ["roc_auc", "average_precision", "accuracy", "spearman", "pearson"]
    assert (ours.binary, ours.metric) == (True, "roc_auc")
    assert ours.origins == {"positive": pairs.positives, "negative": len(pairs) - pairs.positives}


@pytest.mark.parametrize("graded", [False, True])
def test_correlations_agree_with_sentence_transformers(tiny_model, graded):
    pairs = random_pairs(seed=5, graded=graded)
    ours = evaluate_pairs(LoraEmbedding(base_model=tiny_model, device="cpu"), pairs)
    evaluator = EmbeddingSimilarityEvaluator(pairs.texts1, pairs.texts2, pairs.scores)
    theirs = evaluator(SentenceTransformer(tiny_model, device="cpu"))
    assert ours.metrics["spearman"] == pytest.approx(theirs["spearman_cosine"], abs=1e-6)
    assert ours.metrics["pearson"] == pytest.approx(theirs["pearson_cosine"], abs=1e-6)


def test_graded_pairs_have_correlations_only(tiny_model):
    pairs = random_pairs(graded=True)
    evaluation = evaluate_pairs(LoraEmbedding(base_model=tiny_model, device="cpu"), pairs)
    assert list(evaluation.metrics) == ["spearman", "pearson"]
    assert (evaluation.binary, evaluation.metric, evaluation.threshold) == (False, "spearman", None)
    assert evaluation.origins == {"graded": len(pairs)}


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_tied_similarities_follow_their_definitions(seed):
    rng = np.random.default_rng(seed)
    similarities = rng.integers(0, 8, 90) / 8
    labels = (rng.random(90) < 0.3).astype(float)
    metrics = pair_metrics(similarities, labels)
    ones, zeros = similarities[labels == 1], similarities[labels == 0]
    by_hand = np.mean([(one > zero) + (one == zero) / 2 for one in ones for zero in zeros])
    assert metrics["roc_auc"] == pytest.approx(by_hand, abs=1e-12)
    assert metrics["roc_auc"] == pytest.approx(roc_auc_score(labels, similarities), abs=1e-12)
    thresholds = [*np.unique(similarities), 2.0]
    assert metrics["accuracy"] == pytest.approx(max(np.mean((similarities >= t) == labels) for t in thresholds))
    assert metrics["spearman"] == pytest.approx(spearmanr(similarities, labels).statistic)
    assert metrics["pearson"] == pytest.approx(pearsonr(similarities, labels).statistic)


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_gives_the_accuracy_that_is_reported(seed):
    rng = np.random.default_rng(seed)
    similarities = np.round(rng.random(30), 1)
    if seed % 2:  # neighbouring floats, between which there is no middle
        similarities = np.nextafter(0.5, rng.integers(0, 2, 30).astype(float))
    labels = (rng.random(30) < (0.1 if seed % 3 else 0.6)).astype(float)
    accuracy, threshold = best_threshold(similarities, labels)
    assert np.mean((similarities >= threshold) == labels) == pytest.approx(accuracy)


def test_thresholds_by_hand():
    assert best_threshold(np.array([0.9, 0.5, 0.1]), np.array([1.0, 1.0, 0.0])) == (1.0, pytest.approx(0.3))
    assert best_threshold(np.array([0.9, 0.1]), np.array([1.0, 1.0])) == (1.0, pytest.approx(0.1))
    accuracy, threshold = best_threshold(np.array([0.9, 0.1, 0.0]), np.array([0.0, 1.0, 0.0]))
    assert accuracy == pytest.approx(2 / 3)
    assert threshold > 0.9


def test_equal_similarities_give_chance_without_a_warning():
    texts = {"texts1": ["a", "a", "b", "b"], "texts2": ["a", "b", "b", "c"]}
    table = {"a": [1, 0], "b": [2, 0], "c": [5, 0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        binary = from_table(table, **texts, scores=[1, 0, 0, 0])
        graded = from_table(table, **texts, scores=[0.5, 0, 0, 0.2])
    assert binary.metrics == {
        "roc_auc": 0.5,
        "average_precision": 0.25,
        "accuracy": 0.75,
        "spearman": 0.0,
        "pearson": 0.0,
    }
    assert graded.metrics == {"spearman": 0.0, "pearson": 0.0}


def test_similarities_are_cosines_in_the_order_of_the_pairs():
    evaluation = from_table(
        {"a": [3, 0], "b": [0, 5], "c": [-1, 0], "d": [2, 2], "none": [0, 0]},
        texts1=["a", "a", "a", "a", "none"],
        texts2=["b", "c", "d", "a", "a"],
        scores=[0, 0, 0.5, 1, 0],
    )
    assert evaluation.similarities == pytest.approx([0, -1, np.sqrt(0.5), 1, 0])
    assert evaluation.labels.tolist() == [0, 0, 0.5, 1, 0]
    assert np.abs(evaluation.similarities).max() <= 1


def test_there_are_no_metrics_of_single_pairs(tiny_model):
    assert evaluate_pairs(LoraEmbedding(base_model=tiny_model, device="cpu"), random_pairs()).scores("roc_auc") == []


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_text_is_encoded_once_on_its_side(symmetric):
    rows = [("a", "b", 1), ("a", "c", 0), ("b", "a", 1)]
    model = TableEmbedding(table={"a": [1, 0], "b": [1, 1], "c": [0, 1]})
    evaluation = evaluate_pairs(model, LabelledPairs.from_rows(rows, symmetric=symmetric))
    queries, texts = Counter(model.requested["query"]), Counter(model.requested["text"])
    assert queries == ({} if symmetric else {"a": 1, "b": 1})
    assert texts == {"a": 1, "b": 1, "c": 1}
    assert evaluation.metrics["roc_auc"] == 1


def test_the_query_side_is_used_for_the_first_texts_only():
    pairs = LabelledPairs(["a", "b"], ["x", "y"], [1, 0], symmetric=False)
    queries = {"a": [1, 0], "b": [1, 0]}
    passages = {"x": [1, 0], "y": [0, 1]}
    evaluation = evaluate_pair_encoders(
        lambda texts: np.array([queries[t] for t in texts]), lambda texts: np.array([passages[t] for t in texts]), pairs
    )
    assert evaluation.similarities.tolist() == [1, 0]


def test_prompts_of_the_query_side_count(tiny_model):
    model = LoraEmbedding(base_model=tiny_model, device="cpu", query_prompt="query : ")
    rows = list(zip(*(getattr(random_pairs(), name) for name in ("texts1", "texts2", "scores")), strict=True))
    passages, roles = (
        evaluate_pairs(model, LabelledPairs.from_rows(rows, symmetric=symmetric)) for symmetric in (True, False)
    )
    assert not np.allclose(passages.similarities, roles.similarities)


def test_rows_and_files_are_evaluated_as_they_are(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,label\na,b,yes\na,c,no\n")
    model = TableEmbedding(table={"a": [1, 0], "b": [1, 1], "c": [0, 1]})
    from_rows, from_path = evaluate_pairs(model, [("a", "b", 1), ("a", "c", 0)]), evaluate_pairs(model, path)
    assert from_rows.metrics == from_path.metrics
    assert from_rows.digest == from_path.digest
    assert from_path.source == "pairs.csv"
    path.write_text("one,two\na,b\n")
    with pytest.raises(ConfigError, match="no column"):
        evaluate_pairs(model, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(NonFiniteLossError, match="1 of 3 text vectors"):
        from_table({"a": [1, 0], "b": [value, 1], "c": [0, 1]}, texts1=["a", "a"], texts2=["b", "c"], scores=[1, 0])


def test_pairs_that_cannot_be_evaluated_on_are_refused():
    for scores in ([1, 1], [1, None], [1, 2]):
        with pytest.raises(DatasetError, match="evaluation pairs"):
            from_table({}, texts1=["a", "b"], texts2=["c", "d"], scores=scores)
    with pytest.raises(DatasetError, match="NoneType"):
        evaluate_pairs(TableEmbedding(table={}), None)
