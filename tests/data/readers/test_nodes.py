import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.readers.nodes import read_nodes


def test_nodes_are_read_line_by_line(tmp_path):
    nodes = [TextNode(text="Grüße 🌍\u2028zweite Zeile", id_="a"), TextNode(text="b", id_="b")]
    path = tmp_path / "nodes.jsonl"
    path.write_text("\n\n".join(node.to_json() for node in nodes), encoding="utf-8")
    assert read_nodes(path) == nodes


@pytest.mark.parametrize("line", [b'{"text": "caf\xe9"}', b"5", b"{", b'"text"', b"null", b"[" * 100_000])
def test_a_line_that_is_no_node_is_named(tmp_path, line):
    path = tmp_path / "nodes.jsonl"
    path.write_bytes(TextNode(text="a").to_json().encode() + b"\n" + line + b"\n")
    with pytest.raises(DatasetError, match="line 2 of"):
        read_nodes(path)
