"""The flow of the old engine's notebook, and patterns of public scripts, with the import changed and nothing else."""

from __future__ import annotations

import hashlib
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, Settings, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, TextNode
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from llama_index_lora_embed import (
    EmbeddingQAFinetuneDataset,
    SentenceTransformersFinetuneEngine,
    generate_qa_embedding_pairs,
)
from tests.conftest import WORDS, make_dataset
from tests.helpers.llms import FakeLLM

pytestmark = pytest.mark.extended


class WordsLLM(FakeLLM):
    """Asks two questions of three words of the passage each."""

    def answer(self, prompt: str) -> str:
        words, seed = re.findall(r"\bw\d+\b", prompt), hashlib.sha256(prompt.encode()).hexdigest()
        rng = random.Random(seed)
        return "\n".join(f"{n}. What about {' '.join(rng.sample(words, 3))} ?" for n in (1, 2))


def nodes_of(seed: int, documents: int = 6) -> list[Any]:
    """Chunks of documents with a name each, as the notebook's splitter makes them."""
    rng = random.Random(seed)
    sentences = [[" ".join(rng.sample(WORDS, 10)) + "." for _ in range(6)] for _ in range(documents)]
    made = [
        Document(text=" ".join(found), metadata={"file_name": f"{seed}-{n}.pdf"}) for n, found in enumerate(sentences)
    ]
    return SentenceSplitter(chunk_size=60, chunk_overlap=0).get_nodes_from_documents(made)


def hit_rate(dataset: EmbeddingQAFinetuneDataset, embed_model: Any, top_k: int = 5) -> float:
    """The notebook's own evaluation: an index over the corpus, and whether the expected node is retrieved."""
    nodes = [TextNode(id_=i, text=text) for i, text in dataset.corpus.items()]
    retriever = VectorStoreIndex(nodes, embed_model=embed_model).as_retriever(similarity_top_k=top_k)
    hits = [
        dataset.relevant_docs[query_id][0] in [found.node.node_id for found in retriever.retrieve(query)]
        for query_id, query in dataset.queries.items()
    ]
    return sum(hits) / len(hits)


def quiet(dataset: Any, model: str, path: Path, **kwargs: Any) -> SentenceTransformersFinetuneEngine:
    return SentenceTransformersFinetuneEngine(
        dataset, model_id=model, model_output_path=str(path), device="cpu", show_progress_bar=False, **kwargs
    )


def test_the_notebook_from_documents_to_its_own_evaluations(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it writes and reads relative paths
    train_nodes, val_nodes = nodes_of(1), nodes_of(2, documents=3)
    generate_qa_embedding_pairs(llm=WordsLLM(), nodes=train_nodes, output_path="train_dataset.json", verbose=False)
    generate_qa_embedding_pairs(llm=WordsLLM(), nodes=val_nodes, output_path="val_dataset.json", verbose=False)
    train_dataset = EmbeddingQAFinetuneDataset.from_json("train_dataset.json")
    val_dataset = EmbeddingQAFinetuneDataset.from_json("val_dataset.json")
    assert set(train_dataset.corpus) == {node.node_id for node in train_nodes}
    engine = SentenceTransformersFinetuneEngine(
        train_dataset, model_id=tiny_model, model_output_path="test_model", val_dataset=val_dataset
    )
    engine.finetune()
    embed_model = engine.get_finetuned_model()
    assert 0 <= hit_rate(val_dataset, f"local:{tiny_model}") <= 1
    assert hit_rate(train_dataset, embed_model) >= 0.5

    evaluator = InformationRetrievalEvaluator(
        val_dataset.queries,
        val_dataset.corpus,
        {query_id: set(ids) for query_id, ids in val_dataset.relevant_docs.items()},
        name="finetuned",
    )
    Path("results").mkdir()
    assert evaluator(SentenceTransformer("test_model", device="cpu"), output_path="results")
    assert list(Path("results").glob("*finetuned*.csv"))


def test_a_script_that_passes_its_training_data_as_validation_data_runs(tiny_model: str, tmp_path: Path) -> None:
    data = make_dataset()
    with pytest.warns(UserWarning, match="held out"):
        engine = quiet(data, tiny_model, tmp_path / "model", val_dataset=data, epochs=1)
    result = engine.finetune()
    assert engine.val_dataset is not None
    assert not set(engine.val_dataset.queries.values()) & set(engine.dataset.queries.values())
    assert result.comparison is not None


def test_a_validation_file_that_contains_the_training_questions_loses_them(tiny_model: str, tmp_path: Path) -> None:
    train, own = make_dataset(), make_dataset(passages=10, seed=7, prefix="v")
    both = EmbeddingQAFinetuneDataset(
        queries={**train.queries, **own.queries},
        corpus={**train.corpus, **own.corpus},
        relevant_docs={**train.relevant_docs, **own.relevant_docs},
    )
    both.save_json(str(tmp_path / "val.json"))
    val = EmbeddingQAFinetuneDataset.from_json(str(tmp_path / "val.json"))
    with pytest.warns(UserWarning, match=str(len(train.queries))):
        engine = quiet(train, tiny_model, tmp_path / "model", val_dataset=val, epochs=1)
    engine.finetune()
    assert engine.val_dataset is not None
    assert set(engine.val_dataset.queries.values()) == set(own.queries.values())


def test_a_corpus_that_is_split_by_query_runs_and_the_verdict_says_what_is_shared(
    tiny_model: str, tmp_path: Path
) -> None:
    data = make_dataset()
    ids = list(data.queries)
    train, val = (
        EmbeddingQAFinetuneDataset(
            queries={i: data.queries[i] for i in part},
            corpus=data.corpus,
            relevant_docs={i: data.relevant_docs[i] for i in part},
        )
        for part in (ids[::2], ids[1::2])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the verdict
        result = quiet(train, tiny_model, tmp_path / "model", val_dataset=val, epochs=1).finetune()
    assert "were trained on" in result.summary


def test_a_loss_of_the_script_s_own_is_built_on_the_engine_s_model(tiny_model: str, tmp_path: Path) -> None:
    data = make_dataset()
    engine = quiet(data, tiny_model, tmp_path / "model", epochs=4, learning_rate=5e-3, batch_size=8)
    engine.loss = losses.MultipleNegativesRankingLoss(engine.model)
    result = engine.finetune()
    assert result.steps > 0


def test_an_index_that_was_persisted_is_loaded_again_with_the_model_in_the_settings(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset()
    engine = quiet(data, tiny_model, tmp_path / "model", epochs=4, learning_rate=5e-3, batch_size=8, val_fraction=0)
    engine.finetune()
    monkeypatch.setattr(Settings, "_embed_model", engine.get_finetuned_model())
    nodes = [TextNode(id_=i, text=text) for i, text in data.corpus.items()]
    VectorStoreIndex(nodes).storage_context.persist(str(tmp_path / "storage"))
    storage = StorageContext.from_defaults(persist_dir=str(tmp_path / "storage"))
    retriever = load_index_from_storage(storage).as_retriever(similarity_top_k=3)
    query_id, query = next(iter(data.queries.items()))
    found = [one.node for one in retriever.retrieve(query)]
    assert data.relevant_docs[query_id][0] in [node.node_id for node in found]
    assert all(node.get_content(MetadataMode.NONE) in data.corpus.values() for node in found)
