import asyncio
import random

import numpy as np
import pytest
import pytrec_eval
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, NonFiniteLossError
from llama_index_lora_embed.evaluation import aevaluate_retrieval
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders
from tests.conftest import make_dataset
from tests.helpers.datasets import data_file
from tests.helpers.evaluation import WordCountEmbedding

NAMES = {
    **{f"hit@{k}": f"accuracy@{k}" for k in (1, 5, 10)},
    **{f"{name}@{k}": f"{name}@{k}" for name in ("recall", "precision") for k in (1, 5, 10)},
    **{name: name for name in ("mrr@10", "ndcg@10", "map@100")},
}


class TableModel:
    """Gives each text the vector of a table, so that the reference evaluator sees the same scores."""

    similarity_fn_name = "cosine"

    def __init__(self, table):
        self.table = table

    def encode_query(self, texts, **kwargs):
        return torch.from_numpy(np.stack([self.table[text] for text in texts]))

    encode_document = encode_query

    def similarity(self, queries, passages):
        return queries @ passages.T


def random_judgments(seed):
    """A dataset, and small integers in two dimensions as vectors of its texts, which give many ties."""
    rng = random.Random(seed)
    corpus = {f"p{i}": f"passage {i}" for i in range(160)}
    queries = {f"q{i}": f"query {i}" for i in range(40)}
    relevant = {q: rng.sample(sorted(corpus), rng.randint(1, 14)) for q in queries}
    table = {
        text: np.array([rng.randint(1, 3), rng.randint(1, 3)], dtype=np.float32)
        for text in [*corpus.values(), *queries.values()]
    }
    return EmbeddingQAFinetuneDataset(queries=queries, corpus=corpus, relevant_docs=relevant), table


def tenk():
    """A dataset, and truncated counts of hashed words as vectors of its texts, which give many ties."""
    dataset = EmbeddingQAFinetuneDataset.from_json(data_file("tenk_val.json"))
    table = {}
    for text in [*dataset.corpus.values(), *dataset.queries.values()]:
        counts = np.zeros(16, dtype=np.float32)
        for word in text.lower().split():
            counts[sum(word.encode()) % 16] += 1
        table[text] = np.minimum(counts, 2)
    return dataset, table


@pytest.mark.parametrize("case", [*range(5), "tenk"])
def test_metrics_of_tied_scores_agree_with_sentence_transformers_and_trec_eval(case):
    dataset, table = tenk() if case == "tenk" else random_judgments(case)
    # unit vectors through the same arithmetic, so that equal scores are equal in both
    unit = {text: vector / max(np.linalg.norm(vector), 1e-12) for text, vector in table.items()}

    def encode(texts):
        return np.stack([table[text] for text in texts])

    evaluation = evaluate_encoders(encode, encode, dataset)
    relevant = {q: set(ids) for q, ids in dataset.relevant_docs.items()}
    evaluator = InformationRetrievalEvaluator(
        dataset.queries, dataset.corpus, relevant,
        accuracy_at_k=[1, 5, 10], precision_recall_at_k=[1, 5, 10],
    )  # fmt: skip
    evaluator.store_metrics_in_model_card_data = lambda *args: None  # the table model has no model card
    theirs = evaluator(TableModel(unit))
    assert any(len(set(scores)) < len(scores) for scores in evaluation.similarities.values()), "scores are tied"
    for name, their_name in NAMES.items():
        assert evaluation.metrics[name] == pytest.approx(theirs[f"cosine_{their_name}"], abs=1e-6), name

    # trec_eval ranks ties by descending id, so the order of the ids is reversed
    reversed_ids = {i: f"{len(dataset.corpus) - rank:06d}" for rank, i in enumerate(sorted(dataset.corpus))}
    run = {
        q: {reversed_ids[i]: score for i, score in zip(ids, evaluation.similarities[q], strict=True)}
        for q, ids in evaluation.rankings.items()
    }
    qrels = {q: {reversed_ids[i]: 1 for i in ids} for q, ids in dataset.relevant_docs.items()}
    metrics = {"success.1,5,10", "ndcg_cut.10", "map_cut.100", "recall.1,5,10", "P.1,5,10"}
    trec = pytrec_eval.RelevanceEvaluator(qrels, metrics).evaluate(run)
    first_ten = {q: dict(list(found.items())[:10]) for q, found in run.items()}
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(first_ten)
    for q, ours in evaluation.per_query.items():
        values = {**trec[q], **reciprocal[q]}
        for name in ours:
            kind, _, k = name.partition("@")
            their = {"hit": f"success_{k}", "precision": f"P_{k}", "recall": f"recall_{k}", "mrr": "recip_rank",
                     "ndcg": "ndcg_cut_10", "map": "map_cut_100"}[kind]  # fmt: skip
            assert ours[name] == pytest.approx(values[their], abs=1e-6), (q, name)


