import pytest
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import ImageNode, NodeRelationship, RelatedNodeInfo, TextNode

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data import (
    DefinitionQueryGenerator,
    FirstOf,
    GeneratedQuery,
    InverseClozeQueryGenerator,
    LeadQueryGenerator,
    MetadataQueryGenerator,
    NeighbourQueryGenerator,
    QueryGenerator,
    TitleQueryGenerator,
    dataset_from_nodes,
    split_by_source,
)
from llama_index_lora_embed.data.questions.base import QUERIES_KEY, attach_queries, embed_text, split_sentences
from tests.helpers.passages import TEXT


def test_both_generators_fulfil_the_protocol():
    assert isinstance(TitleQueryGenerator(), QueryGenerator)
    assert isinstance(InverseClozeQueryGenerator(), QueryGenerator)
    assert not isinstance(object(), QueryGenerator)


def test_a_metadata_title_becomes_the_query_and_leaves_the_passage():
    node = TextNode(text=TEXT, metadata={"title": "What adapters are", "file": "a.md"})
    (query,) = TitleQueryGenerator().generate([node])
    assert query == GeneratedQuery("What adapters are", node.node_id, "title", f"file: a.md\n\n{TEXT}")


@pytest.mark.parametrize(
    "text",
    [f"# What adapters are\n\n{TEXT}", f"\n### What adapters are ###\n{TEXT}", f"What adapters are\n=====\n\n{TEXT}"],
)
def test_a_heading_is_a_title(text):
    (query,) = TitleQueryGenerator().generate([TextNode(text=text)])
    assert query.text == "What adapters are"
    assert "What adapters are" not in query.passage
    assert query.passage.startswith("Adapters are small.")


def test_a_question_that_opens_the_text_is_a_title():
    (query,) = TitleQueryGenerator().generate([TextNode(text="What is an adapter? " + TEXT)])
    assert (query.text, query.passage) == ("What is an adapter?", TEXT)


@pytest.mark.parametrize("text", [TEXT, "# Only a heading", "# Heading\n\nno", "What? ", ""])
def test_without_a_title_there_is_no_query(text):
    assert list(TitleQueryGenerator().generate([TextNode(text=text)])) == []


ABSTRACT = "Small adapters were compared with full training on nine collections of questions. " * 2


def test_a_line_that_is_set_apart_is_a_title():
    (query,) = TitleQueryGenerator().generate([TextNode(text=f"Adapters for Retrieval\n{ABSTRACT}")])
    assert query.text == "Adapters for Retrieval"
    assert query.passage == ABSTRACT.strip()


@pytest.mark.parametrize(
    "text",
    [
        f"Adapters were compared.\n{ABSTRACT}",  # a sentence
        f"Adapters were compared with\nfull training on nine collections. {ABSTRACT}",  # goes on in small letters
        "Adapters were compared with other\nAdapters on nine collections and\nNone of them was any better than\n" * 3,
        f"{'word ' * 25}\n{ABSTRACT}",  # too long
        "Adapters for Retrieval\nFew words.",
        f"2021\n{ABSTRACT}",
        f"\n\n{ABSTRACT}",
        "Contact\n",
        "\n\nOpening hours\r\n",
        f"file_path: docs/a.md\n\n{ABSTRACT}",
    ],
)
def test_other_first_lines_are_no_titles(text):
    assert list(TitleQueryGenerator().generate([TextNode(text=text)])) == []


def test_the_first_sentence_becomes_the_query_for_the_rest():
    node = TextNode(text=f"Menkes disease affects copper levels.\n{ABSTRACT}", metadata={"file": "a.md"})
    (query,) = LeadQueryGenerator().generate([node])
    assert query.text == "Menkes disease affects copper levels."
    assert query.passage.split() == f"file: a.md {ABSTRACT}".split()
    assert query.generator == "lead"


def test_the_lead_comes_after_the_title_and_is_cut_where_it_is_long():
    (query,) = LeadQueryGenerator().generate(
        [TextNode(text=f"# Heading\n\nIt starts right here, after that. {ABSTRACT}")]
    )
    assert query.text == "It starts right here, after that."
    assert "Heading" in query.passage, "only the sentence is taken out of the passage"
    words = " ".join(f"w{i}" for i in range(80))
    (query,) = LeadQueryGenerator(max_words=12).generate([TextNode(text=words)])
    assert query.text.split() == [f"w{i}" for i in range(12)]
    assert query.passage.split() == [f"w{i}" for i in range(12, 80)]


