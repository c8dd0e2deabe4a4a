"""A bridge from a new model to the index of an old one."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode

from llama_index_lora_embed import AdapterEmbeddingModel, EmbeddingQAFinetuneDataset, evaluate_retrieval
from llama_index_lora_embed.core.errors import (
    BaseModelMismatchError,
    ConfigError,
    DatasetError,
    OutputDirectoryError,
    WrongIndexError,
)
from llama_index_lora_embed.deployment import Alignment, align_index, stamp_index, verify_index
from llama_index_lora_embed.evaluation import evaluate_index
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.conftest import make_dataset
from tests.helpers.embedding_models import PaidEmbedding

OLD = PaidEmbedding(model_name="old", dimensions=24, turn=0)
# its first coordinates are those of the old model, and the others are its own
NEW = PaidEmbedding(model_name="new", dimensions=28, turn=0)
DATA = make_dataset(passages=300)


class Unrelated(PaidEmbedding):
    """As good as the other models, and nothing to do with them."""

    def _vector(self, text: str, query: bool) -> list[float]:
        vector: list[float] = super()._vector(" ".join(f"other-{word}" for word in text.split()), query)
        return vector


def built(model: BaseEmbedding = OLD, data: EmbeddingQAFinetuneDataset = DATA) -> VectorStoreIndex:
    return VectorStoreIndex([TextNode(id_=i, text=text) for i, text in data.corpus.items()], embed_model=model)


def quiet(*arguments: Any, **settings: Any) -> Alignment:
    """`align_index` without the warning that small models and samples earn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return align_index(*arguments, **settings)


@pytest.fixture(scope="module")
def index() -> VectorStoreIndex:
    index = built()
    stamp_index(index, OLD)
    return index


@pytest.fixture(scope="module")
def bridge(index: VectorStoreIndex, tmp_path_factory: pytest.TempPathFactory) -> Alignment:
    return quiet(index, NEW, tmp_path_factory.mktemp("bridge") / "b", old_model=OLD, dataset=DATA)


def test_the_figures_say_what_is_kept_on_queries_about_passages_that_were_not_learnt_from(bridge: Alignment) -> None:
    assert (bridge.searched, bridge.pairs) == (300, 300 - 75 - 37)
    assert bridge.queries == 150, "two about each of 75 passages"
    assert bridge.kept == bridge.bridged / bridge.reembedded > 0.9
    assert bridge.interval[0] <= bridge.bridged - bridge.reembedded <= bridge.interval[1]
    assert bridge.before is not None
    assert set(bridge.tried) == {"orthogonal", "affine", "mlp"}
    assert bridge.tried[bridge.kind] == max(bridge.tried.values())
    assert f"{bridge.kept:.1%} of the recall@10 of re-embedding is kept" in str(bridge)
    assert "150 human-written queries among 300 passages" in str(bridge)


def test_a_retriever_with_the_bridge_searches_the_old_index_as_it_is(bridge: Alignment) -> None:
    def retriever(model: BaseEmbedding) -> Any:
        index._embed_model = model
        return index.as_retriever(similarity_top_k=10)

    index, some = built(), DATA.subset(list(DATA.queries)[::6], DATA.corpus)
    before = pickle.dumps(index.vector_store.data.embedding_dict)  # type: ignore[attr-defined]
    old, new = (evaluate_index(retriever(model), some).metrics["hit_rate"] for model in (OLD, bridge.embed_model))
    assert new > 0.9 * old > 0.5
    assert pickle.dumps(index.vector_store.data.embedding_dict) == before  # type: ignore[attr-defined]


