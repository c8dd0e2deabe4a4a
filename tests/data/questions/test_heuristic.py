import pytest
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import Document, ImageNode, NodeRelationship, RelatedNodeInfo, TextNode

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data import (
    FirstOf,
    GeneratedQuery,
    InverseClozeQueryGenerator,
    MetadataQueryGenerator,
    NeighbourQueryGenerator,
    QueryGenerator,
    TitleQueryGenerator,
    dataset_from_nodes,
    split_by_source,
)
from llama_index_lora_embed.data.questions.base import QUERIES_KEY, attach_queries, embed_text, split_sentences

TEXT = "Adapters are small. They hold two low rank matrices! Do they need a base? Yes they do."


def test_both_makers_fulfil_the_protocol():
    assert isinstance(TitleQueryGenerator(), QueryGenerator)
    assert isinstance(InverseClozeQueryGenerator(), QueryGenerator)
    assert not isinstance(object(), QueryGenerator)


def test_a_metadata_title_becomes_the_query_and_leaves_the_passage():
    node = TextNode(text=TEXT, metadata={"title": "What adapters are", "file": "a.md"})
    (question,) = TitleQueryGenerator().generate([node])
    assert question == GeneratedQuery("What adapters are", node.node_id, "title", f"file: a.md\n\n{TEXT}")


@pytest.mark.parametrize(
    "text",
    [f"# What adapters are\n\n{TEXT}", f"\n### What adapters are ###\n{TEXT}", f"What adapters are\n=====\n\n{TEXT}"],
)
def test_a_heading_is_a_title(text):
    (question,) = TitleQueryGenerator().generate([TextNode(text=text)])
    assert question.text == "What adapters are"
    assert "What adapters are" not in question.passage
    assert question.passage.startswith("Adapters are small.")


def test_a_question_that_opens_the_text_is_a_title():
    (question,) = TitleQueryGenerator().generate([TextNode(text="What is an adapter? " + TEXT)])
    assert (question.text, question.passage) == ("What is an adapter?", TEXT)


@pytest.mark.parametrize("text", [TEXT, "# Only a heading", "# Heading\n\nno", "What? ", ""])
def test_no_title_no_question(text):
    assert list(TitleQueryGenerator().generate([TextNode(text=text)])) == []


def test_a_title_that_every_node_carries_is_used_for_the_first_ones_only():
    nodes = [TextNode(text=TEXT + str(i), metadata={"title": "Handbook"}) for i in range(9)]
    assert len(list(TitleQueryGenerator(max_nodes_per_title=3).generate(nodes))) == 3


def test_inverse_cloze_takes_the_sentence_out():
    node = TextNode(text=TEXT, id_="n")
    (question,) = InverseClozeQueryGenerator(keep_rate=0).generate([node])
    assert question.text in TEXT
    assert question.text not in question.passage
    assert len(question.passage) < len(TEXT)


def test_inverse_cloze_keeps_the_sentence_one_time_in_ten():
    nodes = [TextNode(text=TEXT, id_=f"n{i}") for i in range(2000)]
    kept = sum(question.passage == TEXT for question in InverseClozeQueryGenerator().generate(nodes))
    assert 150 < kept < 250


def test_inverse_cloze_is_seeded_by_node_not_by_order():
    nodes = [TextNode(text=TEXT, id_=f"n{i}") for i in range(20)]
    forward = {q.node_id: q for q in InverseClozeQueryGenerator().generate(nodes, seed=4)}
    backward = {q.node_id: q for q in InverseClozeQueryGenerator().generate(nodes[::-1], seed=4)}
    other = {q.node_id: q for q in InverseClozeQueryGenerator().generate(nodes, seed=5)}
    assert forward == backward
    assert forward != other


def test_first_of_asks_the_next_maker_only_about_what_is_left(nodes):
    generator = FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator())
    assert isinstance(generator, QueryGenerator)
    assert generator.name == "title or inverse_cloze"
    made = {question.node_id: question.generator for question in generator.generate(nodes)}
    assert made == {f"n{i}": "title" if i < 8 else "inverse_cloze" for i in range(12)}


def test_inverse_cloze_asks_as_often_as_told():
    assert len(list(InverseClozeQueryGenerator(per_node=2, min_words=3).generate([TextNode(text=TEXT)]))) == 2


@pytest.mark.parametrize("text", ["One sentence only.", "a b. c d.", ""])
def test_inverse_cloze_skips_what_has_no_two_sentences(text):
    assert list(InverseClozeQueryGenerator().generate([TextNode(text=text)])) == []