@pytest.mark.parametrize(
    "text", ["", "Too short.", "One two three four five. Then only four more.", "Why? " + ABSTRACT[:20]]
)
def test_without_enough_text_there_is_no_lead(text):
    assert list(LeadQueryGenerator().generate([TextNode(text=text)])) == []


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("Noonan syndrome is a genetic disorder.", "Noonan syndrome"),
        ("The LoRA method (Hu et al.) is one of many. Others exist.", "LoRA method"),
        ("A vocabulary is the set of words. It is large.", "vocabulary"),
        ("# Terms\n\nRecall refers to the share that is found.", "Recall"),
        ("See above. Precision means the share that is right.", "Precision"),
    ],
)
def test_a_definition_becomes_two_queries(text, term):
    queries = list(DefinitionQueryGenerator().generate([TextNode(text=text)]))
    assert [query.text for query in queries] == [term, f"what is {term}"]
    assert {query.generator for query in queries} == {"definition"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is a disorder.",
        "There are two kinds.",
        "We define nothing here.",
        "Was ist ein Begriff?",
        "one is a number",
    ],
)
def test_other_sentences_define_nothing(text):
    assert list(DefinitionQueryGenerator().generate([TextNode(text=text)])) == []


def test_a_title_that_all_nodes_share_is_used_for_the_first_ones_only():
    nodes = [TextNode(text=TEXT + str(i), metadata={"title": "Handbook"}) for i in range(9)]
    assert len(list(TitleQueryGenerator(max_nodes_per_title=3).generate(nodes))) == 3


def test_inverse_cloze_removes_the_sentence_from_the_passage():
    node = TextNode(text=TEXT, id_="n")
    (query,) = InverseClozeQueryGenerator(keep_rate=0).generate([node])
    assert query.text in TEXT
    assert query.text not in query.passage
    assert len(query.passage) < len(TEXT)


def test_inverse_cloze_keeps_the_sentence_one_time_in_ten():
    nodes = [TextNode(text=TEXT, id_=f"n{i}") for i in range(2000)]
    kept = sum(query.passage == TEXT for query in InverseClozeQueryGenerator().generate(nodes))
    assert 150 < kept < 250


def test_inverse_cloze_is_seeded_by_node_not_by_order():
    nodes = [TextNode(text=TEXT, id_=f"n{i}") for i in range(20)]
    forward = {q.node_id: q for q in InverseClozeQueryGenerator().generate(nodes, seed=4)}
    backward = {q.node_id: q for q in InverseClozeQueryGenerator().generate(nodes[::-1], seed=4)}
    other = {q.node_id: q for q in InverseClozeQueryGenerator().generate(nodes, seed=5)}
    assert forward == backward
    assert forward != other


def test_first_of_runs_the_next_generator_only_on_the_remaining_nodes(nodes):
    generator = FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator())
    assert isinstance(generator, QueryGenerator)
    assert generator.name == "title or inverse_cloze"
    by_node = {query.node_id: query.generator for query in generator.generate(nodes)}
    assert by_node == {f"n{i}": "title" if i < 8 else "inverse_cloze" for i in range(12)}


def test_inverse_cloze_yields_as_many_queries_for_each_node_as_asked_for():
    assert len(list(InverseClozeQueryGenerator(per_node=2, min_words=3).generate([TextNode(text=TEXT)]))) == 2


@pytest.mark.parametrize("text", ["One sentence only.", "a b. c d.", ""])
def test_inverse_cloze_skips_texts_without_two_sentences(text):
    assert list(InverseClozeQueryGenerator().generate([TextNode(text=text)])) == []


def test_sentences_end_at_full_width_marks_too():
    assert split_sentences("一つ目。二つ目！ Three.") == ["一つ目。", "二つ目！", "Three."]


def chunks(count, document):
    made = [TextNode(text=f"{document} chunk {i}", id_=f"{document}{i}") for i in range(count)]
    for node in made:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