def test_new_nodes_can_be_added_to_the_old_index_because_passages_are_mapped_too(bridge: Alignment) -> None:
    index = built()
    index._embed_model = bridge.embed_model
    index.insert_nodes([TextNode(id_="added", text="w1 w2 w3 w4 w5 w6")])
    assert len(index.vector_store.data.embedding_dict["added"]) == 24  # type: ignore[attr-defined]
    for model in (OLD, bridge.embed_model):
        index._embed_model = model
        assert "added" in {n.node_id for n in index.as_retriever(similarity_top_k=3).retrieve("w2 w4 w6")}
    texts = ["w1 w2", "w3"]
    assert bridge.embed_model.get_text_embedding_batch(texts) == [
        pytest.approx(bridge.embed_model.get_text_embedding(text), abs=1e-6) for text in texts
    ]
    assert evaluate_retrieval(bridge.embed_model, DATA).passages == 300


def test_it_opens_the_index_that_it_was_made_for_and_no_other(bridge: Alignment, index: VectorStoreIndex) -> None:
    verify_index(index, bridge.embed_model, without_stamp="raise")
    for model in (NEW, PaidEmbedding(model_name="third", dimensions=24, turn=0)):
        other = built(model)
        stamp_index(other, model)
        with pytest.raises(WrongIndexError):
            verify_index(other, bridge.embed_model)
    with pytest.raises(WrongIndexError):
        verify_index(index, NEW)


def test_the_directory_is_read_again_with_the_new_model_and_with_no_other(bridge: Alignment) -> None:
    again = AdapterEmbeddingModel(NEW, bridge.path)
    assert again.is_bridge
    for model in (again, pickle.loads(pickle.dumps(again))):
        assert model.get_query_embedding("w1 w2") == bridge.embed_model.get_query_embedding("w1 w2")
    manifest = Manifest.read(Path(bridge.path))
    assert manifest is not None
    assert manifest.fingerprint == again.fingerprint
    assert manifest.embedding_adapter["index"]["model_name"] == "old"
    assert manifest.verdict == str(bridge)
    with pytest.raises(BaseModelMismatchError):
        AdapterEmbeddingModel(OLD, bridge.path)
    with pytest.raises(ConfigError, match="transform_query=False for the bridge"):
        AdapterEmbeddingModel(NEW, bridge.path, transform_query=False)


@pytest.mark.parametrize("kind", ["orthogonal", "affine", "mlp"])
def test_each_kind_maps_to_the_dimensions_of_the_index(kind: Any, index: VectorStoreIndex, tmp_path: Path) -> None:
    made = quiet(index, NEW, tmp_path / "b", kind=kind, dataset=DATA)
    assert (made.kind, list(made.tried), made.before) == (kind, [kind], None)
    vector = AdapterEmbeddingModel(NEW, tmp_path / "b").get_query_embedding("w1 w2")
    assert len(vector) == 24
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_a_model_that_is_still_near_to_the_old_one_needs_no_map(index: VectorStoreIndex, tmp_path: Path) -> None:
    made = quiet(index, OLD, tmp_path / "b", dataset=DATA)
    assert (made.kind, list(made.tried)) == ("identity", ["identity", "orthogonal", "affine", "mlp"])
    assert made.kept == made.tried["identity"] == 1
    with pytest.raises(ConfigError, match="from 28 dimensions to 24"):
        align_index(index, NEW, tmp_path / "c", dataset=DATA, kind="identity")
    assert not (tmp_path / "c").exists()


def test_without_queries_sentences_of_held_out_passages_stand_for_them(tmp_path: Path) -> None:
    corpus = {i: f"{' '.join(text.split()[:5])}. {' '.join(text.split()[5:])}." for i, text in DATA.corpus.items()}
    data = EmbeddingQAFinetuneDataset(queries={}, corpus=corpus, relevant_docs={})
    made = quiet(built(OLD, data), NEW, tmp_path / "a", kind="orthogonal")
    assert made.basis == "titles and sentences of held-out passages in the place of queries"
    assert made.queries >= 75
    short = EmbeddingQAFinetuneDataset(queries={}, corpus={f"p{i}": f"w{i}" for i in range(60)}, relevant_docs={})
    assert quiet(built(OLD, short), NEW, tmp_path / "b", kind="orthogonal").basis == (
        "held-out passages in the place of queries"
    )


