import asyncio
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.core import concurrency
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, NonFiniteLossError, OutputDirectoryError
from llama_index_lora_embed.evaluation import aevaluate_retrieval, search
from llama_index_lora_embed.evaluation.embedding_cache import identity
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders
from tests.conftest import make_dataset

NAMES = {
    **{f"hit@{k}": f"accuracy@{k}" for k in (1, 5, 10)},
    **{f"{name}@{k}": f"{name}@{k}" for name in ("recall", "precision") for k in (1, 5, 10)},
    **{name: name for name in ("mrr@10", "ndcg@10", "map@100")},
}
DATA = Path(os.environ.get("LORA_EMBED_DATA", Path(__file__).parents[3] / "shared" / "data"))


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


def random_judgments(seed):
    """(dataset, vector of each text): two dimensions of small whole numbers give many equal scores."""
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
    """(dataset, vector of each text): counts of words by their hash, of which many texts have equal ones."""
    if not (DATA / "tenk_val.json").exists():
        pytest.skip(f"tenk_val.json is not in {DATA}; LORA_EMBED_DATA names another folder")
    dataset = EmbeddingQAFinetuneDataset.from_json(DATA / "tenk_val.json")
    table = {}
    for text in [*dataset.corpus.values(), *dataset.queries.values()]:
        counts = np.zeros(16, dtype=np.float32)
        for word in text.lower().split():
            counts[sum(word.encode()) % 16] += 1
        table[text] = np.minimum(counts, 2)
    return dataset, table


@pytest.mark.parametrize("case", [*range(5), "tenk"])
def test_measures_agree_with_sentence_transformers_and_trec_eval_where_scores_are_tied(case):
    dataset, table = tenk() if case == "tenk" else random_judgments(case)
    # unit vectors through the same arithmetic, so that equal scores are equal in both
    unit = {text: vector / max(np.linalg.norm(vector), 1e-12) for text, vector in table.items()}

    def encode(texts):
        return np.stack([table[text] for text in texts])

    evaluation = evaluate_encoders(encode, encode, dataset)
    judged = {q: set(ids) for q, ids in dataset.relevant_docs.items()}
    evaluator = InformationRetrievalEvaluator(
        dataset.queries, dataset.corpus, judged,
        accuracy_at_k=[1, 5, 10], precision_recall_at_k=[1, 5, 10],
    )  # fmt: skip
    evaluator.store_metrics_in_model_card_data = lambda *args: None  # the table has no model card
    theirs = evaluator(FixedVectors(unit))
    assert any(len(set(scores)) < len(scores) for scores in evaluation.similarities.values()), "scores are tied"
    for name, their_name in NAMES.items():
        assert evaluation.metrics[name] == pytest.approx(theirs[f"cosine_{their_name}"], abs=1e-6), name

    # trec_eval itself, on the tied scores: of equal ones it takes the highest id first, so that ids are turned round
    turned = {i: f"{len(dataset.corpus) - rank:06d}" for rank, i in enumerate(sorted(dataset.corpus))}
    run = {
        q: {turned[i]: score for i, score in zip(ids, evaluation.similarities[q], strict=True)}
        for q, ids in evaluation.rankings.items()
    }
    qrels = {q: {turned[i]: 1 for i in ids} for q, ids in dataset.relevant_docs.items()}
    measures = {"success.1,5,10", "ndcg_cut.10", "map_cut.100", "recall.1,5,10", "P.1,5,10"}
    trec = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    first_ten = {q: dict(list(found.items())[:10]) for q, found in run.items()}
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(first_ten)
    for q, ours in evaluation.per_query.items():
        values = {**trec[q], **reciprocal[q]}
        for name in ours:
            kind, _, k = name.partition("@")
            their = {"hit": f"success_{k}", "precision": f"P_{k}", "recall": f"recall_{k}", "mrr": "recip_rank",
                     "ndcg": "ndcg_cut_10", "map": "map_cut_100"}[kind]  # fmt: skip
            assert ours[name] == pytest.approx(values[their], abs=1e-6), (q, name)


