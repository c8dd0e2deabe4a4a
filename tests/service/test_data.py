import json

import pytest
from llama_index.core.schema import NodeRelationship, TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LabelledPairs
from llama_index_lora_embed.data.readers.nodes import read_nodes
from llama_index_lora_embed.data.training_data import read_training_data
from llama_index_lora_embed.service.data import file_rows, inline_rows, read_data
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.conftest import make_dataset

SETTINGS = ServiceSettings(max_rows=200, max_row_characters=100)


def read(*rows, name="pairs"):
    problems = []
    data = read_data(inline_rows(name, rows), SETTINGS, problems)
    return data, problems


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "passage": "p"},
        {"question": "q", "answer": "p"},
        {"anchor": "q", "positive": "p"},
        {"prompt": "q", "completion": "p"},
        ["q", "p"],
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "p"},
            ]
        },
    ],
)
def test_a_pair_has_many_forms(row):
    data, problems = read(row)
    assert not problems
    assert data.kind == "queries"
    assert (list(data.dataset.queries.values()), list(data.dataset.corpus.values())) == (["q"], ["p"])


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "passage": "p", "negative": "n", "score": 0.5},
        {"query": "q", "positive": "p", "negatives": ["n"], "score": 0.5},
        ["q", "p", "n", 0.5],
    ],
)
def test_a_triplet_has_negatives_and_a_grade(row):
    data, problems = read(row)
    assert not problems
    dataset = data.dataset
    assert [dataset.corpus[i] for i in dataset.hard_negatives["q0"]] == ["n"]
    assert list(dataset.relevance_scores["q0"].values()) == [0.5]


def test_openais_preferences_are_triplets():
    message = {"messages": [{"role": "user", "content": "q"}]}
    preferred, other = ([{"role": "assistant", "content": text}] for text in "pn")
    data, problems = read({"input": message, "preferred_output": preferred, "non_preferred_output": other})
    assert not problems
    assert list(data.dataset.corpus.values()) == ["p", "n"]
    assert data.dataset.hard_negatives == {"q0": ["p1"]}


def test_texts_that_repeat_are_one_query_and_one_passage():
    data, _ = read(["q", "a"], ["q", "b"], ["r", "a"])
    assert data.dataset.relevant_docs == {"q0": ["p0", "p1"], "q1": ["p0"]}


def test_scored_pairs_are_labelled_pairs():
    data, problems = read({"query": "q", "passage": "p", "score": 1}, ["r", "s", 0.25])
    assert not problems
    assert data.dataset == LabelledPairs(["q", "r"], ["p", "s"], [1.0, 0.25], symmetric=False)
    data, _ = read({"text1": "a", "text2": "b", "score": 0}, {"sentence1": "c", "sentence2": "d", "label": 1})
    assert data.dataset == LabelledPairs(["a", "c"], ["b", "d"], [0.0, 1.0])


def test_nodes_keep_what_decides_their_text_and_where_they_come_from():
    node = TextNode(id_="n1", text="one", metadata={"title": "t", "page": 3}, excluded_embed_metadata_keys=["page"])
    node.relationships[NodeRelationship.SOURCE] = TextNode(id_="doc").as_related_node_info()
    own = {"text": "two", "id": "n2", "metadata": {"title": "u"}, "source_document": "doc"}
    data, problems = read(json.loads(node.to_json()), own, "three", name="nodes")
    assert not problems
    assert data.kind == "nodes"
    assert [n.get_content(metadata_mode="embed") for n in data.nodes[:1]] == [node.get_content(metadata_mode="embed")]
    assert [n.node_id for n in data.nodes[:2]] == ["n1", "n2"]
    assert [n.ref_doc_id for n in data.nodes] == ["doc", "doc", None]


def test_every_wrong_row_is_named_at_once():
    rows = [
        5,
        {},
        ["q"],
        ["q", ""],
        {"query": "q", "passage": 7},
        {"query": "q", "passage": "x" * 101},
        {"query": "q\ud800", "passage": "p"},
        {"query": "q", "passage": "p", "score": 2},
        {"query": "q", "passage": "p", "negative": "n", "score": 0},
        {"messages": "none"},
        {"text1": "a", "text2": "b"},
        {"text": "t", "metadata": 3},
        ["q", "p", 0.1, 0.2],
    ]
    data, problems = read(*rows)
    assert data is None
    assert [problem.partition(":")[0] for problem in problems] == [f"pairs[{number}]" for number in range(len(rows))]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "no training data"),
        ([["q", "p"], ["q", "p", 0.5]], "pairs[1] is of another kind than pairs[0]"),
        ([["q", "p"], "node"], "1 nodes among 1 pairs"),
        ([["q", "p"], ["q", "r", "p"]], "pairs[1]: its negative is the passage of pairs[0]"),
        ([{"text": "a", "id": "n"}, {"text": "b", "id": "n"}], "1 nodes repeat the id"),
        ([["q", "p"]] * 201, "pairs[200]: more than 200 rows"),
        ([["q"]] * 500, "not read on after"),
    ],
)
def test_rows_that_do_not_go_together_are_refused(rows, problem):
    data, problems = read(*rows)
    assert data is None
    assert any(problem in line for line in problems), problems


def test_a_file_holds_lines_a_list_or_a_dataset(tmp_path):
    path = tmp_path / "file"
    lines = [json.dumps({"query": f"q{i}", "passage": f"p{i}"}) for i in range(3)]
    dataset = make_dataset(passages=8)
    for text, queries in (
        ("\n\n".join(lines), 3),
        (lines[0], 1),
        (f"[{','.join(lines)}]", 3),
        (json.dumps(dataset.model_dump(exclude_none=True), indent=2), 16),
    ):
        path.write_text(text)
        problems = []
        data = read_data(file_rows(path, "training_file", problems), SETTINGS, problems)
        assert not problems
        assert len(data.dataset.queries) == queries


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe{}", b'{"query": "q", "pass', b"[" * 100_000, b"\x1f\x8b\x08" + bytes(50), b"", b"null", b"{}\n{}"],
)
def test_a_file_of_anything_else_is_refused_with_its_lines(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    problems = []
    assert read_data(file_rows(path, "training_file", problems), SETTINGS, problems) is None
    assert problems
    assert all(problem.startswith(("training_file", "no training data")) for problem in problems)


def test_what_is_written_is_what_a_run_reads(tmp_path):
    for rows, kind in (([["q", "p"], ["r", "s", "n"]], "queries"), ([["q", "p", 0.5]], "pairs")):
        data, _ = read(*rows)
        data.write(tmp_path / "training.json")
        assert read_training_data(tmp_path / "training.json", kind) == data.dataset
    data, _ = read({"text": "a", "id": "n"}, "b")
    data.write(tmp_path / "training.jsonl")
    assert [(node.node_id, node.text) for node in read_nodes(tmp_path / "training.jsonl")] == [
        (node.node_id, node.text) for node in data.nodes
    ]


def test_the_origin_of_queries_is_recorded_where_the_data_says_nothing():
    rows = inline_rows("pairs", [["q", "p"]])
    data = read_data(rows, SETTINGS, [], "human")
    assert isinstance(data.dataset, EmbeddingQAFinetuneDataset)
    assert data.dataset.origins() == {"human": 1}