def test_a_bridge_that_keeps_little_or_gains_nothing_warns(index: VectorStoreIndex, tmp_path: Path) -> None:
    new = Unrelated(model_name="unrelated", dimensions=24, turn=0)
    with pytest.warns(UserWarning, match="less than 95%") as caught:
        made = align_index(index, new, tmp_path / "a", dataset=DATA, old_model=OLD, kind="orthogonal")
    assert "The old model finds as much itself" in str(caught[0].message)
    assert made.neighbours < 0.3
    few = DATA.subset(list(DATA.queries)[:4])
    with pytest.warns(UserWarning, match="4 queries say little"):
        align_index(index, NEW, tmp_path / "b", dataset=few, kind="orthogonal")


def test_an_index_without_a_stamp_is_known_by_its_content(tmp_path: Path) -> None:
    index = built()
    made = quiet(index, NEW, tmp_path / "a", kind="orthogonal", dataset=DATA)
    with pytest.warns(UserWarning, match="model of its vectors is unknown"):
        assert verify_index(index, made.embed_model) is None
    stamp_index(index, made.embed_model)
    verify_index(index, made.embed_model, without_stamp="raise")
    other = built(OLD, make_dataset(passages=300, seed=9))
    second = quiet(other, NEW, tmp_path / "b", kind="orthogonal")
    with pytest.raises(WrongIndexError):
        verify_index(index, second.embed_model)


def test_a_store_without_texts_is_bridged_by_texts_that_both_models_embed(tmp_path: Path) -> None:
    alone = built().vector_store
    with pytest.raises(DatasetError, match="0 passages with text"):
        quiet(alone, NEW, tmp_path / "a")
    texts = list(make_dataset(passages=400, seed=2).corpus.values())
    made = quiet(alone, NEW, tmp_path / "a", texts=texts, old_model=OLD, dataset=DATA, kind="orthogonal", sample=400)
    assert made.searched == 400
    assert made.queries == 200, "two about each of a hundred passages of the index"
    assert made.kept > 0.9


def test_vectors_are_paid_for_once(index: VectorStoreIndex, tmp_path: Path) -> None:
    new = PaidEmbedding(model_name="new", dimensions=28, turn=0, ledger=str(tmp_path / "ledger"))
    for name in ("a", "b"):
        quiet(index, new, tmp_path / name, dataset=DATA, kind="orthogonal", cache_folder=tmp_path / "cache")
    lines = [line for line in (tmp_path / "ledger").read_text().splitlines() if line.startswith("passage: w")]
    assert sorted(lines) == sorted({f"passage: {text}" for text in DATA.corpus.values()})


def test_wrong_arguments_and_wrong_models_are_named_before_the_new_model_embeds_anything(
    index: VectorStoreIndex, tmp_path: Path
) -> None:
    new = PaidEmbedding(model_name="new", dimensions=28, turn=0)
    with pytest.raises(ConfigError) as caught:
        align_index(index, new, tmp_path / "a", kind="cubic", sample=0, k=-1, texts=["w1"])  # type: ignore[arg-type]
    assert [problem.split("=")[0] for problem in caught.value.problems[:3]] == ["kind", "sample", "k"]
    assert "texts without old_model" in caught.value.problems[3]
    with pytest.raises(WrongIndexError):
        align_index(index, new, tmp_path / "a", old_model=PaidEmbedding(model_name="third", dimensions=24, turn=0))
    with pytest.raises(DatasetError, match="not among the 300 of the store"):
        align_index(index, new, tmp_path / "a", dataset=make_dataset(passages=301))
    with pytest.raises(DatasetError, match="20 passages with text to learn a map from; expected at least 40"):
        align_index(built(OLD, make_dataset(passages=20)), new, tmp_path / "a")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(OutputDirectoryError):
        align_index(index, new, tmp_path / "taken")
    assert new.paid == []