def test_metrics_of_a_model_agree_with_sentence_transformers(tiny_model):
    dataset = make_dataset()
    ours = evaluate_retrieval(LoraEmbedding(base_model=tiny_model, device="cpu"), dataset)
    relevant = {q: set(ids) for q, ids in dataset.relevant_docs.items()}
    evaluator = InformationRetrievalEvaluator(
        dataset.queries, dataset.corpus, relevant, accuracy_at_k=[1, 5, 10], precision_recall_at_k=[1, 5, 10]
    )
    theirs = evaluator(SentenceTransformer(tiny_model, device="cpu"))
    for name, their_name in NAMES.items():
        assert ours.metrics[name] == pytest.approx(theirs[f"cosine_{their_name}"], abs=1e-6), name
    assert ours.passages == 24
    assert ours.origins == {"human": 48}


def test_an_inconsistent_dataset_is_refused(tiny_model):
    embed_model = LoraEmbedding(base_model=tiny_model, device="cpu")
    broken = make_dataset()
    broken.relevant_docs["q0-0"] = ["nowhere"]
    with pytest.raises(DatasetError, match="evaluation dataset"):
        evaluate_retrieval(embed_model, broken)


def test_any_embedding_model_is_evaluated_synchronously_and_asynchronously():
    dataset, model = make_dataset(), WordCountEmbedding(embed_batch_size=5)
    expected = evaluate_retrieval(WordCountEmbedding(embed_batch_size=5), dataset)
    found = evaluate_retrieval(model, dataset, num_workers=3)
    assert found.rankings == expected.rankings
    assert found.metrics == expected.metrics
    assert expected.metrics["hit@5"] > 0.5
    assert model._running[1] == 3, "as many concurrent requests as allowed"
    assert max(size for kind, size in model._calls if kind == "texts") == 5

    async def in_a_running_loop():
        also = evaluate_retrieval(WordCountEmbedding(), dataset, num_workers=2)  # as in a notebook
        return also, await aevaluate_retrieval(WordCountEmbedding(), dataset)

    for evaluation in asyncio.run(in_a_running_loop()):
        assert evaluation.metrics == expected.metrics


def test_grades_affect_only_ndcg():
    dataset = make_dataset(passages=6)
    dataset.relevant_docs["q0-0"] = ["p0", "p1"]
    binary = evaluate_retrieval(WordCountEmbedding(), dataset)
    dataset.relevance_scores = {"q0-0": {"p0": 0.2, "p1": 1.0}}
    graded = evaluate_retrieval(WordCountEmbedding(), dataset)
    changed = {name for name, value in graded.per_query["q0-0"].items() if value != binary.per_query["q0-0"][name]}
    assert changed == {"ndcg@10"}
    rank_of = {i: rank for rank, i in enumerate(graded.rankings["q0-0"], 1)}
    gain = 0.2 / np.log2(rank_of["p0"] + 1) + 1 / np.log2(rank_of["p1"] + 1)
    assert graded.per_query["q0-0"]["ndcg@10"] == pytest.approx(gain / (1 + 0.2 / np.log2(3)))


def test_repeated_texts_and_zero_vectors_are_reported():
    dataset = make_dataset(passages=6)
    dataset.corpus["twin"] = dataset.corpus["p0"].upper()
    dataset.queries["q0-1"] = dataset.queries["q0-0"]
    dataset.corpus["p5"] = "."
    evaluation = evaluate_encoders(
        lambda texts: np.ones((len(texts), 3)),
        lambda texts: np.array([[0.0] * 3 if text == "." else [1.0] * 3 for text in texts]),
        dataset,
    )
    passages, queries, zero = evaluation.notes
    assert "1 of 7 passages have the same text as another one ('twin')" in passages
    assert "1 of 12 queries have the same text as another one ('q0-1')" in queries
    assert "1 of 7 passage vectors are zero" in zero


@pytest.mark.parametrize(
    ("queries", "passages", "error", "words"),
    [
        (lambda n: np.ones((n, 3)), lambda n: np.ones((n, 4)), ConfigError, "query vectors of 3 and passage vectors"),
        (lambda n: np.full((n, 3), np.nan), lambda n: np.ones((n, 3)), NonFiniteLossError, r"12 of 12 query .*'q0-0'"),
        (lambda n: np.ones((n, 3)), lambda n: np.full((n, 3), np.inf), NonFiniteLossError, "6 of 6 passage vectors"),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused(queries, passages, error, words):
    with pytest.raises(error, match=words):
        evaluate_encoders(lambda t: queries(len(t)), lambda t: passages(len(t)), make_dataset(passages=6))
