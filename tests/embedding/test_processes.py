"""Embedding in worker processes, which a parent process that has embedded with several threads forks."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from llama_index.core import MockEmbedding

from tests.conftest import make_tiny_model
from tests.helpers.adapters import random_adapter

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")]

PROGRAM = """
import asyncio, json, multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index_lora_embed import LoraEmbedding

torch.set_num_threads(2)
path, kind = sys.argv[1:]
texts = [f"w{n} w{n + 1} w{n + 2}" for n in range(4)]
embed_model = LoraEmbedding(path, device="cpu")
expected = [embed_model.get_text_embedding(text) for text in texts]

def load(text):
    return LoraEmbedding(path, device="cpu").get_text_embedding(text)

def embed(text):
    return embed_model.get_text_embedding(text)

def embed_with(model, text):
    return model.get_text_embedding(text)

if kind == "pipeline":
    pipeline = IngestionPipeline(transformations=[embed_model], disable_cache=True)
    nodes = asyncio.run(pipeline.arun(nodes=[TextNode(text=text) for text in texts], num_workers=2))
    vectors = [node.embedding for node in nodes]
else:
    with get_context("fork").Pool(2) as pool:
        if kind == "pickled":
            vectors = pool.starmap(embed_with, [(embed_model, text) for text in texts])
        else:
            vectors = pool.map({"loaded": load, "inherited": embed}[kind], texts)
print(max(abs(a - b) for one, other in zip(vectors, expected, strict=True) for a, b in zip(one, other, strict=True)))
"""


@pytest.fixture(scope="module")
def wide_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a model that is large enough for torch to divide its operations among threads."""
    path = tmp_path_factory.mktemp("wide")
    base = make_tiny_model(path, width=384, positions=512)
    return random_adapter(str(base), path / "adapter", 1)


@pytest.mark.parametrize(
    "kind",
    ["loaded", "pipeline", *(pytest.param(k, marks=pytest.mark.extended) for k in ("inherited", "pickled"))],
)
def test_forked_workers_embed_like_the_parent_process_that_has_embedded(kind, wide_adapter, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(wide_adapter), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_llama_index_wraps_methods_so_that_no_embedding_models_can_be_pickled():
    with pytest.raises(NotImplementedError, match="__reduce"):
        pickle.dumps(MockEmbedding(embed_dim=2).get_text_embedding)
