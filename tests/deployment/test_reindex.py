"""A new index beside the old one: compared, switched atomically, rolled back."""

import json
import shutil

import chromadb
import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, OutputDirectoryError, WrongIndexError
from llama_index_lora_embed.deployment.reindex import ChromaIndexStore, FolderIndexStore, open_index, reindex, roll_back
from tests.conftest import make_dataset


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(passages=30, seed=11)


@pytest.fixture(scope="module")
def nodes(dataset):
    return [TextNode(id_=i, text=text) for i, text in dataset.corpus.items()]


@pytest.fixture(scope="module")
def base(tiny_model):
    return LoraEmbedding(base_model=tiny_model, device="cpu")


@pytest.fixture(scope="module")
def tuned(adapter):
    return LoraEmbedding(adapter, device="cpu")


@pytest.fixture(params=["folder", "chroma"])
def store(request, tmp_path):
    if request.param == "folder":
        return tmp_path / "index"
    return ChromaIndexStore(chromadb.PersistentClient(str(tmp_path / "chroma")), "handbook")


def versions(store):
    return (store if isinstance(store, ChromaIndexStore) else FolderIndexStore(store)).versions()


def top_ids(store, model):
    return [n.node_id for n in open_index(store, model).as_retriever(similarity_top_k=3).retrieve("w1 w2 w3")]


def test_a_better_index_is_switched_to_and_rolled_back(store, nodes, dataset, base, tuned):
    first = reindex(store, nodes, base)
    assert first.switched
    assert first.reason == "there was no index in use"
    old = top_ids(store, base)
    done = reindex(store, nodes, tuned, dataset=dataset, before=base, tolerance=1.0)
    assert done.switched
    assert done.previous == first.version
    assert done.comparison.base.metrics["hit_rate"] > 0
    assert top_ids(store, tuned) == [
        n.node_id for n in done.index.as_retriever(similarity_top_k=3).retrieve("w1 w2 w3")
    ]
    with pytest.raises(WrongIndexError):
        open_index(store, base)
    assert roll_back(store) == first.version
    assert top_ids(store, base) == old
    assert roll_back(store) == done.version
    assert top_ids(store, tuned)


def test_a_worse_index_is_built_but_not_switched_to(store, nodes, dataset, base, other_tiny_model):
    worse = LoraEmbedding(base_model=other_tiny_model, device="cpu", truncate_dim=1)
    reindex(store, nodes, base)
    done = reindex(store, nodes, worse, dataset=dataset, before=base)
    assert not done.switched
    assert str(done).startswith(f"NOT SWITCHED to {done.version}: WORSE on ")
    assert top_ids(store, base)
    assert done.version in versions(store), "kept for inspection"
    with pytest.raises(ConfigError, match="without a previous version"):
        roll_back(store)


def test_a_run_that_is_killed_leaves_the_old_index_in_use(store, nodes, base, tuned, monkeypatch):
    reindex(store, nodes, base)
    before = top_ids(store, base)

    class Killed(BaseException):
        pass

    def dies(texts, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LoraEmbedding, "get_text_embedding_batch", dies)
        with pytest.raises(Killed):
            reindex(store, nodes, tuned)
    assert top_ids(store, base) == before
    for _ in range(3):
        reindex(store, nodes, tuned)
    assert len(versions(store)) == 2, "the version in use, the one before, and nothing half built"
    assert top_ids(store, tuned)


def test_as_many_versions_as_asked_for_are_kept(store, nodes, base):
    names = [reindex(store, nodes, base, keep=3).version for _ in range(5)]
    assert versions(store) == names[-3:]
    roll_back(store)
    assert reindex(store, nodes, base).version in versions(store)


def test_invalid_arguments_are_refused_before_anything_is_built(store, nodes, dataset, base, tuned):
    with pytest.raises(ConfigError, match="without an index in use"):
        open_index(store, base)
    with pytest.raises(ConfigError, match="no nodes"):
        reindex(store, [], base)
    for wrong in ({"tolerance": 2}, {"tolerance": True}, {"keep": 1}, {"keep": 2.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            reindex(store, nodes, base, **wrong)
    reindex(store, nodes, base)
    with pytest.raises(ConfigError, match="before=old_model"):
        reindex(store, nodes, tuned, dataset=dataset)
    with pytest.raises(WrongIndexError):
        reindex(store, nodes, tuned, dataset=dataset, before=tuned)
    assert len(versions(store)) == 1
    other = make_dataset(prefix="other")
    with pytest.raises(DatasetError, match="none of which is in the dataset"):
        reindex(store, nodes, tuned, dataset=other, before=base)
    assert len(versions(store)) == 1, "nothing was built"
    assert top_ids(store, base), "the old index is still in use"
    with pytest.raises(ConfigError, match="a folder or a ChromaIndexStore"):
        reindex(5, nodes, base)
    with pytest.raises(ConfigError, match="letters, digits"):
        ChromaIndexStore(None, "a name")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, nodes, base):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="cannot be written"):
        reindex(tmp_path / "file" / "index", nodes, base)


def test_a_folder_that_was_moved_is_the_same_index(tmp_path, nodes, base):
    done = reindex(tmp_path / "index", nodes, base)
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    assert top_ids(tmp_path / "elsewhere", base)
    assert json.loads((tmp_path / "elsewhere" / "current.json").read_text()) == {"current": done.version}


def test_embeddings_of_the_nodes_are_not_used_in_the_new_index(store, nodes, base, tuned):
    embedded = base([node.model_copy() for node in nodes])
    assert embedded[0].embedding
    reindex(store, embedded, tuned)
    hit = open_index(store, tuned).as_retriever(similarity_top_k=1).retrieve(nodes[3].text)[0]
    own = tuned.get_query_embedding(nodes[3].text), tuned.get_text_embedding(nodes[3].text)
    assert hit.node_id == nodes[3].node_id
    if not isinstance(store, ChromaIndexStore):  # its scores are not cosines
        assert hit.score == pytest.approx(sum(a * b for a, b in zip(*own, strict=True)), abs=1e-3)
    assert embedded[0].embedding, "the user's nodes are unchanged"


def test_other_folders_in_the_store_are_kept(tmp_path, nodes, base):
    for name in ("v-notes", "v-1", "vision"):
        (tmp_path / "index" / name).mkdir(parents=True)
        (tmp_path / "index" / name / "thesis.txt").write_text("mine")
    for _ in range(4):
        reindex(tmp_path / "index", nodes, base)
    assert {p.name for p in (tmp_path / "index").iterdir()} > {"v-notes", "v-1", "vision"}
    (tmp_path / "index" / "current.json").write_text("")
    with pytest.raises(WrongIndexError, match="unreadable"):
        open_index(tmp_path / "index", base)


def test_of_two_concurrent_runs_one_switches(store, nodes, base, tuned, monkeypatch):
    reindex(store, nodes, base)
    build, others = LoraEmbedding.get_text_embedding_batch, []

    def reindex_meanwhile(self, *args, **kwargs):
        if not others:
            others.append(None)
            others.append(reindex(store, nodes, base))
        return build(self, *args, **kwargs)

    monkeypatch.setattr(LoraEmbedding, "get_text_embedding_batch", reindex_meanwhile)
    with pytest.raises(WrongIndexError, match="switched in the meantime"):
        reindex(store, nodes, tuned)
    assert others[1].switched
    assert top_ids(store, base)
