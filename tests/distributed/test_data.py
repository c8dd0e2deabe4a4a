"""Queries and vectors by Ray Data: equal to those of one process, also when workers die."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from llama_index.core.schema import MetadataMode, TextNode

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import (
    ConfigError,
    DatasetError,
    JournalInUseError,
    LLMError,
    ModelNotFoundError,
    OutputDirectoryError,
)
from llama_index_lora_embed.data import (
    FirstOf,
    LeadQueryGenerator,
    LLMQueryGenerator,
    MetadataQueryGenerator,
    TitleQueryGenerator,
    dataset_from_nodes,
)
from llama_index_lora_embed.data.llm.journal import Journal
from llama_index_lora_embed.data.readers.nodes import read_nodes
from llama_index_lora_embed.distributed import embed_dataset, generate_queries
from tests.conftest import WORDS
from tests.helpers.killing import FailingEmbedding, KillingEmbedding, KillingLLM
from tests.helpers.llms import FAST, FakeLLM, journalled

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.usefixtures("cluster")]
PART = 4000  # bytes: a dozen nodes


def random_nodes(count=150):
    rng = random.Random(1)
    return [TextNode(id_=f"n{i}", text=" ".join([f"m{i}", *rng.sample(WORDS, 12)]) + ".") for i in range(count)]


def write_nodes(path, nodes):
    path.write_text("".join(f"{node.to_json()}\n" for node in nodes))
    return path


def rows(report):
    return pq.read_table(report.path).to_pylist()


def expected_vectors(tiny_model, nodes):
    texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    return np.array(LoraEmbedding(base_model=tiny_model, device="cpu").get_text_embedding_batch(texts))


def test_vectors_and_order_are_those_of_one_process_when_workers_are_killed_five_times(tiny_model, tmp_path):
    nodes, killed = random_nodes(), tmp_path / "killed"
    killed.mkdir()
    marks = [f"m{i}" for i in (0, 30, 31, 90, 149)]
    model = KillingEmbedding(base_model=tiny_model, device="cpu", marks=marks, folder=str(killed))
    source = write_nodes(tmp_path / "nodes.jsonl", nodes)
    report = embed_dataset(source, model, tmp_path / "out", num_workers=2, part_bytes=PART)
    assert sorted(path.name for path in killed.iterdir()) == sorted(marks), "each kill happened"
    assert (report.nodes, report.failed) == (150, 0)
    assert report.parts > 10
    found = rows(report)
    assert [row["id"] for row in found] == [node.node_id for node in nodes]
    vectors = np.array([row["embedding"] for row in found])
    assert np.abs(vectors - expected_vectors(tiny_model, nodes)).max() < 1e-6
    assert "150 nodes" in str(report)


def test_queries_and_journal_are_whole_when_workers_are_killed_five_times(tmp_path):
    nodes, killed = random_nodes(60), tmp_path / "killed"
    killed.mkdir()
    marks = [f"m{i}" for i in (3, 20, 21, 40, 59)]
    llm = KillingLLM(marks=marks, folder=str(killed))
    settings = FAST.replace(in_flight=1)
    generator = LLMQueryGenerator(llm, journal=tmp_path / "journal.jsonl", settings=settings)
    source = write_nodes(tmp_path / "nodes.jsonl", nodes)
    report = generate_queries(source, tmp_path / "out", [generator], num_workers=2, part_bytes=PART)
    ledger = (killed / "ledger").read_text().splitlines()
    assert {path.name for path in killed.iterdir()} == {*marks, "ledger"}, "each kill happened"
    assert len(ledger) == len(set(ledger)) == 60, "no call was repeated that was answered"
    keys = [record["key"] for record in journalled(tmp_path / "journal.jsonl")]
    assert len(keys) == len(set(keys)) == 60, "no gap in the journal, and no duplicate"
    assert report.queries == 120
    made, _ = dataset_from_nodes(read_nodes(report.path), [MetadataQueryGenerator()])
    alone = LLMQueryGenerator(FakeLLM(), journal=tmp_path / "alone.jsonl", settings=settings)
    expected, _ = dataset_from_nodes(nodes, [alone])
    assert list(made.queries.values()) == list(expected.queries.values())
    assert list(made.corpus) == list(expected.corpus)
    assert made.query_origins == expected.query_origins


def test_a_repeated_call_goes_on_where_it_stopped_and_asks_nothing_again(tmp_path):
    source = write_nodes(tmp_path / "nodes.jsonl", random_nodes(40))
    (tmp_path / "killed").mkdir()
    llm = KillingLLM(folder=str(tmp_path / "killed"))
    generator = FirstOf(TitleQueryGenerator(), LLMQueryGenerator(llm, journal=tmp_path / "j.jsonl", settings=FAST))
    first = generate_queries(source, tmp_path / "out", [generator], part_bytes=PART)
    assert (first.llm.answered, first.llm.requests) == (40, 40)
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    before = pq.read_table(tmp_path / "out").to_pylist()
    for part in parts[1:3]:
        part.unlink()
    again = generate_queries(source, tmp_path / "out", [generator], part_bytes=PART)
    assert again.reused == len(parts) - 2
    assert again.llm.requests == 0
    assert again.llm.from_journal > 0
    assert pq.read_table(tmp_path / "out").to_pylist() == before
    assert again.queries == first.queries == 80


def test_a_journal_that_another_run_has_open_is_refused(tmp_path):
    source = write_nodes(tmp_path / "nodes.jsonl", random_nodes(3))
    generator = LLMQueryGenerator(FakeLLM(), journal=tmp_path / "j.jsonl", settings=FAST)
    with Journal(tmp_path / "j.jsonl"), pytest.raises(JournalInUseError):
        generate_queries(source, tmp_path / "out", [generator])
    assert generate_queries(source, tmp_path / "out", [generator]).queries == 6
    Journal(tmp_path / "j.jsonl").close()  # released at the end


def test_a_dead_llm_ends_the_run_with_its_error(tmp_path):
    source = write_nodes(tmp_path / "nodes.jsonl", random_nodes(20))
    llm = FakeLLM(answers=[ConnectionError("no route to host")])
    generator = LLMQueryGenerator(llm, journal=tmp_path / "j.jsonl", settings=FAST.replace(attempts=1))
    with pytest.raises(LLMError, match="no route to host"):
        generate_queries(source, tmp_path / "out", [generator])


class FailingGenerator:
    name = "failing"

    def generate(self, nodes, *, seed=0):
        for node in nodes:
            if node.node_id == "n1":
                raise RuntimeError("cannot read it")
            yield from LeadQueryGenerator(min_words=1).generate([node], seed=seed)


def test_a_node_that_a_generator_fails_for_costs_itself_alone(tmp_path):
    nodes = [TextNode(id_=f"n{i}", text=f"Number {i} stands in this sentence. " * 9) for i in range(4)]
    source = write_nodes(tmp_path / "nodes.jsonl", nodes)
    report = generate_queries(source, tmp_path / "out", [FailingGenerator()])
    assert [row["queries"] for row in rows(report)] == [1, 0, 1, 1]
    assert report.failed == 1
    assert report.problems == ["n1: RuntimeError: cannot read it"]


def test_a_row_that_cannot_be_embedded_costs_itself_alone(tmp_path):
    lines = ['{"id": 7, "text": "good", "lang": "en"}', "no JSON", '{"_id": "b", "passage": "bad"}', '{"id": "c"}']
    lines += ["", '{"id": "i", "text": "infinite"}', '{"id": "last", "text": "good too"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    report = embed_dataset(tmp_path / "rows.jsonl", FailingEmbedding(), tmp_path / "out")
    found = rows(report)
    assert [row["embedding"] for row in found] == [[4.0, 1.0], None, None, None, None, [8.0, 1.0]]
    assert [row["id"] for row in found] == ["7", "rows.jsonl, byte 40", "b", "rows.jsonl, byte 79", "i", "last"]
    assert (report.nodes, report.failed) == (6, 4)
    assert report.problems[1] == "b: ValueError: a bad text"
    assert json.loads(found[0]["node"])["metadata"] == {"lang": "en"}
    assert found[0]["text"] == "good", "metadata is not embedded"


def test_a_run_in_which_each_row_fails_raises(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "b", "text": "bad"}\n')
    with pytest.raises(DatasetError, match="a bad text"):
        embed_dataset(tmp_path / "rows.jsonl", FailingEmbedding(), tmp_path / "out")


def test_parquet_in_row_groups_is_read_in_parts_and_goes_into_a_vector_store_in_order(tmp_path):
    import chromadb
    from llama_index.vector_stores.chroma import ChromaVectorStore

    table = pa.table({"id": [f"p{i}" for i in range(100)], "text": [f"text {i} " * 20 for i in range(100)]})
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 70), tmp_path / "in" / "a.parquet", row_group_size=30)
    pq.write_table(table.slice(70), tmp_path / "in" / "b.parquet")
    collection = chromadb.EphemeralClient().create_collection("parts", metadata={"hnsw:space": "cosine"})
    store = ChromaVectorStore(chroma_collection=collection)
    report = embed_dataset(tmp_path / "in", FailingEmbedding(), tmp_path / "out", vector_store=store, part_bytes=500)
    assert report.parts > 4
    assert [row["id"] for row in rows(report)] == table["id"].to_pylist()
    kept = collection.get(include=["embeddings", "documents"])
    assert kept["ids"] == table["id"].to_pylist()
    assert kept["documents"] == table["text"].to_pylist()
    assert [vector[0] for vector in kept["embeddings"]] == [len(text) for text in kept["documents"]]


def test_the_output_of_another_input_is_refused(tmp_path):
    source = write_nodes(tmp_path / "nodes.jsonl", random_nodes(3))
    embed_dataset(source, FailingEmbedding(), tmp_path / "out")
    with pytest.raises(OutputDirectoryError, match="different: parts"):
        embed_dataset(source, FailingEmbedding(), tmp_path / "out", part_bytes=10)
    with pytest.raises(OutputDirectoryError, match="different: other files"):
        embed_dataset(source, FailingEmbedding(), tmp_path)


def test_errors_of_a_worker_come_back_as_they_are(tmp_path):
    source = write_nodes(tmp_path / "nodes.jsonl", random_nodes(3))
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        embed_dataset(source, tmp_path / "nowhere", tmp_path / "out")


def test_wrong_arguments_are_named_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        embed_dataset(tmp_path, FailingEmbedding(), tmp_path / "out", num_workers=0, part_bytes=0)
    assert len(caught.value.problems) == 2
    limited = LLMQueryGenerator(FakeLLM(), journal=tmp_path / "j.jsonl", settings=FAST.replace(max_requests=5))
    with pytest.raises(ConfigError, match="max_requests=5"):
        generate_queries(tmp_path, tmp_path / "out", [FirstOf(limited)])
    with pytest.raises(DatasetError, match=r"\.jsonl or \.parquet"):
        embed_dataset(tmp_path / "nothing", FailingEmbedding(), tmp_path / "out")


def test_the_workers_of_a_machine_share_the_weights_of_the_base(tiny_model):
    import ray

    from tests.helpers.memory import mapped_parameters

    shares = ray.get([ray.remote(mapped_parameters).remote(tiny_model) for _ in range(2)])
    assert shares == [1.0, 1.0], "all parameters are pages of the file, of which the system has one copy"