def test_sentences_end_at_full_width_marks_too():
    assert split_sentences("一つ目。二つ目！ Three.") == ["一つ目。", "二つ目！", "Three."]


def test_the_corpus_is_what_indexing_embeds(nodes):
    dataset, report = dataset_from_nodes(nodes)
    assert dataset.corpus == {node.node_id: embed_text(node) for node in nodes}
    assert sum("title: " in text for text in dataset.corpus.values()) == 8
    assert dataset.source_documents["n5"] == "d2"
    assert report.questions == {"title": 8, "inverse_cloze": 4}
    dataset.check()


def test_making_a_dataset_twice_gives_the_same(nodes):
    assert dataset_from_nodes(nodes, seed=1)[0].digest() == dataset_from_nodes(list(nodes), seed=1)[0].digest()


def test_what_is_left_out_is_counted():
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
    assert report.questions == {"inverse_cloze": 2}


class Parrot:
    name = "parrot"

    def generate(self, nodes, *, seed=0):
        yield GeneratedQuery("  ", nodes[0].node_id, self.name)
        yield GeneratedQuery("of nobody", "no such node", self.name)
        for _ in range(2):
            yield GeneratedQuery("What does a parrot say?", nodes[0].node_id, self.name)
        yield GeneratedQuery("Is it silent?", nodes[0].node_id, self.name, passage=" ")


def test_bad_questions_of_a_maker_are_counted_not_trained_on():
    dataset, report = dataset_from_nodes([TextNode(text=TEXT)], [Parrot()])
    assert list(dataset.queries.values()) == ["What does a parrot say?"]
    assert report.skipped == {
        "question empty or about no node": 2,
        "question asked twice of a node": 1,
        "question with an empty passage": 1,
    }


def test_two_nodes_with_one_id_are_refused():
    with pytest.raises(DatasetError, match="'a'"):
        dataset_from_nodes([TextNode(text="one", id_="a"), TextNode(text="two", id_="a")])


@pytest.mark.parametrize("nodes", [[], [TextNode(text="")]])
def test_no_text_is_refused(nodes):
    with pytest.raises(DatasetError, match="none of them with text"):
        dataset_from_nodes(nodes)


def test_no_question_is_refused():
    with pytest.raises(DatasetError, match="title or inverse_cloze"):
        dataset_from_nodes([TextNode(text="short")])


@pytest.mark.parametrize("nodes", ["text", None, ["text"], [TextNode(text=TEXT), 3]])
def test_what_are_no_nodes_is_refused(nodes):
    with pytest.raises(ConfigError, match="LlamaIndex node"):
        dataset_from_nodes(nodes)


def test_what_is_no_maker_is_refused():
    with pytest.raises(ConfigError, match=r"generators\[0\]"):
        dataset_from_nodes([TextNode(text=TEXT)], ["title"])


def chunks(count, document):
    made = [TextNode(text=f"{document} chunk {i}", id_=f"{document}{i}") for i in range(count)]
    for node in made:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


def test_adjacent_chunks_answer_with_grades_and_never_across_documents():
    questions = list(
        NeighbourQueryGenerator().generate([*chunks(3, "a"), *chunks(2, "b"), TextNode(text="of no document")])
    )
    assert [(q.text, q.node_id, q.score) for q in questions] == [
        ("a chunk 0", "a1", 0.9),
        ("a chunk 0", "a2", 0.7),
        ("a chunk 1", "a2", 0.9),
        ("b chunk 0", "b1", 0.9),
    ]
    dataset, _ = dataset_from_nodes(chunks(3, "a"), [NeighbourQueryGenerator()])
    assert sorted(dataset.score(q, dataset.relevant_docs[q][0]) for q in dataset.queries) == [0.7, 0.9, 0.9]
    assert dataset.check().subset(list(dataset.queries)[:1]).relevance_scores is not None


@pytest.mark.parametrize("scores", [(), (0.0,), (1.5,), (0.9, -1)])
def test_grades_outside_zero_to_one_are_refused(scores):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        NeighbourQueryGenerator(scores=scores)


def test_questions_of_llamaindex_extractors_are_trained_against_the_node_without_them():
    node = TextNode(
        text=TEXT,
        metadata={
            "questions_this_excerpt_can_answer": "Here are 2:\n1. What is small?\n2. What is low rank?",
            "a": "b",
        },
    )
    questions = list(MetadataQueryGenerator().generate([node]))
    assert [q.text for q in questions] == ["What is small?", "What is low rank?"]
    assert "What is small?" in embed_text(node)
    assert all(q.passage == f"a: b\n\n{TEXT}" for q in questions)


