import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data import FirstOf, MetadataQueryGenerator
from llama_index_lora_embed.data.questions.base import GeneratedQuery, QueryGenerator
from llama_index_lora_embed.data.questions.query_log import QueryLogGenerator, dataset_from_pairs

LONG = "The invoice is sent on the first day of each month by post"


def texts_of(dataset):
    """Query text to the texts of its answers."""
    return {dataset.queries[q]: [dataset.corpus[p] for p in ids] for q, ids in dataset.relevant_docs.items()}


def negatives_of(dataset):
    return {dataset.queries[q]: [dataset.corpus[p] for p in ids] for q, ids in (dataset.hard_negatives or {}).items()}


def test_a_passage_that_is_also_an_answer_is_no_negative():
    rows = [{"query": "a", "passage": "b", "negative": "c"}, {"query": "A ", "passage": " C"}]
    dataset, report = dataset_from_pairs(rows)
    assert texts_of(dataset) == {"a": ["b", "c"]}
    assert dataset.hard_negatives is None
    assert report.skipped == {"negative that is an answer too": 1}


def test_a_query_with_only_negatives_is_counted_and_left_out():
    dataset, report = dataset_from_pairs([("a", "b", 1), ("c", "d", 0)])
    assert list(dataset.queries.values()) == ["a"]
    assert report.skipped == {"query with only negatives": 1}


def test_the_best_label_of_a_repeated_pair_counts():
    dataset, report = dataset_from_pairs([("a", "b", 0.4), ("A", "b", 0.8), ("a", "b", 0.2)])
    assert [list(scores.values()) for scores in dataset.relevance_scores.values()] == [[0.8]]
    assert report.skipped == {"same pair twice": 2}


