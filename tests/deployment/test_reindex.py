"""A new index beside the old one: judged, switched at once, and back."""

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
def place(request, tmp_path):
    if request.param == "folder":
        return tmp_path / "index"
    return ChromaIndexStore(chromadb.PersistentClient(str(tmp_path / "chroma")), "handbook")


def versions(place):
    return (place if isinstance(place, ChromaIndexStore) else FolderIndexStore(place)).versions()


def found(place, model):
    return [n.node_id for n in open_index(place, model).as_retriever(similarity_top_k=3).retrieve("w1 w2 w3")]


def test_a_better_model_takes_over_and_can_be_taken_back(place, nodes, dataset, base, tuned):
    first = reindex(place, nodes, base)
    assert first.switched
    assert first.reason == "nothing was in use before"
    old = found(place, base)
    done = reindex(place, nodes, tuned, dataset=dataset, before=base, tolerance=1.0)
    assert done.switched
    assert done.previous == first.version
    assert done.comparison.base.metrics["hit_rate"] > 0
    assert found(place, tuned) == [n.node_id for n in done.index.as_retriever(similarity_top_k=3).retrieve("w1 w2 w3")]
    with pytest.raises(WrongIndexError):
        open_index(place, base)
    assert roll_back(place) == first.version
    assert found(place, base) == old
    assert roll_back(place) == done.version
    assert found(place, tuned)


def test_a_worse_model_is_built_and_not_taken(place, nodes, dataset, base, other_tiny_model):
    worse = LoraEmbedding(base_model=other_tiny_model, device="cpu", truncate_dim=1)
    reindex(place, nodes, base)
    done = reindex(place, nodes, worse, dataset=dataset, before=base)
    assert not done.switched
    assert str(done).startswith(f"NOT SWITCHED to {done.version}: nDCG@10 -0.")
    assert found(place, base)
    assert done.version in versions(place), "to be looked at"
    with pytest.raises(ConfigError, match="no version before"):
        roll_back(place)


def test_a_run_that_is_killed_leaves_the_old_index_in_use(place, nodes, base, tuned, monkeypatch):
    reindex(place, nodes, base)
    before = found(place, base)

    class Killed(BaseException):
        pass

    def dies(texts, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LoraEmbedding, "get_text_embedding_batch", dies)
        with pytest.raises(Killed):
            reindex(place, nodes, tuned)
    assert found(place, base) == before
    for _ in range(3):
        reindex(place, nodes, tuned)
    assert len(versions(place)) == 2, "the one in use, the one before, and nothing half-built"
    assert found(place, tuned)


def test_old_versions_go_and_as_many_as_asked_for_stay(place, nodes, base):
    names = [reindex(place, nodes, base, keep=3).version for _ in range(5)]
    assert versions(place) == names[-3:]
    roll_back(place)
    assert reindex(place, nodes, base).version in versions(place)


def test_what_cannot_be_reindexed_is_refused_before_anything_is_built(place, nodes, dataset, base, tuned):
    with pytest.raises(ConfigError, match="without an index in use"):
        open_index(place, base)
    with pytest.raises(ConfigError, match="no nodes"):
        reindex(place, [], base)
    for wrong in ({"tolerance": 2}, {"tolerance": True}, {"keep": 1}, {"keep": 2.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            reindex(place, nodes, base, **wrong)
    reindex(place, nodes, base)
    with pytest.raises(ConfigError, match="before=old_model"):
        reindex(place, nodes, tuned, dataset=dataset)
    with pytest.raises(WrongIndexError):
        reindex(place, nodes, tuned, dataset=dataset, before=tuned)
    assert len(versions(place)) == 1
    other = make_dataset(prefix="other")
    with pytest.raises(DatasetError, match="none of which is in the dataset"):
        reindex(place, nodes, tuned, dataset=other, before=base)
    assert len(versions(place)) == 1, "nothing was built"
    assert found(place, base), "still in use"
    with pytest.raises(ConfigError, match="a folder or a ChromaIndexStore"):
        reindex(5, nodes, base)
    with pytest.raises(ConfigError, match="letters, digits"):
        ChromaIndexStore(None, "a name")


def test_a_folder_that_cannot_be_written(tmp_path, nodes, base):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="cannot be written"):
        reindex(tmp_path / "file" / "index", nodes, base)


def test_a_folder_that_was_moved_is_the_same_index(tmp_path, nodes, base):
    done = reindex(tmp_path / "index", nodes, base)
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    assert found(tmp_path / "elsewhere", base)
    assert json.loads((tmp_path / "elsewhere" / "current.json").read_text()) == {"current": done.version}


def test_vectors_that_nodes_bring_along_are_not_taken_for_the_new_models(place, nodes, base, tuned):
    embedded = base([node.model_copy() for node in nodes])
    assert embedded[0].embedding
    reindex(place, embedded, tuned)
    hit = open_index(place, tuned).as_retriever(similarity_top_k=1).retrieve(nodes[3].text)[0]
    own = tuned.get_query_embedding(nodes[3].text), tuned.get_text_embedding(nodes[3].text)
    assert hit.node_id == nodes[3].node_id
    if not isinstance(place, ChromaIndexStore):  # whose scores are of another kind
        assert hit.score == pytest.approx(sum(a * b for a, b in zip(*own, strict=True)), abs=1e-3)
    assert embedded[0].embedding, "the user's nodes are as they were"


def test_what_others_have_put_there_stays(tmp_path, nodes, base):
    for name in ("v-notes", "v-1", "vision"):
        (tmp_path / "index" / name).mkdir(parents=True)
        (tmp_path / "index" / name / "thesis.txt").write_text("mine")
    for _ in range(4):
        reindex(tmp_path / "index", nodes, base)
    assert {p.name for p in (tmp_path / "index").iterdir()} > {"v-notes", "v-1", "vision"}
    (tmp_path / "index" / "current.json").write_text("")
    with pytest.raises(WrongIndexError, match="unreadable"):
        open_index(tmp_path / "index", base)


def test_of_two_at_once_one_switches(place, nodes, base, tuned, monkeypatch):
    reindex(place, nodes, base)
    build, others = LoraEmbedding.get_text_embedding_batch, []

    def meanwhile(self, *args, **kwargs):
        if not others:
            others.append(None)
            others.append(reindex(place, nodes, base))
        return build(self, *args, **kwargs)

    monkeypatch.setattr(LoraEmbedding, "get_text_embedding_batch", meanwhile)
    with pytest.raises(WrongIndexError, match="has switched meanwhile"):
        reindex(place, nodes, tuned)
    assert others[1].switched
    assert found(place, base)
