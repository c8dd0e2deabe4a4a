import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.readers.parts import plan_parts, read_part


def rows_of(source, part_bytes, **columns):
    return [row for part in plan_parts(source, part_bytes) for row in read_part(part, **columns)]


@pytest.mark.parametrize("part_bytes", [1, 17, 100, 10_000])
def test_each_line_belongs_to_the_part_in_which_it_begins(tmp_path, part_bytes):
    lines = [json.dumps({"id": i, "text": "x" * (i % 13)}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\r\n".join([*lines[:20], "", *lines[20:]]))
    assert [row.id for row in rows_of(tmp_path / "rows.jsonl", part_bytes)] == [str(i) for i in range(40)]


@pytest.mark.parametrize("part_bytes", [1, 300, 10_000])
def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path, part_bytes):
    table = pa.table({"key": [f"p{i}" for i in range(70)], "body": [f"text {i}" for i in range(70)], "n": range(70)})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=30)
    (tmp_path / "a.jsonl").write_text(TextNode(id_="node", text="of LlamaIndex").to_json())
    (tmp_path / "c.jsonl").write_text('{"key": "last", "body": "text"}\n')
    rows = rows_of(tmp_path, part_bytes, id_column="key", text_column="body")
    assert [row.id for row in rows] == ["node", *(f"p{i}" for i in range(70)), "last"]
    assert rows[3].node.text == "text 2"
    assert rows[3].node.metadata == {"n": 2}


def test_a_row_that_is_no_node_has_an_error_in_its_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "text": "a"}\nno JSON\n{"id": 2}\n')
    first, *wrong = rows_of(tmp_path / "rows.jsonl", 1 << 20)
    assert (first.id, first.error) == ("1", None)
    assert [row.id for row in wrong] == ["rows.jsonl, byte 23", "rows.jsonl, byte 31"]
    assert "a text is missing: columns 'id', without 'text' or 'passage' or 'content'" in wrong[1].error


def test_what_is_no_input_is_refused(tmp_path):
    (tmp_path / "text.txt").touch()
    with pytest.raises(DatasetError, match="another kind of file"):
        plan_parts(tmp_path / "text.txt", 100)
    with pytest.raises(DatasetError, match="no such files"):
        plan_parts([tmp_path], 100)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"torn\.parquet"):
        plan_parts(tmp_path / "torn.parquet", 100)
