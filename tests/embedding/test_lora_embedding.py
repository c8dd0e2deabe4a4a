import asyncio
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from llama_index.core import Settings
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.embedding.backends import MergedBackend, PooledBackend
from tests.conftest import WORDS, make_dataset

TEXTS = [" ".join(WORDS[i : i + 1 + i % 14]) for i in range(40)]


@pytest.fixture(scope="module")
def embed_model(adapter):
    return LoraEmbedding(adapter, device="cpu")


def vectors(embed_model, texts=TEXTS):
    return np.array(embed_model.get_text_embedding_batch(texts))


def distance(one, other):
    return np.abs(np.asarray(one) - np.asarray(other)).max()


def test_merged_unmerged_and_sentence_transformers_give_the_same_vectors(adapter, embed_model):
    unmerged = LoraEmbedding(adapter, device="cpu", merge=False)
    assert distance(vectors(embed_model), vectors(unmerged)) < 1e-5
    assert distance(vectors(embed_model), SentenceTransformer(str(adapter), device="cpu").encode(TEXTS)) < 1e-5


def test_hugging_face_embedding_gives_the_same_vectors(adapter, embed_model):
    other = HuggingFaceEmbedding(model_name=str(adapter), device="cpu")
    assert distance(vectors(embed_model), vectors(other)) < 1e-5
    assert distance(embed_model.get_query_embedding("w1 w2 ?"), other.get_query_embedding("w1 w2 ?")) < 1e-5


def test_merging_leaves_no_lora_layers(embed_model):
    model = embed_model.backend.own_model()
    assert [name for name, _ in model.named_modules() if "lora" in name] == []
    assert all(p.dtype is torch.float32 for p in model.parameters())


def test_the_backend_depends_on_the_arguments(adapter, tiny_model, embed_model):
    assert isinstance(embed_model.backend, MergedBackend)
    assert isinstance(LoraEmbedding(base_model=tiny_model, device="cpu").backend, MergedBackend)
    assert isinstance(LoraEmbedding(adapters={"a": adapter}, device="cpu").backend, PooledBackend)


def test_the_adapter_changes_the_vectors(embed_model, tiny_model):
    assert distance(vectors(embed_model), vectors(LoraEmbedding(base_model=tiny_model, device="cpu"))) > 1e-3


def test_single_texts_and_batches_give_the_same_vectors(embed_model):
    assert distance(vectors(embed_model), [embed_model.get_text_embedding(text) for text in TEXTS]) < 1e-5
    small = embed_model.model_copy(update={"embed_batch_size": 3})
    assert distance(vectors(embed_model), vectors(small)) < 1e-5


def test_async_and_sync_calls_give_the_same_vectors(embed_model):
    async def everything():
        return (
            await embed_model.aget_text_embedding_batch(TEXTS),
            await embed_model.aget_text_embedding(TEXTS[3]),
            await embed_model.aget_query_embedding("w1 ?"),
        )

    batch, text, query = asyncio.run(everything())
    assert distance(batch, vectors(embed_model)) < 1e-5
    assert distance(text, vectors(embed_model)[3]) < 1e-5
    assert distance(query, embed_model.get_query_embedding("w1 ?")) < 1e-5


def test_threads_do_not_disturb_each_other(embed_model):
    alone = vectors(embed_model)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(embed_model.get_text_embedding, TEXTS * 3))
    assert distance(together, np.tile(alone, (3, 1))) < 1e-5


def test_a_dict_carries_the_fingerprint_and_makes_the_same_model(embed_model):
    data = json.loads(json.dumps(embed_model.to_dict()))
    assert data["fingerprint"] == embed_model.manifest.fingerprint
    again = LoraEmbedding.from_dict(data)
    assert again.to_dict() == embed_model.to_dict()
    assert distance(vectors(again), vectors(embed_model)) == 0


def test_a_pickle_holds_no_weights_and_makes_the_same_model(embed_model):
    pickled = pickle.dumps(embed_model)
    assert len(pickled) < 5_000
    again = pickle.loads(pickled)
    assert again._backend is None, "loaded where it is used, not where it is passed on"
    assert again.to_dict() == embed_model.to_dict()
    assert distance(vectors(again), vectors(embed_model)) == 0


def test_a_deep_copy_embeds_the_same(embed_model):
    copy = embed_model.model_copy(deep=True)
    assert copy is not embed_model
    assert distance(vectors(copy), vectors(embed_model)) == 0


def test_llama_index_settings_accept_it(embed_model):
    before = Settings._embed_model
    try:
        Settings.embed_model = embed_model
        assert Settings.embed_model.get_query_embedding("w1") == embed_model.get_query_embedding("w1")
    finally:
        Settings._embed_model = before


def test_nodes_are_embedded_with_their_metadata(embed_model):
    node = TextNode(text="w1 w2", metadata={"title": "w9"})
    (embedded,) = embed_model([node])
    expected = embed_model.get_text_embedding(node.get_content(metadata_mode=MetadataMode.EMBED))
    assert distance(embedded.embedding, expected) < 1e-5


def test_the_ingestion_cache_sees_a_retrained_model_as_a_new_one(tiny_model, tmp_path):
    path = str(tmp_path / "adapter")
    cache = IngestionCache()
    node = TextNode(text="w1 w2 w3", id_="n")

    def train_and_ingest(seed):
        LoraFinetuneEngine(
            make_dataset(seed=seed), tiny_model, path, val_fraction=0, epochs=1, seed=seed, show_progress_bar=False
        ).finetune()
        embed_model = LoraEmbedding(path, device="cpu")
        pipeline = IngestionPipeline(transformations=[embed_model], cache=cache)
        (embedded,) = pipeline.run(nodes=[node.model_copy()])
        assert distance(embedded.embedding, embed_model.get_text_embedding("w1 w2 w3")) < 1e-6
        return embed_model.fingerprint

    with pytest.warns(UserWarning, match="NOT EVALUATED"):
        assert train_and_ingest(1) != train_and_ingest(2)


