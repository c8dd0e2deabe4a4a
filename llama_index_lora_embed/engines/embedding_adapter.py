"""`EmbeddingAdapterFinetuneEngine`: a map of any embedding model's query vectors, trained over frozen vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding

from llama_index_lora_embed.config import EmbeddingAdapterSettings
from llama_index_lora_embed.core.errors import (
    ConfigError,
    DatasetError,
    LoraEmbedError,
    MissingExtraError,
    SplitError,
    attempt,
    raise_together,
    warn_user,
)
from llama_index_lora_embed.core.files import absolute, model_place
from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.headings import validate_on_headings
from llama_index_lora_embed.data.training_data import from_huggingface, hold_out, refuse_overlap, without_trained
from llama_index_lora_embed.embedding import AdapterEmbeddingModel, LoraEmbedding
from llama_index_lora_embed.engines.embedding_adapter_result import EmbeddingAdapterResult
from llama_index_lora_embed.engines.lora import register_legacy_base_class
from llama_index_lora_embed.engines.validation import check_run_directory, check_written
from llama_index_lora_embed.models import base_model
from llama_index_lora_embed.models.adapter_directory import CONFIG_NAME, check_output, is_old_embedding_adapter

if TYPE_CHECKING:
    import torch

    from llama_index_lora_embed.data.stored_vectors import StoredVectors

_S = EmbeddingAdapterSettings()
_TRAIN_KWARGS = ("optimizer_class", "optimizer_params", "max_grad_norm", "show_progress_bar")


class EmbeddingAdapterFinetuneEngine:
    """Trains a small map on top of the query vectors of any LlamaIndex embedding model, models behind an API included.

    It takes the arguments of llama-index-finetuning's engine of this name in the same order. Passages keep their
    vectors, so that an index of `embed_model` stays as it is. Each text is embedded once and kept on disk
    (`cache_folder`), also when an API fails half-way or the process is killed. A query is compared with all passages
    at once. Three defaults differ from the old engine's: `epochs` (was 1), the learning rate (was 2e-5) and the
    temperature (was 0.05). Without a `val_dataset` a tenth of the queries is held out.

    Start with it where an index must keep its vectors: it takes seconds. For an open model, `LoraFinetuneEngine` with
    `tune="query"` gained a little more with up to 1,000 labels, and tuning both sides most (docs/query-side.md, "Which
    to take").

    Vectors are compared by cosine: the adapter sees vectors of length 1, and its result gets the length of the
    embedding model's vector. Constructing an engine loads no model and embeds nothing.

    Args:
        dataset: Training queries and passages: this package's class, llama-index-finetuning's, a mapping of the same
            fields, a path to the JSON file, or a Hugging Face dataset (`data.training_data.from_huggingface`).
        embed_model: A LlamaIndex embedding model; or a string as `resolve_embed_model` takes it ("local:..."), or the
            folder or Hub id of a base or of a LoRA adapter, which `LoraEmbedding` loads.
        adapter_model: `LinearLayer`, `LowRankLayer`, `TwoLayerNN` or a `BaseAdapter` of your own; None for a
            `LinearLayer`.
        dim: Dimensions of the vectors, which are checked; None takes what the model returns.
        val_dataset: Validation data, best with human-written queries. None holds out `val_fraction`.
        **train_kwargs: `optimizer_class` and `optimizer_params` (torch's), `max_grad_norm`, `show_progress_bar`.

    All other arguments are fields of `config.EmbeddingAdapterSettings`.

    Attributes:
        dataset: Training data, without what is held out.
        val_dataset: Validation data, given or held out; None for a run that is not evaluated.
        settings: The other arguments.
        stored: The passages of the index that `from_vector_store` was given; None for other engines.

    Raises:
        ConfigError: Arguments are wrong, all of them named at once; problems of several kinds come together in it.
        DatasetError: A dataset is empty or inconsistent, or of labelled pairs.
        ModelNotFoundError: embed_model is a folder that does not exist.
        OutputDirectoryError: The output path cannot be written or holds something else.
    """

    def __init__(
        self,
        dataset: EmbeddingQAFinetuneDataset | Any,
        embed_model: BaseEmbedding | str | os.PathLike[str],
        batch_size: int = _S.batch_size,
        epochs: int = _S.epochs,
        adapter_model: Any | None = None,
        dim: int | None = None,
        device: Any | None = None,
        model_output_path: str | os.PathLike[str] = _S.model_output_path,
        model_checkpoint_path: str | os.PathLike[str] | None = None,
        checkpoint_save_steps: int = _S.checkpoint_save_steps,
        verbose: bool = False,
        bias: bool = False,
        *,
        val_dataset: EmbeddingQAFinetuneDataset | Any | None = None,
        val_fraction: float = _S.val_fraction,
        max_eval_passages: int = _S.max_eval_passages,
        on_overlap: Literal["drop", "raise"] = _S.on_overlap,
        learning_rate: float = _S.learning_rate,
        warmup_ratio: float = _S.warmup_ratio,
        temperature: float = _S.temperature,
        identity_weight: float = _S.identity_weight,
        negatives: Literal["auto", "corpus", "answered"] = _S.negatives,
        seed: int = _S.seed,
        save_checkpoints: bool = False,
        resume_from_checkpoint: bool = False,
        num_workers: int | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        **train_kwargs: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in EmbeddingAdapterSettings.model_fields}
        errors: list[LoraEmbedError] = []

        problems = _train_kwargs_problems(train_kwargs) + _model_problems(embed_model, adapter_model, dim)
        if "max_grad_norm" in train_kwargs:
            given["max_grad_norm"] = train_kwargs["max_grad_norm"]
        try:
            self.settings = EmbeddingAdapterSettings.validated(given)
        except ConfigError as error:
            problems = error.problems + problems
        if problems:
            errors.append(ConfigError(f"{len(problems)} wrong argument(s)", "those named", "Correct them:", problems))
        else:
            attempt(lambda: check_run_directory(self._target()), errors)
        if isinstance(embed_model, (str, os.PathLike)):
            attempt(lambda: base_model.check_local(model_place(embed_model)), errors)
        train = attempt(lambda: _queries(dataset, "dataset"), errors)
        val = None if val_dataset is None else attempt(lambda: _queries(val_dataset, "val_dataset"), errors)
        raise_together(errors)
        assert train is not None
        register_legacy_base_class(type(self))
        self._embed_model = embed_model
        self._train_kwargs = train_kwargs
        self.adapter_model = adapter_model
        self.dim = dim
        self.corpus_dataset = train
        self.dataset, self.val_dataset, self.hold_out_note = self._split(train, val)
        self.stored: StoredVectors | None = None

    def _target(self) -> Path:
        return check_output(self.settings.model_output_path, is_old_embedding_adapter)

    def _split(
        self, train: EmbeddingQAFinetuneDataset, val: EmbeddingQAFinetuneDataset | None
    ) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset | None, str]:
        """Training data, validation data, and how it was held out in words."""
        settings, note = self.settings, ""
        checked: Any = val
        if val is not None and settings.on_overlap == "raise":
            refuse_overlap(train, val)
        elif val is not None:
            checked, note = without_trained(train, val)
            if note:
                warn_user(note)
        if checked is not None or not settings.val_fraction:
            return train, checked, note
        try:
            rest: Any
            rest, checked, how = hold_out(
                train, settings.val_fraction, seed=settings.seed, max_passages=settings.max_eval_passages
            )
        except SplitError as error:
            warn_user(f"Nothing is held out for evaluation: {error}")
            return train, None, note
        return rest, validate_on_headings(checked, rest.origins(), seed=settings.seed), f"{note} {how}".strip()

    @classmethod
    def from_model_path(
        cls,
        dataset: EmbeddingQAFinetuneDataset | Any,
        embed_model: BaseEmbedding | str | os.PathLike[str],
        model_path: str | os.PathLike[str],
        model_cls: type[Any] | None = None,
        **kwargs: Any,
    ) -> EmbeddingAdapterFinetuneEngine:
        """An engine whose training starts from an adapter, also from one of llama-index-embeddings-adapter.

        The base that is compared with is `embed_model` without any adapter.

        Args:
            dataset: As for the engine.
            embed_model: As for the engine.
            model_path: Directory of the adapter.
            model_cls: Its class; None for the one that is recorded.
            **kwargs: As for the engine.

        Raises:
            ModelNotFoundError: There is no such directory.
            AdapterError: It is damaged, or of another class.
            ConfigError: As the engine.
        """
        from llama_index_lora_embed.models.stored_adapter import read_adapter

        return cls(dataset, embed_model, adapter_model=read_adapter(model_path, model_cls).adapter, **kwargs)

    @classmethod
    def from_vector_store(
        cls,
        store: Any,
        dataset: EmbeddingQAFinetuneDataset | Any,
        embed_model: BaseEmbedding | str | os.PathLike[str],
        *,
        val_dataset: EmbeddingQAFinetuneDataset | Any | None = None,
        **kwargs: Any,
    ) -> EmbeddingAdapterFinetuneEngine:
        """An engine on the passages of an existing index, whose vectors it reads and leaves alone.

        No passage is embedded again but for the check that the model built the index: its stamp says so
        (`stamp_index`), else up to 32 of its texts are embedded. All passages of the index are searched in evaluations,
        and are what queries are compared with (see `negatives`).

        Args:
            store: As for `LoraFinetuneEngine.from_vector_store`: an index, a vector store, a Chroma collection, ...
            dataset: As for the engine; its passages are nodes of the index.
            embed_model: The model that built the index.
            val_dataset: As for the engine; its passages are nodes of the index, too.
            **kwargs: As for the engine.

        Raises:
            ConfigError: The store cannot list its vectors, or arguments are wrong.
            DatasetError: The store is empty, holds vectors that are zero or not finite, or lacks passages of a dataset;
                all of them are named.
            WrongIndexError: The index was built by another model.
            LoraEmbedError: As the engine.

        Example:
            >>> EmbeddingAdapterFinetuneEngine.from_vector_store(collection, dataset, embed_model)  # doctest: +SKIP
        """
        from llama_index_lora_embed.data.readers.vector_stores import read_vectors
        from llama_index_lora_embed.deployment.index_model import verify_vectors

        stored = read_vectors(store)
        train = stored.corpus_for(_queries(dataset, "dataset"), "dataset")
        val = None if val_dataset is None else stored.corpus_for(_queries(val_dataset, "val_dataset"), "val_dataset")
        engine = cls(train, embed_model, **{"max_eval_passages": len(stored), **kwargs, "val_dataset": val})
        verify_vectors(store, stored, engine.embed_model)
        engine.stored = stored
        # the passages that a split takes out of one side are in the index all the same
        engine.dataset = stored.corpus_for(engine.dataset)
        engine.val_dataset = engine.val_dataset and stored.corpus_for(engine.val_dataset)
        return engine

    @property
    def embed_model(self) -> BaseEmbedding:
        """The embedding model; one that was named by a string is loaded now.

        Raises:
            ModelNotFoundError: It cannot be found.
            MissingExtraError: A package that LlamaIndex needs for it is not installed.
        """
        if not isinstance(self._embed_model, BaseEmbedding):
            self._embed_model = _resolved(os.fspath(self._embed_model))
        return self._embed_model

    def smart_batching_collate(self, batch: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors of pairs of a query and a passage, from the index or the cache where they are in it.

        Returns:
            Vectors of the queries and of the passages, float32 [pairs, dimensions] each.
        """
        import torch

        from llama_index_lora_embed.engines.embedding_adapter_run import embed_passages, embed_texts

        queries, passages = ([str(pair[side]) for pair in batch] for side in (0, 1))
        return (
            torch.from_numpy(embed_texts(self.embed_model, queries, "query", self.settings)),
            torch.from_numpy(embed_passages(self, passages, self.settings)),
        )

    def finetune(self, **train_kwargs: Any) -> EmbeddingAdapterResult:
        """Embed what was not embedded yet, train, keep the step that evaluated best, and write the adapter directory.

        The embedding model alone is evaluated first and is a candidate: if no step beats it, the written adapter leaves
        vectors as they are, and a warning says so. Ctrl-C and SIGTERM finish the step and save a checkpoint.

        Args:
            **train_kwargs: As for the engine; these win.

        Returns:
            Metrics of the model alone and with the adapter, verdict, path.

        Raises:
            ConfigError: The vectors have other dimensions than `dim` or the adapter, or differ among themselves, which
                shows with the first; or the checkpoint to resume from is of another run.
            NonFiniteLossError: A vector is NaN or infinite, and its text is named; or the loss is.
            OutputDirectoryError: The adapter or the cache could not be written; what was there before is unchanged.
            KeyboardInterrupt: Ctrl-C.
        """
        from llama_index_lora_embed.engines.embedding_adapter_run import execute

        kwargs = {**self._train_kwargs, **train_kwargs}
        if problems := _train_kwargs_problems(train_kwargs):
            raise ConfigError(f"{len(problems)} wrong argument(s)", "those named", "Correct them:", problems)
        settings = self.settings
        if "max_grad_norm" in kwargs:
            settings = settings.replace(max_grad_norm=kwargs["max_grad_norm"])
        if kwargs.get("show_progress_bar"):
            settings = settings.replace(verbose=True)
        result = execute(self, self._target(), settings, kwargs)
        if result.verdict.value != "BETTER" or result.best_step == 0:
            warn_user(result.summary)  # what a user must not overlook
        return result

    def get_finetuned_model(self, **model_kwargs: Any) -> AdapterEmbeddingModel:
        """The embedding model with the adapter, read back from the directory.

        Args:
            **model_kwargs: As for `AdapterEmbeddingModel`.

        Raises:
            OutputDirectoryError: `finetune()` has not written the directory yet.
            AdapterError: The directory was damaged since.
        """
        path = absolute(self.settings.model_output_path)
        check_written(path)
        own = None if self.adapter_model is None else type(self.adapter_model)
        return AdapterEmbeddingModel(self.embed_model, path, **{"adapter_cls": own, **model_kwargs})


def _queries(value: Any, name: str) -> EmbeddingQAFinetuneDataset:
    value = from_huggingface(value, name)
    if getattr(value, "kind", "queries") != "queries":
        raise DatasetError(
            f"{name} of labelled pairs",
            "queries with the passages that answer them",
            "LoraFinetuneEngine trains on labelled pairs.",
        )
    return EmbeddingQAFinetuneDataset.coerce(value, name).check(name)


def _train_kwargs_problems(kwargs: dict[str, Any]) -> list[str]:
    expected = f"expected one of {', '.join(_TRAIN_KWARGS)}, or an argument of the engine"
    problems = [f"{name}: unknown; {expected}" for name in kwargs if name not in _TRAIN_KWARGS]
    if not callable(kwargs.get("optimizer_class", callable)):
        problems.append(f"optimizer_class={kwargs['optimizer_class']!r}: expected a class such as torch.optim.SGD")
    if not isinstance(kwargs.get("optimizer_params", {}), dict):
        problems.append(f"optimizer_params={kwargs['optimizer_params']!r}: expected a mapping such as {{'lr': 1e-3}}")
    return problems


def _model_problems(embed_model: Any, adapter_model: Any, dim: Any) -> list[str]:
    problems = []
    if not isinstance(embed_model, (BaseEmbedding, str, os.PathLike)) or not embed_model:
        problems.append(
            f"embed_model of type {type(embed_model).__name__}: expected a LlamaIndex BaseEmbedding, or a string"
        )
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
        problems.append(f"dim={dim!r}: expected a whole number of at least 1, or None")
        dim = None
    if adapter_model is None:
        return problems
    if not all(hasattr(adapter_model, name) for name in ("get_config_dict", "forward", "state_dict")):
        expected = "expected a LinearLayer, a TwoLayerNN or a BaseAdapter of your own"
        return [*problems, f"adapter_model of type {type(adapter_model).__name__}: {expected}"]
    taken, returned = (getattr(adapter_model, name, dim) for name in ("in_features", "out_features"))
    if taken != returned:
        problems.append(
            f"adapter_model from {taken} to {returned} dimensions: expected as many, in which passages stay"
        )
    if dim is not None and taken != dim:
        problems.append(f"dim={dim} with an adapter_model of {taken} dimensions: expected the same number")
    return problems


def _resolved(name: str) -> BaseEmbedding:
    """The embedding model that a string names: LlamaIndex's own notation, or a place that `LoraEmbedding` loads."""
    if name == "default" or name.startswith(("local:", "clip")):
        from llama_index.core.embeddings import resolve_embed_model

        try:
            return resolve_embed_model(name)
        except ImportError as error:
            raise MissingExtraError(
                f"embed_model={name!r}, for which LlamaIndex needs another package ({error})",
                "that package, or a folder or Hub id without 'local:', which LoraEmbedding loads",
                "pip install llama-index-embeddings-huggingface",
            ) from error
    if (Path(name).expanduser() / CONFIG_NAME).exists():
        return LoraEmbedding(name)
    return LoraEmbedding(base_model=name)
