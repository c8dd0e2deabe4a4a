"""The real all-MiniLM-L6-v2, for a few steps."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import (
    EmbeddingAdapterFinetuneEngine,
    EmbeddingQAFinetuneDataset,
    LoraEmbedding,
    LoraFinetuneEngine,
)
from llama_index_lora_embed.evaluation import Verdict

ROOT = Path(__file__).parent.parent
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes():
    """Short pages of Python's language reference."""
    from pydoc_data.topics import topics

    return [TextNode(text=text, id_=name) for name, text in sorted(topics.items()) if 300 < len(text) < 1500]


@pytest.fixture(scope="module")
def run(minilm, nodes, tmp_path_factory):
    out = tmp_path_factory.mktemp("minilm") / "adapter"
    engine = LoraFinetuneEngine.from_nodes(
        nodes, minilm, str(out), batch_size=8, epochs=1, val_fraction=0.2, evaluation_steps=0, show_progress_bar=False
    )
    return engine, engine.finetune(), out


def test_the_demo_package_holds_the_genuine_model(minilm):
    assert hashlib.sha256((Path(minilm) / "model.safetensors").read_bytes()).hexdigest() == MINILM_SHA256


def test_the_adapter_directory_is_under_5_mb(run):
    assert sum(path.stat().st_size for path in run[2].rglob("*") if path.is_file()) < 5_000_000


def test_all_ways_to_load_it_give_the_same_vectors(run, nodes):
    texts = [node.text for node in nodes]
    merged = LoraEmbedding(run[2])
    reference = np.array(merged.get_text_embedding_batch(texts))
    others = {
        "unmerged": LoraEmbedding(run[2], merge=False).get_text_embedding_batch(texts),
        "SentenceTransformer": SentenceTransformer(str(run[2])).encode(texts),
        "HuggingFaceEmbedding": HuggingFaceEmbedding(model_name=str(run[2])).get_text_embedding_batch(texts),
        "one by one": [merged.get_text_embedding(text) for text in texts],
    }
    for name, vectors in others.items():
        assert np.abs(np.array(vectors) - reference).max() < 1e-5, name


def test_retrieval_is_not_worse_than_the_base(run):
    result = run[1]
    assert result.tuned_metrics["ndcg@10"] >= result.base_metrics["ndcg@10"]
    assert result.max_seq_length >= 256


def test_a_linear_map_of_queries_gains_on_questions_that_it_was_not_trained_on(minilm, tmp_path):
    from pydoc_data.topics import topics

    corpus = {name: text[:2000] for name, text in topics.items()}
    items = json.loads((ROOT / "examples" / "python_queries.json").read_text(encoding="utf-8"))
    random.Random(0).shuffle(items)
    asked = EmbeddingQAFinetuneDataset(
        queries={f"q{n}": item["query"] for n, item in enumerate(items)},
        corpus=corpus,
        relevant_docs={f"q{n}": [name for name in item["topics"] if name in corpus] for n, item in enumerate(items)},
        query_origins={f"q{n}": "human" for n in range(len(items))},
    )
    ids = list(asked.queries)
    base = LoraEmbedding(base_model=minilm, device="cpu")
    engine = EmbeddingAdapterFinetuneEngine(
        asked.subset(ids[:200], corpus),
        base,
        model_output_path=tmp_path / "adapter",
        val_dataset=asked.subset(ids[200:], corpus),
        negatives="answered",
        device="cpu",
        cache_folder=tmp_path / "cache",
    )
    result = engine.finetune()
    assert result.verdict is Verdict.BETTER
    assert result.comparison.difference > 0.03
    assert result.tuned_metrics["ndcg@10"] > 0.6


def test_the_demo_runs_on_a_folder_of_documents(nodes, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for node in nodes[:12]:
        (docs / f"{node.node_id}.md").write_text(f"# {node.node_id}\n\n{node.text}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--docs", str(docs), "--query", "leave a loop early"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 documents" in done.stdout
    assert "query: leave a loop early" in done.stdout
    assert (tmp_path / "runs" / "demo" / "adapter" / "finetune.json").exists()