def test_a_file_with_no_usable_row_is_an_error_that_names_the_first_rows(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("query,passage\n,b\na,\n")
    with pytest.raises(DatasetError, match="source without a usable row") as caught:
        dataset_from_pairs(path)
    assert caught.value.problems == ["log.csv, line 2: row without query", "log.csv, line 3: row without passage"]


@pytest.mark.parametrize("rows", [[("a", "b", 0)], [{"query": "a", "node_id": "n1"}], ["text"], []])
def test_rows_without_a_query_are_a_dataset_error(rows):
    with pytest.raises(DatasetError, match="without a usable row"):
        dataset_from_pairs(rows)


def test_two_texts_under_one_id_are_chunks_of_one_document():
    rows = [
        {"query": "a", "doc_id": "guide", "text": "first chunk"},
        {"query": "b", "doc_id": "guide", "text": "second chunk"},
        {"query": "c", "doc_id": "guide", "text": "First  chunk"},
    ]
    dataset, _ = dataset_from_pairs(rows)
    first, second = dataset.corpus
    assert first == "guide"
    assert second.startswith("guide-")
    assert dataset.source_of(first) == dataset.source_of(second) == "guide"
    assert texts_of(dataset) == {"a": ["first chunk"], "b": ["second chunk"], "c": ["first chunk"]}


def test_queries_and_passages_are_merged_by_wording_whatever_the_ids():
    rows = [
        {"query": "How much?", "passage": "Ten.", "node_id": "n1", "url": "prices"},
        {"query": "how  much?", "passage": "ten.", "node_id": "n2"},
        {"query": "cost", "passage": "TEN."},
    ]
    dataset, report = dataset_from_pairs(rows)
    assert dataset.corpus == {"n1": "Ten."}
    assert dataset.source_documents == {"n1": "prices"}
    assert texts_of(dataset) == {"How much?": ["Ten."], "cost": ["Ten."]}
    assert report.skipped == {"same pair twice": 1}


def test_the_same_rows_give_the_same_ids_in_any_order(tmp_path):
    rows = [{"query": f"q{i % 7}", "passage": f"p{i}", "label": i % 3} for i in range(40)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, _ = dataset_from_pairs(path)
    two, _ = dataset_from_pairs(rows)
    turned, _ = dataset_from_pairs(reversed(rows))
    assert one.model_dump() == two.model_dump()
    assert (turned.queries, turned.corpus) == (one.queries, one.corpus)
    assert one.relevance_scores == turned.relevance_scores
    one.save_json(tmp_path / "dataset.json")
    assert EmbeddingQAFinetuneDataset.from_json(tmp_path / "dataset.json").check() == one


def test_the_origin_is_people_by_default():
    assert dataset_from_pairs([("a", "b")])[0].origins() == {"human": 1}
    assert dataset_from_pairs([("a", "b")], origin="clicks")[0].origins() == {"clicks": 1}


def test_pairs_find_their_nodes_by_id_by_text_and_by_containment():
    nodes = [
        TextNode(id_="n1", text=f"Billing. {LONG}, unless you chose mail."),
        TextNode(id_="n2", text="Refunds take one week.", metadata={"title": "Refunds"}),
        TextNode(id_="n3", text="Our office in Delft opens at nine on weekdays."),
    ]
    rows = [
        {"query": "by id", "node_id": "n3", "passage": "whatever", "score": 2},
        {"query": "by text", "node_id": "old id", "passage": "refunds take  one week.", "score": 1},
        {"query": "with metadata", "passage": nodes[1].get_content("embed"), "score": 2},
        {"query": "inside", "passage": LONG.removesuffix(" post") + " post,", "score": 2},
        {"query": "around", "passage": f"Contact. {nodes[2].text} Ring twice.", "score": 2},
        {"query": "wrong", "node_id": "n1", "passage": LONG, "score": 0},
    ]
    generator = QueryLogGenerator(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queries = list(generator.generate(nodes))
    assert queries == [
        GeneratedQuery("by id", "n3", "human"),
        GeneratedQuery("by text", "n2", "human", score=0.5),
        GeneratedQuery("with metadata", "n2", "human"),
        GeneratedQuery("inside", "n1", "human"),
        GeneratedQuery("around", "n3", "human"),
    ]
    assert generator.report.pairs == 5
    assert generator.report.skipped == {"label of 0": 1}
    assert isinstance(generator, QueryGenerator)


def test_pairs_that_match_no_node_or_several_are_counted_and_warned_about_once():
    nodes = [TextNode(id_="n1", text=f"{LONG} to you."), TextNode(id_="n2", text=f"{LONG} to her.")]
    generator = QueryLogGenerator(
        [("several", LONG), ("none", "Something else that nobody has ever written"), ("short", "by post")]
    )
    with pytest.warns(UserWarning, match=r"3 of 3 pair\(s\)") as caught:
        assert list(generator.generate(nodes)) == []
    assert len(caught) == 1
    assert generator.report.skipped == {"passage matches several nodes": 1, "passage matches no node": 2}


def test_of_nodes_with_the_same_text_the_first_gets_the_query():
    nodes = [TextNode(id_="n1", text=LONG), TextNode(id_="n2", text=LONG)]
    assert [query.node_id for query in QueryLogGenerator([("a", LONG)]).generate(nodes)] == ["n1"]


def test_a_misspelt_argument_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'columns'"):
        QueryLogGenerator([("a", "b")], colums={"query": "a"})


def test_a_generator_over_an_iterator_can_be_used_twice():
    nodes = [TextNode(id_="n1", text="one"), TextNode(id_="n2", text="two")]
    generator = QueryLogGenerator(row for row in [("a", "one"), ("b", "two")])
    first = list(generator.generate(nodes))
    assert len(first) == 2
    assert list(generator.generate(nodes, seed=5)) == first


def test_boilerplate_at_the_edges_does_not_hide_the_text_of_a_node():
    frame = "Copyright by the company of all the rights reserved here"
    nodes = [TextNode(id_=f"n{i}", text=f"{frame} {i} a b c d e f {i} {frame}") for i in range(300)]
    found = list(QueryLogGenerator([("q", "here 17 a b c d e f 17 copyright by")]).generate(nodes))
    assert [query.node_id for query in found] == ["n17"]


def test_a_pair_without_text_matches_no_empty_node():
    generator = QueryLogGenerator([{"query": "a", "node_id": "gone"}])
    with pytest.warns(UserWarning, match="1 of 1"):
        assert list(generator.generate([TextNode(id_="n1", text="")])) == []


def test_in_a_pipeline_the_queries_travel_with_the_nodes(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"query,passage,label\na,{LONG},2\nb,{LONG},1\nc,Refunds take a week.,2\n")
    nodes = [TextNode(id_="n1", text=LONG), TextNode(id_="n2", text="Refunds take a week.")]
    generator = QueryLogGenerator(path)
    asked = IngestionPipeline(transformations=[generator]).run(nodes=nodes)
    assert list(MetadataQueryGenerator().generate(asked)) == list(generator.generate(nodes))
    assert generator.report.pairs == 3


@pytest.mark.parametrize("kind", [str, Path, list, iter])
def test_a_generator_survives_pickling(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text("Frage,passage\na,one\n")
    rows = [{"Frage": "a", "passage": "one"}]
    generator = QueryLogGenerator(kind("log.csv" if kind in (str, Path) else rows), columns={"query": "Frage"}, seed=3)
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(generator))
    assert list(again.generate([TextNode(id_="n1", text="one")])) == [GeneratedQuery("a", "n1", "human")]
    assert again.to_dict() == generator.to_dict()
    assert again.seed == 3


def test_the_dict_of_a_generator_changes_with_the_pairs_and_only_with_them(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("query,passage\na,one\n")
    first = QueryLogGenerator(str(path)).to_dict()
    assert first["source"] == str(path)
    assert json.loads(json.dumps(first)) == QueryLogGenerator.from_dict(first).to_dict()
    os.utime(path, (1, 1))
    assert QueryLogGenerator(path).to_dict() == first
    path.write_text("query,passage\nb,one\n")  # of the same size
    assert QueryLogGenerator(path).to_dict() != first


def test_dicts_of_generators_distinguish_sources_in_memory():
    rows = [("a", "one"), ("b", "two", 0)]
    dicts = [QueryLogGenerator(source).to_dict() for source in (rows, iter(rows), rows[:1], rows[::-1])]
    assert dicts[0] == dicts[1]
    assert len({str(found) for found in dicts}) == 3
    assert FirstOf(QueryLogGenerator(rows)).to_dict() != FirstOf(QueryLogGenerator(rows[:1])).to_dict()


@pytest.mark.slow
def test_the_dict_of_a_generator_is_the_same_in_another_process():
    code = (
        "from llama_index_lora_embed.data import QueryLogGenerator; "
        "print(QueryLogGenerator([('a', 'one', 2)]).to_dict())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{QueryLogGenerator([('a', 'one', 2)]).to_dict()}\n"}


def made_up(count=300):
    rows = [{"query": f"query {i % 100}", "passage": f"passage {i}", "negative": f"wrong {i}"} for i in range(count)]
    return [*rows, *rows[:50]]


def test_a_sample_has_some_queries_with_all_of_their_passages_whatever_the_order_of_the_rows():
    whole, _ = dataset_from_pairs(made_up())
    drawn, report = dataset_from_pairs(made_up(), max_queries=10, other_passages=40)
    assert len(drawn.queries) == 10
    for of in (texts_of, negatives_of):
        assert all(sorted(texts) == sorted(of(whole)[query]) for query, texts in of(drawn).items())
    assert 60 < len(drawn.corpus) <= 100
    assert report.rows == 350
    assert report.skipped["same pair twice"] > 0
    assert report.skipped["pair of a query that was not drawn"] == 320 - report.skipped["same pair twice"]
    shuffled = random.Random(1).sample(made_up(), 350)
    assert dataset_from_pairs(shuffled, max_queries=10, other_passages=40)[0].order_digest() == drawn.order_digest()
    assert len(dataset_from_pairs(made_up(), max_queries=10)[0].corpus) == 60
    everything, report = dataset_from_pairs(made_up(), max_queries=1000)
    assert everything.queries == whole.queries
    assert everything.corpus == whole.corpus
    assert report.skipped == {"same pair twice": 50}


@pytest.mark.parametrize("wrong", [{"max_queries": 0}, {"max_queries": 1.5}, {"other_passages": -1}])
def test_a_sample_of_no_size_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"max_queries=.*, other_passages="):
        dataset_from_pairs(made_up(), **wrong)


def test_a_dataset_of_the_hub_without_labels_is_read_once():
    reads = []

    def rows():
        reads.append(1)
        yield from made_up()

    features = datasets.Features(dict.fromkeys(("query", "passage", "negative"), datasets.Value("string")))
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    assert len(dataset_from_pairs(stream, max_queries=10)[0].queries) == 10
    assert len(reads) == 1