MAKERS = [
    TitleQueryGenerator(),
    InverseClozeQueryGenerator(),
    FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator()),
    NeighbourQueryGenerator(),
]


@pytest.mark.parametrize("generator", MAKERS, ids=lambda generator: generator.name)
@pytest.mark.parametrize("workers", [None, 2])
def test_every_maker_is_a_step_of_an_ingestion_pipeline(generator, workers, nodes):
    wanted = list(generator.generate(nodes))
    before = {node.node_id: embed_text(node) for node in nodes}
    out = IngestionPipeline(transformations=[generator]).run(nodes=nodes, num_workers=workers)
    assert {node.node_id: embed_text(node) for node in out} == before
    carried = list(MetadataQueryGenerator().generate(out))
    if workers is None or generator.name != "neighbour":  # a worker sees its own share of the nodes only
        assert sorted(carried, key=str) == sorted(wanted, key=str)
    assert all(isinstance(node.metadata.get(QUERIES_KEY, ""), str) for node in out), "vector stores want flat values"


def test_a_pipelines_cache_tells_settings_apart(nodes):
    cache = IngestionCache()

    def run(generator):
        fresh = [node.model_copy(deep=True) for node in nodes]
        out = IngestionPipeline(transformations=[generator], cache=cache).run(nodes=fresh)
        return len(list(MetadataQueryGenerator().generate(out)))

    assert run(InverseClozeQueryGenerator(min_words=2)) == 12
    assert run(InverseClozeQueryGenerator(min_words=2, per_node=2)) == 24
    assert run(FirstOf(TitleQueryGenerator())) == 8
    assert run(FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator(min_words=2))) == 12


def test_questions_of_two_makers_add_up_in_the_metadata_and_none_comes_twice(nodes):
    for _ in range(2):
        attach_queries(nodes, TitleQueryGenerator().generate(nodes))
        attach_queries(nodes, InverseClozeQueryGenerator().generate(nodes))
    assert len(list(MetadataQueryGenerator().generate(nodes))) == 8 + 12


@pytest.mark.parametrize(
    "carried", ["no json", "[1]", '[{"text": "q"}]', '[{"x": 1}]', "null", '[{"text": 5, "generator": "m"}]']
)
def test_metadata_that_somebody_else_wrote_is_left_alone(carried):
    assert list(MetadataQueryGenerator().generate([TextNode(text=TEXT, metadata={QUERIES_KEY: carried})])) == []


def test_odd_nodes_go_all_the_way_without_a_crash():
    filler = [
        TextNode(text=f"{TEXT} Number {i} has word{i} and thing{i * 7} in it. And other{i} too.") for i in range(30)
    ]
    nodes = [
        *filler,
        ImageNode(image="aGVsbG8="),
        TextNode(text=""),
        TextNode(text="# A megabyte\n\n" + "lorem ipsum dolor. " * 55_000, id_="megabyte"),
        TextNode(
            text="# Смешанный 混合 🚀\n\nДлинный текст. 日本語の文です。 And some عربى text here. 🚀🚀", id_="mixed"
        ),
        TextNode(
            text="# Bell \x07\n\nnull \x00 and escape \x1b sequences. Here is a second sentence \u2028 with more."
        ),
    ]
    dataset, report = dataset_from_nodes(nodes, filters=QueryFilterSettings())
    assert report.skipped["node without text"] == 2
    assert report.filtered.given == report.filtered.kept + sum(report.filtered.dropped.values())
    assert {"megabyte", "mixed"} <= {ids[0] for ids in dataset.relevant_docs.values()}
    train, val = split_by_source(dataset.check())
    assert len(train.queries) + len(val.queries) == len(dataset.queries)
    assert str(report).startswith(f"{len(dataset.corpus)} passages of {len(nodes)} nodes")


def test_filters_that_leave_nothing_say_what_they_dropped():
    nodes = [TextNode(text="same text in all. of these nodes here. again and again.", id_=f"n{i}") for i in range(3)]

    class Exam:
        name = "exam"

        def generate(self, nodes, *, seed=0):
            return [
                GeneratedQuery("What does the author of this passage say?", node.node_id, self.name) for node in nodes
            ]

    with pytest.raises(DatasetError, match="speaks of the passage"):
        dataset_from_nodes(nodes, [Exam()], filters=QueryFilterSettings())
