import csv
import json
import os
import random
import signal
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.schema import TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, OutputDirectoryError
from llama_index_lora_embed.data import drop_near_duplicates, near_duplicates
from llama_index_lora_embed.data.near_duplicates import near_duplicate_groups
from tests.helpers.datasets import data_file
from tests.helpers.full_disk import full_disk

WORDS = [f"word{i}" for i in range(30)]


def changed(words, place):
    return [*words[:place], "changed", *words[place + 1 :]]


long_texts = st.builds(
    lambda seed, place: " ".join(changed(random.Random(seed).choices(WORDS, k=60), place)),
    st.integers(0, 3),
    st.integers(0, 80),
)
texts = st.one_of(st.text(max_size=30), st.sampled_from(["C++", "c++ ", "", "光合作用是植物利用阳光"]), long_texts)


def kept_ids(folder):
    """Ids in the order of the files' names."""
    found = []
    for path in sorted(Path(folder).glob("part-*")):
        if path.suffix == ".parquet":
            found += pq.read_table(path)["id"].to_pylist()
        else:
            found += [json.loads(line)["id"] for line in path.read_text().splitlines()]
    return found


@settings(max_examples=20, deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=25), st.sampled_from([0.5, 0.8, 0.9, 1.0]), st.sampled_from([100, 700, 9000])
)
def test_files_keep_what_the_groups_in_memory_keep(texts, threshold, part_bytes):
    corpus = {f"p{i}": text for i, text in enumerate(texts)}
    half = len(texts) // 2
    with tempfile.TemporaryDirectory() as folder:
        groups = near_duplicate_groups(corpus, threshold)
        assert near_duplicate_groups(corpus, threshold, folder=folder) == groups
        rows = [{"id": i, "text": text} for i, text in corpus.items()]
        Path(folder, "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:half]))
        table = {"id": [row["id"] for row in rows[half:]]}
        table["text"] = [row["text"].encode("utf-8", "replace").decode() for row in rows[half:]]
        pq.write_table(pa.table(table), f"{folder}/b.parquet", row_group_size=4)
        report = drop_near_duplicates(folder, f"{folder}/out", threshold, part_bytes=part_bytes)
        assert kept_ids(f"{folder}/out") == [i for i in corpus if groups.get(i, i) == i]
        with open(f"{folder}/out/dropped.csv", newline="") as file:
            assert dict(list(csv.reader(file))[1:]) == {i: first for i, first in groups.items() if i != first}
    assert (report.rows, report.failed) == (len(corpus), 0)
    assert report.dropped == sum(i != first for i, first in groups.items())


@pytest.mark.slow
def test_tenk_is_grouped_on_disk_as_in_memory(tmp_path):
    corpus = EmbeddingQAFinetuneDataset.from_json(data_file("tenk_train.json")).corpus
    groups = near_duplicate_groups(corpus)
    assert near_duplicate_groups(corpus, folder=tmp_path) == groups
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in corpus.items()))
    report = drop_near_duplicates(tmp_path / "in.jsonl", tmp_path / "out", part_bytes=1 << 18)
    assert kept_ids(tmp_path / "out") == [i for i in corpus if groups.get(i, i) == i]
    assert 0 < report.dropped < len(corpus)


def test_what_is_kept_stays_as_it_was(tmp_path):
    node = TextNode(id_="node", text="one", metadata={"title": "A title"})
    lines = [node.to_json(), '{"text":  "one", "id": 5}', '{"id": "6", "text": "ONE", "more": [1, {"a": null}]}', "?"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    schema = pa.schema([("id", pa.int64()), ("body", pa.string()), ("vector", pa.list_(pa.float32()))])
    table = pa.table({"id": [1, 2, 3], "body": ["two", "Two ", "three"], "vector": [[1.0], [2.0], None]}, schema)
    pq.write_table(table, tmp_path / "b.parquet")
    report = drop_near_duplicates([tmp_path / "a.jsonl"], tmp_path / "out")
    assert (tmp_path / "out" / "part-00000000.jsonl").read_text().splitlines() == [lines[0], lines[1], lines[3]]
    assert (report.rows, report.dropped, report.failed, report.examples) == (4, 1, 1, [("6", "5")])
    assert report.problems[0].startswith("a.jsonl, byte")
    assert "1 of 4 rows repeat an earlier one" in str(report)
    assert "'6' of '5'" in str(report)
    drop_near_duplicates(tmp_path / "b.parquet", tmp_path / "tables", text_column="body")
    kept = pq.read_table(tmp_path / "tables" / "part-00000000.parquet")
    assert kept.schema == schema
    assert kept.to_pylist() == [table.to_pylist()[0], table.to_pylist()[2]]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [
        {"id": i, "text": " ".join(random.Random(i % 40).choices(WORDS, k=50)), "more": "x" * 2000} for i in range(50)
    ]
    (tmp_path / "in" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path / "in"


def test_ctrl_c_leaves_nothing_behind(source, tmp_path, monkeypatch):
    signature, seen = near_duplicates._signature, []

    def interrupted(shingles):
        seen.append(1)
        if len(seen) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return signature(shingles)

    monkeypatch.setattr(near_duplicates, "_signature", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drop_near_duplicates(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]
    monkeypatch.undo()
    assert drop_near_duplicates(source, tmp_path / "out").dropped == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("limit", [1000, 19_000, 60_000])  # below the texts, the signatures, the first file
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(source, tmp_path, limit):
    with full_disk(limit), pytest.raises(OutputDirectoryError, match="Free some space"):
        drop_near_duplicates(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_an_output_that_is_in_use_or_cannot_be_written_is_refused(source, tmp_path):
    with pytest.raises(OutputDirectoryError, match=r"holds 'rows.jsonl'.*new or empty"):
        drop_near_duplicates(source, source)
    (tmp_path / "file").touch()
    with pytest.raises(OutputDirectoryError, match="cannot be written"):
        drop_near_duplicates(source, tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    assert drop_near_duplicates(source, tmp_path / "empty").rows == 50


def test_a_source_without_a_text_and_a_wrong_threshold_are_refused(source, tmp_path):
    with pytest.raises(DatasetError, match="50 rows, of which none can be read") as caught:
        drop_near_duplicates(source, tmp_path / "out", text_column="body")
    assert len(caught.value.problems) == 20
    assert "without 'body'" in caught.value.problems[0]
    with pytest.raises(ConfigError, match="threshold=0"):
        drop_near_duplicates(source, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