@pytest.mark.slow
def test_worker_processes_of_a_pipeline_embed_the_same(embed_model):
    nodes = [TextNode(text=text, id_=str(number)) for number, text in enumerate(TEXTS)]
    pipeline = IngestionPipeline(transformations=[embed_model], disable_cache=True)
    embedded = pipeline.run(nodes=nodes, num_workers=2)
    by_id = {node.node_id: node.embedding for node in embedded}
    assert distance([by_id[str(n)] for n in range(len(TEXTS))], vectors(embed_model)) < 1e-5


def test_an_object_saved_before_a_retraining_does_not_mix_two_models(adapter, tmp_path):
    path = shutil.copytree(adapter, tmp_path / "adapter")
    before = LoraEmbedding(path, device="cpu").to_dict()
    with pytest.raises(AdapterError, match="retrained since"):
        LoraEmbedding.from_dict({**before, "fingerprint": "0" * 64})
    stale = pickle.loads(pickle.dumps(LoraEmbedding(path, device="cpu")))
    stale.fingerprint = "0" * 64
    with pytest.raises(AdapterError, match="retrained since"):
        stale.get_text_embedding("w1")


def test_the_fingerprint_changes_with_the_vectors_and_not_with_the_path(adapter, embed_model, tiny_model, tmp_path):
    moved = LoraEmbedding(shutil.copytree(adapter, tmp_path / "elsewhere"), device="cpu")
    assert moved.fingerprint == embed_model.fingerprint
    others = [
        LoraEmbedding(adapter, device="cpu", query_prompt="query : "),
        LoraEmbedding(adapter, device="cpu", passage_prompt="passage : "),
        LoraEmbedding(base_model=tiny_model, device="cpu"),
    ]
    assert len({embed_model.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_prompts_reach_the_model(adapter, embed_model):
    prompted = LoraEmbedding(adapter, device="cpu", query_prompt="query : ", passage_prompt="passage : ")
    assert distance(prompted.get_query_embedding("w1"), embed_model.get_query_embedding("query : w1")) < 1e-5
    assert distance(prompted.get_text_embedding("w1"), embed_model.get_text_embedding("passage : w1")) < 1e-5


def test_another_working_directory_finds_the_adapter(adapter, monkeypatch, tmp_path):
    monkeypatch.chdir(adapter.parent)
    embed_model = LoraEmbedding(adapter.name, device="cpu")
    data = embed_model.to_dict()
    monkeypatch.chdir(tmp_path)
    assert LoraEmbedding.from_dict(data).fingerprint == embed_model.fingerprint


def test_long_texts_are_truncated_at_the_recorded_length(embed_model):
    assert embed_model.max_seq_length == 16
    long = " ".join(["w1 w2"] * 7)  # 14 words and two special tokens
    assert distance(embed_model.get_text_embedding(long), embed_model.get_text_embedding(long + " w5 w6")) < 1e-6


def test_an_embedding_model_without_adapter_and_base_model_is_refused():
    with pytest.raises(ConfigError, match="without a model"):
        LoraEmbedding()
    with pytest.raises(ConfigError, match="without a model"):
        LoraEmbedding("")


def test_the_embeddings_cache_distinguishes_models_and_prompts(adapter, tiny_model):
    """LlamaIndex's own keys are the texts alone, for queries and passages of all models."""
    store = SimpleKVStore()
    plain = LoraEmbedding(adapter, device="cpu")
    kinds = [
        {"adapter_path": adapter},
        {"base_model": tiny_model},
        {"adapter_path": adapter, "query_prompt": "query : ", "passage_prompt": "passage : "},
        {"adapter_path": adapter, "adapter_scale": 0.5},
    ]
    for _ in range(2):
        for kind in kinds:
            cached = LoraEmbedding(**kind, device="cpu", embeddings_cache=store)
            alone = LoraEmbedding(**kind, device="cpu")
            for text in ("w1 w2", "w3"):
                assert distance(cached.get_text_embedding(text), alone.get_text_embedding(text)) < 1e-6
                assert distance(cached.get_query_embedding(text), alone.get_query_embedding(text)) < 1e-6
                assert distance(asyncio.run(cached.aget_query_embedding(text)), alone.get_query_embedding(text)) < 1e-6
            assert distance(vectors(cached), vectors(alone)) < 1e-5
            assert distance(asyncio.run(cached.aget_text_embedding_batch(TEXTS)), vectors(alone)) < 1e-5
    assert len(store.get_all("embeddings")) == 4 * (len({*TEXTS, "w1 w2", "w3"}) + 2)
    later = LoraEmbedding(adapter, device="cpu")
    later.embeddings_cache = store
    assert distance(later.get_query_embedding("w3"), plain.get_query_embedding("w3")) < 1e-6


def test_cached_embeddings_are_not_computed_again(adapter, monkeypatch):
    cached = LoraEmbedding(adapter, device="cpu", embeddings_cache=SimpleKVStore())
    before = vectors(cached), cached.get_query_embedding("w1")
    monkeypatch.setattr(LoraEmbedding, "_encode", None)
    again = pickle.loads(pickle.dumps(cached))
    for one in (cached, again):
        assert distance(vectors(one), before[0]) == 0
        assert one.get_query_embedding("w1") == before[1]


def test_an_embeddings_cache_that_is_not_a_store_is_refused(adapter):
    with pytest.raises(TypeError, match="BaseKVStore"):
        LoraEmbedding(adapter, device="cpu", embeddings_cache={})
