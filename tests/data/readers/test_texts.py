"""Texts from every kind of file that holds some."""

import pytest
from llama_index.core.schema import MetadataMode

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.readers.texts import read_texts
from tests.conftest import make_dataset


def test_lines_tables_datasets_nodes_and_folders(tmp_path, nodes):
    (tmp_path / "texts.txt").write_text("one\n\ntwo words\n")
    assert read_texts(tmp_path / "texts.txt") == ["one", "two words"]
    (tmp_path / "table.csv").write_text("id;text\n1;first\n2;second\n")
    assert read_texts(tmp_path / "table.csv") == ["first", "second"]
    assert read_texts(tmp_path / "table.csv", "id") == ["1", "2"]
    (tmp_path / "rows.jsonl").write_text('{"passage": "a b"}\n{"passage": "c"}\n')
    assert read_texts(tmp_path / "rows.jsonl") == ["a b", "c"]
    dataset = make_dataset(passages=3)
    dataset.save_json(tmp_path / "train.json")
    assert read_texts(tmp_path / "train.json") == list(dataset.corpus.values())
    (tmp_path / "nodes.jsonl").write_text("\n".join(node.to_json() for node in nodes))
    assert read_texts(tmp_path / "nodes.jsonl") == [node.get_content(MetadataMode.EMBED) for node in nodes]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "page.txt").write_text("A page.")
    assert any("A page." in text for text in read_texts(tmp_path / "folder"))


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "missing.csv"])
def test_a_file_without_texts_is_an_error(tmp_path, name):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DatasetError):
        read_texts(tmp_path / name)
