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


class Listed:
    """Returns the ids that a table has for a query. LlamaIndex's own retrievers would take copies out."""

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
def test_a_retriever_is_judged_as_llama_index_judges_it(tiny_model, top_k):
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
    assert "map@100" not in ours.metrics, "of ten nodes it would be another measure"
    assert ours.notes == (["No query got more than 2 nodes, so that measures @10 are measures @2."]
                          if top_k == 2 else [])  # fmt: skip


def test_an_index_over_exact_search_is_as_good_as_the_search(tiny_model):
    dataset = make_dataset()
    embed_model = LoraEmbedding(base_model=tiny_model, device="cpu")
    through, direct = evaluate_index(index_of(dataset, embed_model), dataset), evaluate_retrieval(embed_model, dataset)
    for name in ("hit@1", "hit@5", "hit@10", "mrr@10", "ndcg@10", "recall@10"):
        assert through.metrics[name] == pytest.approx(direct.metrics[name], abs=1e-9)
    assert compare(direct, through).difference == pytest.approx(0, abs=1e-9)
    assert compare_retrieval(direct, through, dataset).won == []
    everything = index_of(dataset, embed_model).as_retriever(similarity_top_k=24)
    assert evaluate_index(everything, dataset).metrics["map@100"] == pytest.approx(direct.metrics["map@100"], abs=1e-6)


def test_odd_answers_are_told_and_judged_all_the_same():
    dataset = make_dataset(passages=12)
    texts = dataset.queries
    table = {text: [f"p{i}" for i in range(11)] for text in texts.values()}
    table |= {texts["q0-0"]: [], texts["q1-0"]: ["p0", "p0", "p1"], texts["q2-0"]: ["elsewhere", "p2"]}
    evaluation = evaluate_index(Listed(table), dataset)
    assert set(evaluation.per_query["q0-0"].values()) == {0.0}
    assert evaluation.rankings["q1-0"] == ["p0", "p1"]
    assert evaluation.per_query["q1-0"]["mrr"] == 1 / 2, "the second p0 takes no place"
    assert evaluation.similarities["q1-0"] == [1.0, pytest.approx(1 / 3)]
    assert evaluation.per_query["q2-0"]["mrr"] == 1 / 2
    empty, twice, unknown = evaluation.notes
    assert empty.startswith("1 of 24 queries got no answer at all (e.g. 'q0-0')")
    assert twice.startswith("1 queries got a node more than once (e.g. 'q1-0')")
    assert unknown.startswith("1 nodes are not in the dataset (e.g. 'elsewhere')")
    assert evaluate_index(Listed(table, scores=False), dataset).metrics == evaluation.metrics


def test_a_retriever_that_never_answers_has_measures_of_zero():
    evaluation = evaluate_index(Listed({}), make_dataset())
    assert set(evaluation.metrics.values()) == {0.0}
    assert evaluation.notes[0].startswith("48 of 48 queries got no answer")


def test_nodes_of_another_parsing_are_refused():
    dataset = make_dataset()
    with pytest.raises(DatasetError, match="none of which is in the dataset"):
        evaluate_index(Listed({text: ["elsewhere"] for text in dataset.queries.values()}), dataset)


def test_what_is_no_retriever_is_refused(tiny_model):
    for wrong in (None, "index", LoraEmbedding(base_model=tiny_model, device="cpu")):
        with pytest.raises(ConfigError, match="as_retriever"):
            evaluate_index(wrong, make_dataset())
    with pytest.raises(ConfigError, match=r"query_engine\.retriever"):
        evaluate_index(index_of(make_dataset(), MockEmbedding(4)).as_query_engine(llm=MockLLM()), make_dataset())
    with pytest.raises(ConfigError, match=r"aretrieve\(query\)"):
        evaluate_index(SimpleNamespace(retrieve=lambda text: []), make_dataset(), num_workers=2)
    with pytest.raises(ConfigError, match="num_workers"):
        evaluate_index(Listed({}), make_dataset(), num_workers=0)


def test_it_can_be_asked_inside_a_running_loop():
    async def inside():
        return evaluate_index(Listed({}), make_dataset(), num_workers=2)

    assert asyncio.run(inside()).passages == 24