def test_measures_agree_with_sentence_transformers_on_a_model(tiny_model):
    dataset = make_dataset()
    ours = evaluate_retrieval(LoraEmbedding(base_model=tiny_model, device="cpu"), dataset)
    judged = {q: set(ids) for q, ids in dataset.relevant_docs.items()}
    evaluator = InformationRetrievalEvaluator(
        dataset.queries, dataset.corpus, judged, accuracy_at_k=[1, 5, 10], precision_recall_at_k=[1, 5, 10]
    )
    theirs = evaluator(SentenceTransformer(tiny_model, device="cpu"))
    for name, their_name in NAMES.items():
        assert ours.metrics[name] == pytest.approx(theirs[f"cosine_{their_name}"], abs=1e-6), name
    assert ours.passages == 24
    assert ours.origins == {"people": 48}


def test_a_dataset_that_cannot_be_judged_is_refused(tiny_model):
    embed_model = LoraEmbedding(base_model=tiny_model, device="cpu")
    broken = make_dataset()
    broken.relevant_docs["q0-0"] = ["nowhere"]
    with pytest.raises(DatasetError, match="evaluation dataset"):
        evaluate_retrieval(embed_model, broken)


class Fake(BaseEmbedding):
    """Words by their hash, as an API would give them: slowly, so many at a time, counted."""

    dimensions: int = 24
    seconds: float = 0.0
    api_key: str = "secret"
    _calls: list = PrivateAttr(default_factory=list)
    _running: list = PrivateAttr(default_factory=lambda: [0, 0])

    def vector(self, text):
        vector = [0.0] * self.dimensions
        for word in text.split():
            vector[sum(word.encode()) % self.dimensions] += 1.0
        return vector

    def _get_query_embedding(self, query):
        self._calls.append(("query", 1))
        return self.vector(query)

    def _get_text_embedding(self, text):
        return self.vector(text)

    def _get_text_embeddings(self, texts):
        self._calls.append(("texts", len(texts)))
        return [self.vector(text) for text in texts]

    async def _under_way(self, value):
        self._running[0] += 1
        self._running[1] = max(self._running)
        await asyncio.sleep(0.002)
        self._running[0] -= 1
        return value

    async def _aget_query_embedding(self, query):
        return await self._under_way(self._get_query_embedding(query))

    async def _aget_text_embeddings(self, texts):
        return await self._under_way(self._get_text_embeddings(texts))


def test_any_embedding_model_is_judged_and_asynchronously_too():
    dataset, plain, busy = make_dataset(), Fake(embed_batch_size=5), Fake(embed_batch_size=5)
    expected = evaluate_retrieval(plain, dataset)
    found = evaluate_retrieval(busy, dataset, num_workers=3)
    assert found.rankings == expected.rankings
    assert found.metrics == expected.metrics
    assert expected.metrics["hit@5"] > 0.5
    assert busy._running[1] == 3, "as many as allowed at once, and no more"
    assert max(size for kind, size in busy._calls if kind == "texts") == 5

    async def inside():
        also = evaluate_retrieval(Fake(), dataset, num_workers=2)  # as a notebook would call it
        return also, await aevaluate_retrieval(Fake(), dataset)

    for evaluation in asyncio.run(inside()):
        assert evaluation.metrics == expected.metrics


def texts_asked_for(model):
    """How many texts a `Fake` was asked for, but for the probe that tells models apart."""
    return sum(count for _, count in model._calls)


def test_vectors_are_paid_for_once_by_model_and_text(tmp_path):
    dataset, model, cache = make_dataset(), Fake(), tmp_path / "cache"
    first = evaluate_retrieval(model, dataset, cache_folder=cache)
    asked, probes = texts_asked_for(model), 2
    assert asked == 48 + 24 + probes
    again = evaluate_retrieval(model, dataset, cache_folder=cache)
    assert (texts_asked_for(model), again.metrics) == (asked + probes, first.metrics)
    evaluate_retrieval(Fake(api_key="another", embed_batch_size=7), dataset, cache_folder=cache)
    assert len(list(cache.iterdir())) == 1, "keys and batch sizes decide nothing"
    everything = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file())
    assert b"secret" not in everything
    dataset.queries["q0-0"] = "something else"
    dataset.corpus["a first one"] = "w1 w2"
    evaluate_retrieval(model, dataset, cache_folder=cache)
    assert texts_asked_for(model) == asked + 2 * probes + 2, "the one query and the one passage that are new"


