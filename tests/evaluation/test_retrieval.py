import random

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.errors import DatasetError
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders, query_metrics
from tests.conftest import make_dataset

NAMES = {
    "hit@1": "accuracy@1",
    "hit@5": "accuracy@5",
    "mrr@10": "mrr@10",
    "ndcg@10": "ndcg@10",
    "recall@10": "recall@10",
}


class FixedVectors:
    """Gives each text the vector that a table names; lets the reference evaluator see any ranking."""

    similarity_fn_name = "cosine"

    def __init__(self, table):
        self.table = table

    def encode_query(self, texts, **kwargs):
        return torch.from_numpy(np.stack([self.table[text] for text in texts]))

    encode_document = encode_query

    def similarity(self, queries, passages):
        return queries @ passages.T


@pytest.mark.parametrize("seed", range(5))
def test_measures_agree_with_sentence_transformers_on_random_rankings_with_ties(seed):
    rng = random.Random(seed)
    # two dimensions of small whole numbers give many equal scores
    corpus = {f"p{i}": f"passage {i}" for i in range(60)}
    queries = {f"q{i}": f"query {i}" for i in range(40)}
    relevant = {q: rng.sample(sorted(corpus), rng.randint(1, 14)) for q in queries}
    table = {
        text: np.array([rng.randint(1, 3), rng.randint(1, 3)], dtype=np.float32)
        for text in [*corpus.values(), *queries.values()]
    }
    dataset = EmbeddingQAFinetuneDataset(queries=queries, corpus=corpus, relevant_docs=relevant)

    def encode(texts):
        return np.stack([table[text] for text in texts])

    ours = evaluate_encoders(encode, encode, dataset).metrics
    # unit vectors through the same arithmetic, so that equal scores are equal in both
    unit = {text: vector / np.linalg.norm(vector) for text, vector in table.items()}
    judged = {q: set(ids) for q, ids in relevant.items()}
    evaluator = InformationRetrievalEvaluator(queries, corpus, judged)
    evaluator.store_metrics_in_model_card_data = lambda *args: None  # the table has no model card
    theirs = evaluator(FixedVectors(unit))
    for name, their_name in NAMES.items():
        assert ours[name] == pytest.approx(theirs[f"cosine_{their_name}"], abs=1e-6), name


def test_measures_agree_with_sentence_transformers_on_a_model(tiny_model):
    dataset = make_dataset()
    ours = evaluate_retrieval(LoraEmbedding(base_model=tiny_model, device="cpu"), dataset)
    judged = {q: set(ids) for q, ids in dataset.relevant_docs.items()}
    theirs = InformationRetrievalEvaluator(dataset.queries, dataset.corpus, judged)(
        SentenceTransformer(tiny_model, device="cpu")
    )
    for name, their_name in NAMES.items():
        assert ours.metrics[name] == pytest.approx(theirs[f"cosine_{their_name}"], abs=1e-6), name
    assert ours.passages == 24
    assert ours.origins == {"people": 48}


def test_measures_of_one_ranking_by_hand():
    metrics = query_metrics(["a", "b", "c"], {"b", "z"})
    assert metrics == {
        "hit@1": 0.0,
        "hit@5": 1.0,
        "mrr@10": 0.5,
        "ndcg@10": pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3))),
        "recall@10": 0.5,
    }


def test_a_dataset_that_cannot_be_judged_is_refused(tiny_model):
    embed_model = LoraEmbedding(base_model=tiny_model, device="cpu")
    broken = make_dataset()
    broken.relevant_docs["q0-0"] = ["nowhere"]
    with pytest.raises(DatasetError, match="evaluation dataset"):
        evaluate_retrieval(embed_model, broken)
