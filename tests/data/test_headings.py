import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.headings import MIN_HEADINGS, validate_on_headings

BODY = "says what the section is about, and says it in a sentence of more than a few words."


@pytest.fixture
def nodes():
    return [TextNode(id_=f"n{i}", text=f"# Section {i}\n\nIt {BODY}") for i in range(50)]


def held_out(nodes, origins):
    ids = [node.node_id for node in nodes]
    return EmbeddingQAFinetuneDataset(
        queries={f"q{i}": f"query {i}" for i in range(len(origins))},
        corpus={node.node_id: node.text for node in nodes},
        relevant_docs={f"q{i}": [ids[i % len(ids)]] for i in range(len(origins))},
        query_origins={f"q{i}": origin for i, origin in enumerate(origins)},
    )


def test_headings_that_were_not_trained_on_join_the_validation_queries(nodes):
    val = held_out(nodes, ["llm"] * 20)
    found = validate_on_headings(val, {"llm": 1}, nodes)
    assert found.origins() == {"llm": 20, "title": 50}
    assert found.corpus == val.corpus
    assert found.relevant_docs["heading:n7"] == ["n7"]
    assert found.queries["heading:n7"] == "Section 7"
    assert val.origins() == {"llm": 20}, "the given dataset is as before"
    assert validate_on_headings(val, {"llm": 1}) == found, "texts give the same headings as nodes without metadata"
    found.check()


def test_parts_of_passages_are_left_out_where_there_are_enough_headings(nodes):
    val = held_out(nodes, ["inverse_cloze"] * 10 + ["lead"] * 10 + ["llm"] * 10 + ["file_name"] * 5)
    assert validate_on_headings(val, {"llm": 1}, nodes).origins() == {"file_name": 5, "llm": 10, "title": 50}
    few = nodes[: MIN_HEADINGS - 1]
    val = held_out(few, ["lead"] * 10)
    assert validate_on_headings(val, {"lead": 1}, few) == val, "29 headings are too few for a verdict"


def test_headings_that_were_trained_on_are_those_of_held_out_documents_alone(nodes):
    val = held_out(nodes, ["title"] * 40 + ["lead"] * 5)
    assert validate_on_headings(val, {"title": 1, "lead": 1}, nodes).origins() == {"title": 40}
    few = held_out(nodes, ["title"] * 5 + ["lead"] * 5)
    assert validate_on_headings(few, {"title": 1, "lead": 1}, nodes) == few


def test_there_are_at_most_three_hundred_headings_and_only_of_passages_that_are_searched():
    many = [TextNode(id_=f"n{i}", text=f"# Section {i}\n\nIt {BODY}") for i in range(400)]
    val = held_out(many[:350], ["llm"] * 3)
    found = validate_on_headings(val, {"llm": 1}, many)
    assert found.origins() == {"llm": 3, "title": 300}
    assert found.queries == validate_on_headings(val, {"llm": 1}, many).queries
    assert found.queries != validate_on_headings(val, {"llm": 1}, many, seed=1).queries
    assert {i for ids in found.relevant_docs.values() for i in ids} <= set(val.corpus)


def test_a_heading_that_nodes_share_is_not_used(nodes):
    shared = [TextNode(id_=f"s{i}", text=f"# Overview\n\nIt {BODY} {i}") for i in range(3)]
    found = validate_on_headings(held_out([*nodes, *shared], ["llm"] * 5), {"llm": 1}, [*nodes, *shared])
    assert found.origins() == {"llm": 5, "title": 50}
    assert "Overview" not in found.queries.values()


@pytest.mark.parametrize("origin", ["human", "llm_judged", "unknown"])
def test_queries_that_people_wrote_or_typed_stay_alone(nodes, origin):
    val = held_out(nodes, [origin] * 5 + ["llm"] * 20)
    assert validate_on_headings(val, {"llm": 1}, nodes) == val


def test_lines_of_metadata_are_no_headings():
    nodes = [TextNode(id_=f"n{i}", text=f"It {BODY} {i}", metadata={"file_path": f"docs/{i}.md"}) for i in range(40)]
    texts = [TextNode(id_=node.node_id, text=node.get_content(metadata_mode="embed")) for node in nodes]
    val = held_out(texts, ["llm"] * 5)
    assert val.corpus["n0"].startswith("file_path: docs/0.md")
    assert validate_on_headings(val, {"llm": 1}) == val