def test_models_that_tell_the_same_of_themselves_have_vectors_of_their_own(tmp_path):
    class Private(Fake):
        """Its vectors are decided by what no field tells."""

        _shift: int = PrivateAttr(default=0)

        def vector(self, text):
            vector = super().vector(text)
            return vector[self._shift :] + vector[: self._shift] if "?" in text else vector

    dataset, models = make_dataset(), [Private(), Private(), Fake(), Fake(dimensions=8)]
    models[1]._shift = 5
    plain = [evaluate_retrieval(model, dataset).metrics for model in models]
    assert plain[0] != plain[1]
    for _ in range(2):
        assert [evaluate_retrieval(m, dataset, cache_folder=tmp_path).metrics for m in models] == plain
    assert len(list(tmp_path.iterdir())) == 4


def test_a_cache_that_is_damaged_is_made_anew_and_one_that_cannot_be_is_an_error(tmp_path):
    dataset = make_dataset()
    first = evaluate_retrieval(Fake(), dataset, cache_folder=tmp_path)
    for file in tmp_path.rglob("*.sqlite"):
        file.write_bytes(b"nonsense" * 1000)
    assert evaluate_retrieval(Fake(), dataset, cache_folder=tmp_path).metrics == first.metrics
    model = Fake()
    evaluate_retrieval(model, dataset, cache_folder=tmp_path)
    assert texts_asked_for(model) == 2, "the probes"
    with pytest.raises(OutputDirectoryError, match="cache folder"):
        evaluate_retrieval(Fake(), dataset, cache_folder=__file__)


