import asyncio
from types import SimpleNamespace

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore, TextNode

from llama_index_lora_embed import LoraEmbedding, compare_retrieval, evaluate_retrieval
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.evaluation import compare, evaluate_index
from tests.conftest import make_dataset


class TableRetriever:
    """Returns the ids that a table has for a query, with repetitions, which LlamaIndex's retrievers remove."""

    def __init__(self, table, scores=True):
        self.table, self.scores = table, scores

    def retrieve(self, query):
        return [
            NodeWithScore(node=TextNode(id_=i, text="x"), score=1 / (rank + 1) if self.scores else None)
            for rank, i in enumerate(self.table.get(query, []))
        ]

    async def aretrieve(self, query):
        return self.retrieve(query)


def index_of(dataset, embed_model):
    return VectorStoreIndex([TextNode(id_=i, text=t) for i, t in dataset.corpus.items()], embed_model=embed_model)


@pytest.mark.parametrize("top_k", [2, 10])
def test_metrics_agree_with_llama_index(tiny_model, top_k):
    dataset = make_dataset()
    embed_model = LoraEmbedding(base_model=tiny_model, device="cpu")
    retriever = index_of(dataset, embed_model).as_retriever(similarity_top_k=top_k)
    ours = evaluate_index(retriever, dataset)
    theirs = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr"], retriever=retriever)
    each = {q: theirs.evaluate(text, dataset.relevant_docs[q]).metric_vals_dict for q, text in dataset.queries.items()}
    for q, values in each.items():
        assert ours.per_query[q]["hit_rate"] == values["hit_rate"]
        assert ours.per_query[q]["mrr"] == pytest.approx(values["mrr"], abs=1e-9)
    assert 0 < ours.metrics["mrr"] < 1
    assert evaluate_index(retriever, dataset, num_workers=4).per_query == ours.per_query
    assert "map@100" not in ours.metrics, "it is defined on complete rankings"
    assert ours.notes == (["No query retrieved more than 2 nodes, so metrics @10 are metrics @2."]
                          if top_k == 2 else [])  # fmt: skip


def test_an_index_with_exact_search_has_the_metrics_of_the_model(tiny_model):
    dataset = make_dataset()
    embed_model = LoraEmbedding(base_model=tiny_model, device="cpu")
    through, direct = evaluate_index(index_of(dataset, embed_model), dataset), evaluate_retrieval(embed_model, dataset)
    for name in ("hit@1", "hit@5", "hit@10", "mrr@10", "ndcg@10", "recall@10"):
        assert through.metrics[name] == pytest.approx(direct.metrics[name], abs=1e-9)
    assert compare(direct, through).difference == pytest.approx(0, abs=1e-9)
    assert compare_retrieval(direct, through, dataset).improved == []
    everything = index_of(dataset, embed_model).as_retriever(similarity_top_k=24)
    assert evaluate_index(everything, dataset).metrics["map@100"] == pytest.approx(direct.metrics["map@100"], abs=1e-6)


def test_empty_repeated_and_unknown_results_are_evaluated_and_reported():
    dataset = make_dataset(passages=12)
    texts = dataset.queries
    table = {text: [f"p{i}" for i in range(11)] for text in texts.values()}
    table |= {texts["q0-0"]: [], texts["q1-0"]: ["p0", "p0", "p1"], texts["q2-0"]: ["elsewhere", "p2"]}
    evaluation = evaluate_index(TableRetriever(table), dataset)
    assert set(evaluation.per_query["q0-0"].values()) == {0.0}
    assert evaluation.rankings["q1-0"] == ["p0", "p1"]
    assert evaluation.per_query["q1-0"]["mrr"] == 1 / 2, "the second p0 takes no rank"
    assert evaluation.similarities["q1-0"] == [1.0, pytest.approx(1 / 3)]
    assert evaluation.per_query["q2-0"]["mrr"] == 1 / 2
    empty, repeated, unknown = evaluation.notes
    assert empty.startswith("1 of 24 queries retrieved nothing (e.g. 'q0-0')")
    assert repeated.startswith("1 of 24 queries retrieved a node more than once (e.g. 'q1-0')")
    assert unknown.startswith("1 of 12 retrieved nodes are not in the dataset (e.g. 'elsewhere')")
    assert evaluate_index(TableRetriever(table, scores=False), dataset).metrics == evaluation.metrics


def test_repeated_nodes_do_not_count_as_depth():
    dataset = make_dataset(passages=12)
    table = {text: ["p0"] * 6 + ["p1"] * 6 for text in dataset.queries.values()}
    assert evaluate_index(TableRetriever(table), dataset).notes[-1].startswith("No query retrieved more than 2 nodes")


def test_a_retriever_without_results_has_metrics_of_zero():
    evaluation = evaluate_index(TableRetriever({}), make_dataset())
    assert set(evaluation.metrics.values()) == {0.0}
    assert evaluation.notes[0].startswith("48 of 48 queries retrieved nothing")


def test_nodes_with_other_ids_are_refused():
    dataset = make_dataset()
    with pytest.raises(DatasetError, match="none of which is in the dataset"):
        evaluate_index(TableRetriever({text: ["elsewhere"] for text in dataset.queries.values()}), dataset)


def test_other_objects_than_retrievers_are_refused(tiny_model):
    for wrong in (None, "index", LoraEmbedding(base_model=tiny_model, device="cpu")):
        with pytest.raises(ConfigError, match="as_retriever"):
            evaluate_index(wrong, make_dataset())
    with pytest.raises(ConfigError, match=r"query_engine\.retriever"):
        evaluate_index(index_of(make_dataset(), MockEmbedding(4)).as_query_engine(llm=MockLLM()), make_dataset())
    with pytest.raises(ConfigError, match=r"aretrieve\(query\)"):
        evaluate_index(SimpleNamespace(retrieve=lambda text: []), make_dataset(), num_workers=2)
    with pytest.raises(ConfigError, match="num_workers"):
        evaluate_index(TableRetriever({}), make_dataset(), num_workers=0)


def test_it_runs_within_a_running_event_loop():
    async def inside():
        return evaluate_index(TableRetriever({}), make_dataset(), num_workers=2)

    assert asyncio.run(inside()).passages == 24
