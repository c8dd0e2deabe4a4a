from collections import Counter

import pytest
from llama_index.core.schema import Document, ImageNode, TextNode

from llama_index_lora_embed import LoraFinetuneEngine
from llama_index_lora_embed.config import MiningSettings, QueryFilterSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data import (
    GeneratedQuery,
    InverseClozeQueryGenerator,
    dataset_from_nodes,
    near_duplicates,
)
from llama_index_lora_embed.data.questions.base import embed_text
from tests.helpers.passages import TEXT


def test_the_corpus_is_what_indexing_embeds(nodes):
    dataset, report = dataset_from_nodes(nodes)
    assert dataset.corpus == {node.node_id: embed_text(node) for node in nodes}
    assert sum("title: " in text for text in dataset.corpus.values()) == 8
    assert dataset.source_documents["n5"] == "d2"
    assert report.queries == {"lead": 4, "title": 8}
    dataset.check()


def test_making_a_dataset_twice_gives_the_same(nodes):
    assert dataset_from_nodes(nodes, seed=1)[0].digest() == dataset_from_nodes(list(nodes), seed=1)[0].digest()


def test_skipped_nodes_are_counted():
    nodes = [
        TextNode(text=TEXT, id_="a"),
        TextNode(text=TEXT + " ", id_="b"),
        TextNode(text="  ", id_="c", metadata={"title": "nothing below"}),
        ImageNode(image="aGk=", id_="d"),
        TextNode(text=TEXT, id_="a"),
        Document(text="Another document. It has two sentences of some length.", id_="e"),
    ]
    dataset, report = dataset_from_nodes(nodes, [InverseClozeQueryGenerator(per_node=1)])
    assert set(dataset.corpus) == {"a", "b", "e"}
    assert report.skipped == {"node without text": 2, "same node twice": 1, "node with another node's text": 1}
    assert report.queries == {"inverse_cloze": 2}


class Parrot:
    name = "parrot"

    def generate(self, nodes, *, seed=0):
        yield GeneratedQuery("  ", nodes[0].node_id, self.name)
        yield GeneratedQuery("of nobody", "no such node", self.name)
        for _ in range(2):
            yield GeneratedQuery("What does a parrot say?", nodes[0].node_id, self.name)
        yield GeneratedQuery("Is it silent?", nodes[0].node_id, self.name, passage=" ")


def test_unusable_queries_of_a_generator_are_counted_and_dropped():
    dataset, report = dataset_from_nodes([TextNode(text=TEXT)], [Parrot()])
    assert list(dataset.queries.values()) == ["What does a parrot say?"]
    assert report.skipped == {
        "query empty or about no node": 2,
        "query repeated for the same node": 1,
        "query with an empty passage": 1,
    }


def test_two_nodes_with_one_id_are_refused():
    with pytest.raises(DatasetError, match="'a'"):
        dataset_from_nodes([TextNode(text="one", id_="a"), TextNode(text="two", id_="a")])


@pytest.mark.parametrize("nodes", [[], [TextNode(text="")]])
def test_nodes_without_text_are_refused(nodes):
    with pytest.raises(DatasetError, match="none of them with text"):
        dataset_from_nodes(nodes)


def test_nodes_without_any_query_are_refused():
    with pytest.raises(DatasetError, match="title or lead or inverse_cloze, definition"):
        dataset_from_nodes([TextNode(text="short")])


@pytest.mark.parametrize("nodes", ["text", None, ["text"], [TextNode(text=TEXT), 3]])
def test_objects_that_are_not_nodes_are_refused(nodes):
    with pytest.raises(ConfigError, match="LlamaIndex node"):
        dataset_from_nodes(nodes)


def test_an_object_that_is_not_a_generator_is_refused():
    with pytest.raises(ConfigError, match=r"generators\[0\]"):
        dataset_from_nodes([TextNode(text=TEXT)], ["title"])


def test_filters_that_drop_everything_report_the_reasons():
    nodes = [TextNode(text="same text in all. of these nodes here. again and again.", id_=f"n{i}") for i in range(3)]

    class Exam:
        name = "exam"

        def generate(self, nodes, *, seed=0):
            return [
                GeneratedQuery("What does the author of this passage say?", node.node_id, self.name) for node in nodes
            ]

    with pytest.raises(DatasetError, match="refers to the passage"):
        dataset_from_nodes(nodes, [Exam()], filters=QueryFilterSettings())


def test_a_run_from_nodes_hashes_each_passage_once_for_near_duplicates(nodes, tiny_model, tmp_path, monkeypatch):
    """Filters, split, report, mining of two rounds and training compare passages; queries are another set of texts."""
    hashed = Counter()
    shingles = near_duplicates._shingles

    def counting(text, characters):
        hashed["query" if characters else text] += 1
        return shingles(text, characters)

    monkeypatch.setattr(near_duplicates, "_shingles", counting)
    engine = LoraFinetuneEngine.from_nodes(
        nodes,
        tiny_model,
        str(tmp_path / "adapter"),
        mining=MiningSettings(rounds=2, num_negatives=1, show_progress_bar=False),
        val_fraction=0.3,
        batch_size=4,
        epochs=1,
        device="cpu",
        show_progress_bar=False,
    )
    result = engine.finetune()
    assert len(result.mined) == 2
    assert result.data_report.split is not None
    assert hashed.pop("query") > 0
    assert hashed == dict.fromkeys(map(embed_text, nodes), 1)