def test_a_model_that_was_retrained_in_its_folder_is_another_to_the_cache(tiny_model, adapter, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    before = identity(Fake(model_name=str(folder)))
    (folder / "modules.json").write_text((folder / "modules.json").read_text() + " ")
    assert identity(Fake(model_name=str(folder))) != before
    assert before[1] is False
    embed_model = LoraEmbedding(adapter, device="cpu")
    assert identity(embed_model) == (embed_model.fingerprint, True)
    for odd in ("", "x" * 5000, "\0"):
        assert identity(Fake(model_name=odd)) == identity(Fake(model_name=odd))


class Client(Fake):
    """Has what clients of APIs have: connections that belong to the loop of their first use."""

    _loops: set = PrivateAttr(default_factory=set)

    async def _under_way(self, value):
        self._loops.add(id(asyncio.get_running_loop()))
        return await super()._under_way(value)


def test_a_client_stays_in_one_loop():
    model, dataset = Client(embed_batch_size=5), make_dataset(passages=8)
    for _ in range(2):
        evaluate_retrieval(model, dataset, num_workers=3)
    assert len(model._loops) == 1

    async def inside():
        return await aevaluate_retrieval(model := Client(), dataset), model._loops == {id(asyncio.get_running_loop())}

    assert asyncio.run(inside())[1], "the caller's"


def test_work_within_work_is_refused_and_the_loop_lives_on():
    async def inside():
        return evaluate_retrieval(Fake(), make_dataset(passages=4), num_workers=2)

    with pytest.raises(ConfigError, match="Await aevaluate_retrieval"):
        concurrency.run_async(inside())

    async def dies():
        raise SystemExit

    with pytest.raises(SystemExit):
        concurrency.run_async(dies())
    assert evaluate_retrieval(Fake(), make_dataset(passages=4), num_workers=2).passages == 4


def test_a_model_without_a_vector_of_the_probe_is_not_cached(tmp_path):
    class Overflows(Fake):
        def vector(self, text):
            return [float("nan")] * 24 if len(text) > 1000 else super().vector(text)

    evaluate_retrieval(Overflows(), make_dataset(), cache_folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_stops_requests_that_wait(monkeypatch):
    model, dataset = Client(), make_dataset()
    evaluated = threading.Event()

    async def slow(self, value):
        evaluated.set()
        self._running[0] += 1
        await asyncio.sleep(0.2)
        return value

    monkeypatch.setattr(Client, "_under_way", slow)

    def interrupt():
        evaluated.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        evaluate_retrieval(model, dataset, num_workers=2)
    time.sleep(0.5)
    assert model._running[0] <= 6, "of 48"


def test_grades_count_in_ndcg_alone():
    dataset = make_dataset(passages=6)
    dataset.relevant_docs["q0-0"] = ["p0", "p1"]
    binary = evaluate_retrieval(Fake(), dataset)
    dataset.relevance_scores = {"q0-0": {"p0": 0.2, "p1": 1.0}}
    graded = evaluate_retrieval(Fake(), dataset)
    changed = {name for name, value in graded.per_query["q0-0"].items() if value != binary.per_query["q0-0"][name]}
    assert changed == {"ndcg@10"}
    place = {i: rank for rank, i in enumerate(graded.rankings["q0-0"], 1)}
    gain = 0.2 / np.log2(place["p0"] + 1) + 1 / np.log2(place["p1"] + 1)
    assert graded.per_query["q0-0"]["ndcg@10"] == pytest.approx(gain / (1 + 0.2 / np.log2(3)))


def test_what_lies_beyond_the_measures_is_told():
    dataset = make_dataset(passages=6)
    dataset.corpus["twin"] = dataset.corpus["p0"].upper()
    dataset.queries["q0-1"] = dataset.queries["q0-0"]
    dataset.corpus["p5"] = "."
    evaluation = evaluate_encoders(
        lambda texts: np.ones((len(texts), 3)),
        lambda texts: np.array([[0.0] * 3 if text == "." else [1.0] * 3 for text in texts]),
        dataset,
    )
    twins, asked, zero = evaluation.notes
    assert "1 of 7 passages have the text of another ('twin')" in twins
    assert "1 of 12 queries have the wording of another ('q0-1')" in asked
    assert "1 passage vector(s) are zero" in zero


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


def test_what_is_no_embedding_model_or_gives_no_array_is_refused(tmp_path):
    class Ragged(Fake):
        def vector(self, text):
            return [1.0] * len(text)

    with pytest.raises(ConfigError, match="different dimensions"):
        evaluate_retrieval(Ragged(), make_dataset())
    for wrong in (None, "a-model", Fake):
        with pytest.raises(ConfigError, match="a LlamaIndex BaseEmbedding"):
            evaluate_retrieval(wrong, make_dataset())
    for wrong in (0, True, "2"):
        with pytest.raises(ConfigError, match="num_workers"):
            evaluate_retrieval(Fake(), make_dataset(), num_workers=wrong)


@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_model_that_leaves_texts_out_is_refused(num_workers):
    class Skips(Fake):
        def _get_text_embeddings(self, texts):
            return super()._get_text_embeddings(texts)[:-1]

    with pytest.raises(ConfigError, match="vectors of 24 texts from Skips"):
        evaluate_retrieval(Skips(), make_dataset(), num_workers=num_workers)
    with pytest.raises(ConfigError, match=r"query vectors of the shape \(47, 3\)"):
        evaluate_encoders(lambda t: np.ones((len(t) - 1, 3)), lambda t: np.ones((len(t), 3)), make_dataset())


@pytest.mark.parametrize("block", [(3, 7), (256, 5), (1, 16_384)])
def test_search_in_blocks_is_exact_with_ties_in_the_order_of_rows(block, monkeypatch):
    monkeypatch.setattr(search, "_QUERIES", block[0])
    monkeypatch.setattr(search, "_PASSAGES", block[1])
    rng = np.random.default_rng(1)
    queries, passages = (rng.integers(0, 3, (n, 4)).astype(np.float32) for n in (9, 40))
    rows, scores = search.nearest(queries, passages, 10)
    every = queries @ passages.T
    expected = np.argsort(-every, axis=1, kind="stable")[:, :10]
    assert (rows == expected).all()
    assert (scores == np.take_along_axis(every, expected, axis=1)).all()
    assert search.nearest(queries, passages, 100)[0].shape == (9, 40)


def test_scores_are_float32_whatever_the_vectors_were_made_in():
    rng = np.random.default_rng(2)
    queries, passages = (rng.normal(size=(n, 64)).astype(np.float32) for n in (20, 300))
    expected = search.nearest(queries, passages, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = search.nearest(queries, passages, 20)
    assert (found[0] == expected[0]).all()
    assert (found[1] == expected[1]).all()
