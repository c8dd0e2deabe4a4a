"""Read a folder, make queries, train, embed, and fill a Chroma collection, with the work on a Ray cluster.

    python examples/ray_pipeline.py my/folder                       # a cluster on this machine, which ends with it
    python examples/ray_pipeline.py my/folder --address auto --workers 8 --gpus 1

Each step leaves its result under --out, and a repeated call goes on where an earlier one stopped. On several machines,
--out has to be a folder that all of them mount.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_index.core import StorageContext, VectorStoreIndex

from llama_index_lora_embed import FinetuneConfig, FinetuneResult, LoraEmbedding, run_finetune
from llama_index_lora_embed.config import QueryGeneratorSettings
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data.readers.nodes import read_nodes
from llama_index_lora_embed.deployment import stamp_index
from llama_index_lora_embed.distributed import connect, embed_dataset, generate_queries

ray = require("ray")
chromadb = require("chromadb")
ChromaVectorStore = require("llama_index.vector_stores.chroma").ChromaVectorStore


def write_nodes(folder: Path, path: Path) -> Path:
    """The nodes of a folder of documents as JSON lines; a file that is there is kept, because ids would be new."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{node.to_json()}\n" for node in read_nodes(folder)), encoding="utf-8")
    return path


def config_of(queries: Path, base: str, adapter: Path, epochs: int) -> FinetuneConfig:
    """Train on the queries that the nodes carry."""
    return FinetuneConfig.from_arguments(
        nodes=str(queries),
        query_generators=(QueryGeneratorSettings(kind="metadata"),),
        model_id=base,
        model_output_path=str(adapter),
        epochs=epochs,
        resume_from_checkpoint=True,
    )


def main() -> None:
    """The five steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/ray"))
    parser.add_argument("--base", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--address", help="of a running cluster; a new one on this machine without it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--query", help="to search for in the end")
    args = parser.parse_args()
    out = args.out.absolute()

    connect(args.address)
    nodes = write_nodes(args.documents, out / "nodes.jsonl")
    print(generate_queries(nodes, out / "queries", num_workers=args.workers))

    adapter = out / "adapter"
    if not adapter.exists():
        train = ray.remote(num_cpus=1, num_gpus=args.gpus)(run_finetune)
        result: FinetuneResult = ray.get(train.remote(config_of(out / "queries", args.base, adapter, args.epochs)))
        print(result)

    embed_model = LoraEmbedding(adapter)
    collection = chromadb.PersistentClient(str(out / "chroma")).get_or_create_collection(
        "documents", configuration={"hnsw": {"space": "cosine"}}
    )
    store = ChromaVectorStore(chroma_collection=collection)
    report = embed_dataset(
        nodes, embed_model, out / "vectors", vector_store=store, num_workers=args.workers, gpus_per_worker=args.gpus
    )
    stamp_index(store, embed_model)
    print(f"{report}\n{collection.count()} vectors in {str(out / 'chroma')!r}")
    if args.query:
        context = StorageContext.from_defaults(vector_store=store)
        index = VectorStoreIndex.from_vector_store(store, embed_model=embed_model, storage_context=context)
        for found in index.as_retriever(similarity_top_k=3).retrieve(args.query):
            print(f"{found.score:.3f} {found.node.get_content()[:100]!r}")


if __name__ == "__main__":
    main()