def test_adjacent_chunks_answer_with_grades_and_never_across_documents():
    queries = list(
        NeighbourQueryGenerator().generate([*chunks(3, "a"), *chunks(2, "b"), TextNode(text="of no document")])
    )
    assert [(q.text, q.node_id, q.score) for q in queries] == [
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


@pytest.mark.parametrize("generator", [TitleQueryGenerator, InverseClozeQueryGenerator, NeighbourQueryGenerator])
def test_an_unknown_argument_of_a_generator_is_refused(generator):
    with pytest.raises(ConfigError, match="seeds: unknown; did you mean 'seed'"):
        generator(seeds=1)


@pytest.mark.parametrize("wrong", [(), ("title",), (TitleQueryGenerator,), ([TitleQueryGenerator()],)])
def test_first_of_takes_only_generators(wrong):
    with pytest.raises(ConfigError, match="expected query generators"):
        FirstOf(*wrong)


def test_queries_of_llamaindex_extractors_are_trained_against_the_node_without_them():
    node = TextNode(
        text=TEXT,
        metadata={
            "questions_this_excerpt_can_answer": "Here are 2:\n1. What is small?\n2. What is low rank?",
            "a": "b",
        },
    )
    queries = list(MetadataQueryGenerator().generate([node]))
    assert [q.text for q in queries] == ["What is small?", "What is low rank?"]
    assert "What is small?" in embed_text(node)
    assert all(q.passage == f"a: b\n\n{TEXT}" for q in queries)


GENERATORS = [
    TitleQueryGenerator(),
    InverseClozeQueryGenerator(),
    FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator()),
    NeighbourQueryGenerator(),
]


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda generator: generator.name)
@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_every_generator_is_a_step_of_an_ingestion_pipeline(generator, workers, nodes):
    wanted = list(generator.generate(nodes))
    before = {node.node_id: embed_text(node) for node in nodes}
    out = IngestionPipeline(transformations=[generator]).run(nodes=nodes, num_workers=workers)
    assert {node.node_id: embed_text(node) for node in out} == before
    attached = list(MetadataQueryGenerator().generate(out))
    if workers is None or generator.name != "neighbour":  # a worker sees its own share of the nodes only
        assert sorted(attached, key=str) == sorted(wanted, key=str)
    assert all(isinstance(node.metadata.get(QUERIES_KEY, ""), str) for node in out), "vector stores want flat values"


def test_the_cache_of_a_pipeline_distinguishes_settings(nodes):
    cache = IngestionCache()

    def run(generator):
        fresh = [node.model_copy(deep=True) for node in nodes]
        out = IngestionPipeline(transformations=[generator], cache=cache).run(nodes=fresh)
        return len(list(MetadataQueryGenerator().generate(out)))

    assert run(InverseClozeQueryGenerator(min_words=2)) == 12
    assert run(InverseClozeQueryGenerator(min_words=2, per_node=2)) == 24
    assert run(FirstOf(TitleQueryGenerator())) == 8
    assert run(FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator(min_words=2))) == 12


def test_queries_of_two_generators_accumulate_in_the_metadata_without_repetition(nodes):
    for _ in range(2):
        attach_queries(nodes, TitleQueryGenerator().generate(nodes))
        attach_queries(nodes, InverseClozeQueryGenerator().generate(nodes))
    assert len(list(MetadataQueryGenerator().generate(nodes))) == 8 + 12


@pytest.mark.parametrize(
    "value", ["no json", "[1]", '[{"text": "q"}]', '[{"x": 1}]', "null", '[{"text": 5, "generator": "m"}]']
)
def test_metadata_of_another_format_gives_no_queries(value):
    assert list(MetadataQueryGenerator().generate([TextNode(text=TEXT, metadata={QUERIES_KEY: value})])) == []


def test_unusual_nodes_pass_all_steps_without_a_crash():
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


def test_queries_that_earlier_versions_attached_are_read():
    items = '[{"text": "What is small?", "maker": "people", "score": 0.5}]'
    node = TextNode(text=TEXT, id_="n", metadata={"finetune_questions": items})
    old = GeneratedQuery("What is small?", "n", "human", score=0.5)
    assert list(MetadataQueryGenerator().generate([node])) == [old]
    new = GeneratedQuery("What is low rank?", "n", "title")
    attach_queries([node], [new])
    assert list(MetadataQueryGenerator().generate([node])) == [old, new]
