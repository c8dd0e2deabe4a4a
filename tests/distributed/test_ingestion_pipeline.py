"""Inside Ray: LlamaIndex's `RayIngestionPipeline` builds the embedding model in an actor, and one is given it."""

import numpy as np
import pytest
import ray
from llama_index.core import Document
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode

from llama_index_lora_embed import LoraEmbedding
from tests.conftest import WORDS

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.usefixtures("cluster")]


def test_an_ingestion_pipeline_of_ray_gives_the_same_vectors(adapter):
    from llama_index.ingestion.ray import RayIngestionPipeline, RayTransformComponent

    batches = {"batch_size": 10, "concurrency": 1}
    pipeline = RayIngestionPipeline(
        transformations=[
            RayTransformComponent(SentenceSplitter, batches, {"chunk_size": 64, "chunk_overlap": 0}),
            RayTransformComponent(LoraEmbedding, batches, {"adapter_path": str(adapter), "device": "cpu"}),
        ]
    )
    nodes = pipeline.run(documents=[Document(text=" ".join(WORDS[i:])) for i in range(20)])
    assert len(nodes) >= 20
    texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    expected = LoraEmbedding(adapter, device="cpu").get_text_embedding_batch(texts)
    assert np.abs(np.array([node.embedding for node in nodes]) - expected).max() < 1e-5


def test_an_embedding_model_can_be_handed_to_an_actor(adapter):
    @ray.remote
    class Searcher:
        def __init__(self, embed_model):
            self.embed_model = embed_model

        def ask(self, query):
            return self.embed_model.fingerprint, self.embed_model.get_query_embedding(query)

    embed_model = LoraEmbedding(adapter, device="cpu")
    fingerprint, vector = ray.get(Searcher.remote(embed_model).ask.remote("w1 w2"))
    assert fingerprint == embed_model.fingerprint
    assert vector == pytest.approx(embed_model.get_query_embedding("w1 w2"), abs=1e-6)
