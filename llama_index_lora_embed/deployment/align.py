"""A bridge from a new embedding model to the index of an old one, and what it keeps of the new model's recall."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from llama_index.core.schema import TextNode

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, warn_user
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.readers.vector_stores import read_vectors
from llama_index_lora_embed.data.stored_vectors import FloatArray, StoredVectors
from llama_index_lora_embed.deployment.alignment_sample import FEWEST, AlignmentSample, draw_sample, passages_with_text
from llama_index_lora_embed.deployment.index_model import verify_vectors
from llama_index_lora_embed.deployment.index_stamp import IndexStamp, read_index_stamp
from llama_index_lora_embed.embedding.adapter_embedding import PROBE, AdapterEmbeddingModel, adapter_manifest
from llama_index_lora_embed.embedding.identity import fingerprint_with
from llama_index_lora_embed.evaluation.alignment import neighbours_kept, recalls
from llama_index_lora_embed.evaluation.embeddings import Embedder, Side, unit_vectors
from llama_index_lora_embed.evaluation.significance import MIN_QUERIES, paired_intervals

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

    from llama_index_lora_embed.models.embedding_adapter import BaseAdapter

AlignmentKind = Literal["auto", "identity", "orthogonal", "affine", "mlp"]

LOW = 0.95
"""Share of the recall below which a bridge warns. Drift-Adapter (EMNLP 2025, arXiv 2509.23471) reports that its maps
keep 0.95 to 0.99."""

_Embed = Callable[[Sequence[str], Side], FloatArray]


@dataclass(frozen=True)
class Alignment:
    """A bridge, and what it keeps; print it.

    Attributes:
        path: The written directory.
        embed_model: The new model with the map, as `AdapterEmbeddingModel(new_model, path)` reads it.
        kind: The map: "identity" (none), "orthogonal", "affine" or "mlp".
        tried: For each kind the share of neighbours kept, on passages that were held out for the choice.
        pairs: Passages that were learnt from.
        queries: Queries that recall was measured on.
        basis: What they are, in words.
        searched: Passages that were searched.
        k: Depth of the search.
        reembedded: Recall@k of the new model on its own vectors of these passages, from 0 to 1.
        bridged: Recall@k of the new model's mapped queries on the stored vectors.
        before: Recall@k of the old model; None where it was not given.
        interval: 95 % confidence interval of `bridged` - `reembedded`.
        neighbours: Of the k passages nearest to a held-out one by the new model, the share that the bridge finds. Two
            models disagree about neighbours more than about what answers a query, so that it is lower than `kept`.
    """

    path: str
    embed_model: AdapterEmbeddingModel = field(repr=False)
    kind: str
    tried: dict[str, float]
    pairs: int
    queries: int
    basis: str
    searched: int
    k: int
    reembedded: float
    bridged: float
    before: float | None
    interval: tuple[float, float]
    neighbours: float

    @property
    def kept(self) -> float:
        """Of the recall of re-embedding, the share that the bridge keeps; above 1 where it finds more."""
        return self.bridged / self.reembedded if self.reembedded else 0.0

    @property
    def problems(self) -> list[str]:
        """Why not to switch to the bridge, a sentence each."""
        found = []
        if self.kept < LOW:
            found.append(
                f"The bridge keeps {self.kept:.1%} of the recall of re-embedding, less than {LOW:.0%}: learn from more "
                "passages (sample=), or re-embed (reindex)."
            )
        if self.before is not None and self.bridged <= self.before:
            found.append("The old model finds as much itself: the bridge gains nothing.")
        if self.queries < MIN_QUERIES:
            found.append(f"{self.queries} queries say little: at least {MIN_QUERIES} are needed.")
        return found

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"{self.kept:.1%} of the recall@{self.k} of re-embedding is kept: {self.bridged:.3f} bridged, "
            f"{self.reembedded:.3f} re-embedded (difference {self.bridged - self.reembedded:+.3f}, 95 % interval "
            f"{low:+.3f} to {high:+.3f}), on {self.queries} {self.basis} among {self.searched} passages.",
            f"Of the {self.k} nearest passages by re-embedding, the bridge finds {self.neighbours:.1%}.",
            f"{self.kind} map from {self.pairs} passages in {self.path}",
        ]
        if self.before is not None:
            lines.insert(1, f"The old model itself has recall@{self.k} {self.before:.3f}.")
        return "\n".join([*self.problems, *lines])


def align_index(
    target: Any,
    new_model: BaseEmbedding,
    path: str | os.PathLike[str],
    *,
    old_model: BaseEmbedding | None = None,
    dataset: EmbeddingQAFinetuneDataset | Any | None = None,
    texts: Sequence[str] | None = None,
    kind: AlignmentKind = "auto",
    sample: int = 4000,
    k: int = 10,
    seed: int = 0,
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> Alignment:
    """Learn a map from a new model's vectors to those of an old index, so that the new model searches it as it is.

    For a model that is switched or retrained over more vectors than can be embedded again at once: the bridge serves
    until `reindex` has. A few thousand passages of the index are embedded with the new model, and their stored vectors
    are what the map should give (Drift-Adapter, EMNLP 2025, arXiv 2509.23471). The result says what is kept of the
    recall before anything is switched; the index is only read.

    Recall is measured on passages that were not learnt from: with queries of a dataset, or else with titles and first
    sentences of the passages, which flatter a bridge between unlike models. A search among the sample is easier than
    one of the whole index.

    Warns (UserWarning) of all that `Alignment.problems` names.

    Args:
        target: The old index: anything that `read_vectors` takes.
        new_model: Any LlamaIndex embedding model.
        path: Directory to write.
        old_model: The model that built the index. It is checked, its own recall is reported, and the bridge gets its
            stamp where the index has none. None leaves that out.
        dataset: Queries about nodes of the index, to measure recall with, best human-written. As many are taken as
            have their relevant passages in a quarter of the sample.
        texts: Passages to learn from in the place of the index's, embedded with both models; needs `old_model`. For a
            store that keeps no texts.
        kind: One of `training.alignment.learn_map`; "auto" takes the one that keeps most neighbours on passages that
            are held out for that.
        sample: Passages that are embedded with the new model.
        k: Depth of the searches.
        seed: Random seed of the sample.
        num_workers: For a model behind an API, see `evaluate_retrieval`.
        cache_folder: Folder in which vectors are kept, see `evaluate_retrieval`.
        show_progress: Show progress bars.

    Returns:
        The bridge with its figures. It opens the old index (`verify_index`) and no other. New nodes may be added to the
        index with it: their vectors are mapped, too.

    Raises:
        ConfigError: Arguments are wrong, "identity" is between different dimensions, or the store cannot list its
            vectors.
        DatasetError: There are too few passages with text; or the store is empty, has unusable vectors, or lacks
            passages of the dataset.
        WrongIndexError: `old_model` did not build the index.
        NonFiniteLossError: A model gives NaN or infinity; the passages are named.
        OutputDirectoryError: The directory cannot be written.

    Example:
        >>> bridge = align_index(index, new_model, "runs/bridge", dataset=val)  # doctest: +SKIP
        >>> VectorStoreIndex.from_vector_store(store, embed_model=bridge.embed_model)  # doctest: +SKIP
    """
    from llama_index_lora_embed.models.adapter_directory import check_output
    from llama_index_lora_embed.training.alignment import KINDS, learn_map

    _check_arguments(kind, sample, k, texts, old_model)
    target_path = str(check_output(path))

    def embedding(model: BaseEmbedding) -> _Embed:
        embedder = Embedder(model, num_workers, cache_folder, show_progress)

        def embed(given: Sequence[str], side: Side) -> FloatArray:
            found = run_async(embedder.embed(given, side), suspends=num_workers is not None)
            return unit_vectors(found, [text[:80] for text in given], side)

        return embed

    embed_new, embed_old = embedding(new_model), None if old_model is None else embedding(old_model)
    stored = read_vectors(target)
    if old_model is not None:
        verify_vectors(target, stored, old_model)
    if dataset is not None:
        dataset = stored.corpus_for(EmbeddingQAFinetuneDataset.coerce(dataset).check("dataset"))
    learnt = None
    if texts is not None and embed_old is not None:
        nodes = [TextNode(id_=f"text {number}", text=text) for number, text in enumerate(dict.fromkeys(texts))]
        learnt = StoredVectors(nodes, embed_old([node.text for node in nodes], "passage"))
    drawn = draw_sample(passages_with_text(stored, dataset, learnt), dataset, sample, seed)

    new = embed_new(drawn.texts, "passage")
    comparable = new.shape[1] == stored.dimensions
    if kind == "identity" and not comparable:
        raise ConfigError(
            f"kind='identity' from {new.shape[1]} dimensions to {stored.dimensions}",
            "another map, because vectors of different lengths cannot be compared",
            "Leave kind out.",
        )
    maps = {
        name: learn_map(name, new[drawn.learn], drawn.old[drawn.learn], seed=seed)
        for name in KINDS
        if kind in ("auto", name) and (comparable or name != "identity")
    }
    tried: dict[str, float] = {
        name: _neighbours(adapter, new, drawn, drawn.choose, k) for name, adapter in maps.items()
    }
    best = max(maps, key=lambda name: tried[name])  # of equal ones the simplest
    queries = embed_new(drawn.queries, "query")
    reembedded = recalls(queries, new, drawn.relevant, k)
    bridged = recalls(_mapped(maps[best], queries), drawn.old, drawn.relevant, k)
    before = None
    if embed_old is not None:
        before = float(recalls(embed_old(drawn.queries, "query"), drawn.old, drawn.relevant, k).mean())

    bridge = Alignment(
        path=target_path,
        embed_model=None,  # type: ignore[arg-type]  # read from the directory that this is written to
        kind=best,
        tried=tried,
        pairs=len(drawn.learn),
        queries=len(drawn.queries),
        basis=drawn.basis,
        searched=len(drawn.texts),
        k=k,
        reembedded=float(reembedded.mean()),
        bridged=float(bridged.mean()),
        before=before,
        interval=paired_intervals((bridged - reembedded)[:, None], seed=seed)[0],
        neighbours=_neighbours(maps[best], new, drawn, drawn.judge, k),
    )
    _write(bridge, maps[best], new_model, embed_new([PROBE], "query")[0], _stamp(target, stored, old_model))
    if bridge.problems:
        warn_user(str(bridge))
    return replace(bridge, embed_model=AdapterEmbeddingModel(new_model, target_path))


def _check_arguments(kind: Any, sample: Any, k: Any, texts: Any, old_model: Any) -> None:
    problems, least = [], {"sample": FEWEST, "k": 1}
    if kind not in get_args(AlignmentKind):
        problems.append(f"kind={kind!r}: expected one of {', '.join(get_args(AlignmentKind))}")
    problems += [
        f"{name}={value!r}: expected a whole number of at least {least[name]}"
        for name, value in (("sample", sample), ("k", k))
        if not is_int(value, least[name])
    ]
    if texts is not None and old_model is None:
        problems.append("texts without old_model: expected both, because both models embed them")
    if problems:
        raise ConfigError(f"{len(problems)} wrong argument(s)", "those named", "Correct them:", problems)


def _mapped(adapter: BaseAdapter, vectors: FloatArray) -> FloatArray:
    """Vectors of length 1, mapped and scaled to length 1."""
    import torch

    with torch.inference_mode():
        mapped: FloatArray = adapter(torch.from_numpy(vectors)).numpy()
    return unit_norm(mapped)


def _neighbours(adapter: BaseAdapter, new: FloatArray, drawn: AlignmentSample, rows: range, k: int) -> float:
    own = new[rows]
    return neighbours_kept(own, _mapped(adapter, own), new, drawn.old, rows, k)


def _stamp(target: Any, stored: StoredVectors, old_model: BaseEmbedding | None) -> dict[str, Any]:
    """What identifies the index: its stamp, else that of the old model, else a digest of its content."""
    stamp = None
    if not isinstance(target, StoredVectors):
        with suppress(ConfigError):  # the store cannot hold one
            stamp = read_index_stamp(target)
    if stamp is None and old_model is not None:
        stamp = IndexStamp.of(old_model)
    if stamp is None:
        return {"fingerprint": stored.digest(), "dimensions": stored.dimensions}
    return asdict(stamp)


def _write(
    bridge: Alignment, adapter: BaseAdapter, new_model: BaseEmbedding, probe: FloatArray, index: dict[str, Any]
) -> None:
    from llama_index_lora_embed.models.embedding_adapter import adapter_digest, save_adapter

    recall = f"recall@{bridge.k}"
    manifest = adapter_manifest(
        new_model,
        len(probe),
        index=index,
        settings={"kind": bridge.kind, "tried": bridge.tried, "pairs": bridge.pairs},
        metrics={"re-embedded": {recall: bridge.reembedded}, "bridge": {recall: bridge.bridged}},
        verdict=str(bridge),
    )
    manifest = replace(manifest, fingerprint=fingerprint_with(new_model, adapter_digest(adapter)))
    save_adapter(adapter, bridge.path, manifest, probe=probe)
