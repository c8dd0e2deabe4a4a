"""`LoraFinetuneEngine`: the old engine's arguments, turned into a configuration and run."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from llama_index.core.schema import BaseNode

from llama_index_lora_embed.config import (
    DEFAULT_BASE,
    FinetuneConfig,
    MiningSettings,
    ObjectiveSettings,
    QueryFilterSettings,
)
from llama_index_lora_embed.data import BuildReport, QueryGenerator
from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.engines.result import FinetuneResult
from llama_index_lora_embed.engines.run import prepare, run_from_nodes
from llama_index_lora_embed.engines.validation import check_written

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from llama_index_lora_embed.embedding import LoraEmbedding
    from llama_index_lora_embed.engines.starting_model import Loaded

P = ParamSpec("P")
_C = FinetuneConfig()
_T = _C.training


def _noting_what_is_given(init: Callable[P, None]) -> Callable[P, None]:
    """An `__init__` that keeps the arguments it is called with: a preset gives way to these, even at their defaults."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def noting(*args: P.args, **kwargs: P.kwargs) -> None:
        engine: Any = args[0]
        engine._given = signature.bind_partial(*args, **kwargs).arguments
        init(*args, **kwargs)

    return noting


class LoraFinetuneEngine:
    """Fine-tunes an embedding model with LoRA on queries about a user's own passages.

    It takes the arguments of llama-index-finetuning's `SentenceTransformersFinetuneEngine` in the same order, and turns
    them into a `FinetuneConfig`, which documents every one of them under the same name. Two defaults differ from the
    old engine's: `batch_size` is 64 (was 10: the other passages of a batch are the negatives), `epochs` is 5, or 3 in
    windows (was 2). Without a `val_dataset` a tenth of the queries is held out.

    Tuning both sides gained most, with 100 and 300 labels of medquad queries alone. Where an index must keep its
    vectors, `EmbeddingAdapterFinetuneEngine` takes seconds; `tune="query"` gained a little more with up to 1,000
    labelled queries (docs/query-side.md, "Which to take").

    Constructing an engine loads no model.

    Args:
        dataset: Training queries and passages: this package's class, llama-index-finetuning's, a mapping of the same
            fields, a path to the JSON file, or a Hugging Face dataset (`data.training_data.from_huggingface`); or
            `LabelledPairs`.
        model_id: See `config.BaseModelSettings`, as for all arguments about the base.
        model_output_path: See `config.OutputSettings`.
        val_dataset: Validation data, best with human-written queries. Queries that are trained on are dropped from it
            (see `on_overlap`). None holds out `val_fraction`.
        loss: None for the objective's; else a sentence-transformers loss, its class, or a callable that makes one from
            the model.
        lora_config: peft's own configuration; None adapts all linear layers.
        objective: An `ObjectiveSettings`, or the name of an objective. None takes in-batch negatives for queries and
            passages, and CoSENT for pairs.
        mining: See `config.MiningSettings`; None mines no hard negatives, unless there is a teacher.
        teacher: Cross-encoder with one score: folder, Hub id, `CrossEncoder`, or a function that returns a number for
            each (query, passage) of a list. It scores each query's passage and mined hard negatives before training,
            and its scores are learnt: by default as in CADET, with `objective="margin_mse"` as in GPL. With
            `tune="query"`: a model that was tuned on both sides (an adapter's folder or Hub id, or a `BaseEmbedding`),
            which embeds all passages once. The queries learn to find in the index what it finds. Give both runs the
            same `val_dataset`: a verdict on queries that the teacher was trained on is too kind.

    Other arguments are fields of `config.TrainingSettings` and `config.DataSettings`.

    Attributes:
        config: The configuration, with absolute paths.

    Raises:
        ConfigError: Arguments are wrong, all of them named at once; problems of several kinds come together in it.
        DatasetError: A dataset is empty or inconsistent; with `on_overlap="raise"`, validation overlaps training.
        ModelNotFoundError: `model_id` is a folder that does not exist.
        OutputDirectoryError: The output path cannot be written or holds something else.
    """

    _given: dict[str, Any]
    _loaded: Loaded | None = None
    _trained = False
    _tuned: SentenceTransformer | None = None

    @_noting_what_is_given
    def __init__(
        self,
        dataset: TrainingData | Any,
        model_id: str = DEFAULT_BASE,
        model_output_path: str = _C.output.model_output_path,
        batch_size: int | Literal["auto"] = _T.batch_size,
        val_dataset: TrainingData | Any | None = None,
        loss: Any | None = None,
        epochs: int = _T.epochs,
        show_progress_bar: bool = _T.show_progress_bar,
        evaluation_steps: int = _T.evaluation_steps,
        use_all_docs: bool = _C.data.use_all_docs,
        trust_remote_code: bool = _T.trust_remote_code,
        device: Any | None = None,
        save_checkpoints: bool = _T.save_checkpoints,
        resume_from_checkpoint: bool | str | os.PathLike[str] = _C.output.resume_from_checkpoint,
        checkpoint_save_steps: int = _T.checkpoint_save_steps,
        checkpoint_save_total_limit: int = _T.checkpoint_save_total_limit,
        *,
        preset: Literal["fast", "balanced", "best"] = _C.preset,
        tune: Literal["both", "query"] = _T.tune,
        negatives: Literal["auto", "corpus", "answered"] = _T.negatives,
        lora_config: LoraConfig | None = None,
        objective: ObjectiveSettings | str | None = None,
        continue_from: str | os.PathLike[str] | None = None,
        learning_rate: float = _T.learning_rate,
        max_seq_length: int | None = _T.max_seq_length,
        precision: Literal["auto", "bf16", "fp32"] = _T.precision,
        temperature: float = _T.temperature,
        lora_layers: float = _T.lora_layers,
        adapter_scale: float = _T.adapter_scale,
        base_dropout: bool = _T.base_dropout,
        fused_lora: bool = _T.fused_lora,
        fused_attention: bool = _T.fused_attention,
        fused_decoder: bool = _T.fused_decoder,
        cuda_graphs: bool = _T.cuda_graphs,
        frozen_cache_mb: float = _T.frozen_cache_mb,
        memory_mb: int | Literal["auto"] = _T.memory_mb,
        val_fraction: float = _C.data.val_fraction,
        on_overlap: Literal["drop", "raise"] = _C.data.on_overlap,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        pooling: str | None = None,
        window: int | Literal["auto"] | None = _C.base.window,
        quantized: bool = _C.base.quantized,
        best_metric: str | None = None,
        early_stopping_patience: int = _T.early_stopping_patience,
        selection_passages: int = _T.selection_passages,
        allow_changes: Collection[str] = (),
        mining: MiningSettings | None = None,
        teacher: Any | None = None,
        revision: str | None = None,
        cache_folder: str | None = None,
        seed: int = _T.seed,
    ) -> None:
        register_legacy_base_class(type(self))
        given = {name: value for name, value in self._given.items() if name not in ("self", "dataset", "val_dataset")}
        self._run = prepare(_arguments(given), dataset, val_dataset, **_objects(given))

    @property
    def config(self) -> FinetuneConfig:
        """The run's configuration, with absolute paths."""
        return self._run.config

    @property
    def dataset(self) -> TrainingData:
        """Training data, without what is held out."""
        return self._run.dataset

    @property
    def val_dataset(self) -> TrainingData | None:
        """Validation data, given or held out."""
        return self._run.val_dataset

    @property
    def model(self) -> SentenceTransformer:
        """The model that `finetune()` will train, loaded at the first use; afterwards the tuned one, read back.

        For a loss that needs a model to be built on: `engine.loss = SomeLoss(engine.model)`.

        Raises:
            LoraEmbedError: It cannot be loaded, see `finetune`.
        """
        if self._trained:
            if self._tuned is None:
                self._tuned = self.get_finetuned_model().sentence_transformer
            return self._tuned
        if self._loaded is None:
            self._loaded = self._run.load()
        return self._loaded[0]

    @property
    def loss(self) -> Any | None:
        """The loss of your own, see the argument; it can be set before `finetune()`. None for the objective's.

        Raises:
            ConfigError: What it is set to is no loss.
        """
        return self._run.loss

    @loss.setter
    def loss(self, loss: Any | None) -> None:
        self._run = self._run.with_loss(loss)

    @property
    def data_report(self) -> BuildReport | None:
        """What became of the nodes; None where a dataset was given."""
        return self._run.data_report

    @classmethod
    def from_nodes(
        cls,
        nodes: Sequence[BaseNode],
        model_id: str = DEFAULT_BASE,
        model_output_path: str = _C.output.model_output_path,
        *,
        llm: LLM | None = None,
        val_dataset: TrainingData | Any | None = None,
        val_fraction: float | None = None,
        query_generators: Iterable[QueryGenerator] | None = None,
        filters: QueryFilterSettings | None = _C.data.filters,
        **kwargs: Any,
    ) -> LoraFinetuneEngine:
        """An engine on queries generated from nodes, validation held out by source document.

        Args:
            nodes: LlamaIndex nodes, as they will be indexed.
            model_id: As for the engine.
            model_output_path: As for the engine.
            llm: Any LlamaIndex LLM, which writes the queries (`LLMQueryGenerator`). Its answers are kept in
                `<model_output_path>.queries.jsonl`, so that a run that was interrupted pays for none of them twice.
            val_dataset: Human-written queries to evaluate with, about the same nodes or others; generated queries
                that it also holds are not trained on. None holds out `val_fraction` of the generated ones.
            val_fraction: 0 trains without a verdict; None is the preset's, 0.1 by default.
            query_generators: Generators to run; None takes `llm`, or else titles, first sentences and definitions
                (`default_query_generators`), which need no LLM.
            filters: Which queries are dropped, see `QueryFilterSettings`; None keeps all. Where an LLM wrote some, the
                base is loaded to see whether it finds their passages.
            **kwargs: Everything else that the engine takes. Where they say nothing, training has the defaults of
                `TrainingSettings.for_written_queries` or `for_heuristic_queries`.

        Raises:
            SplitError: The nodes come from one document, so that none can be held out; pass `val_dataset`, or
                `val_fraction=0` to train without a verdict.
            DatasetError: No query could be generated.
            ConfigError: Wrong arguments.
        """
        kwargs |= {"model_id": model_id, "model_output_path": model_output_path, "filters": filters}
        if val_fraction is not None:
            kwargs["val_fraction"] = val_fraction
        register_legacy_base_class(cls)
        engine = cls.__new__(cls)
        engine._run = run_from_nodes(_arguments(kwargs), nodes, val_dataset, query_generators, llm, **_objects(kwargs))
        return engine

    @classmethod
    def from_vector_store(
        cls,
        store: Any,
        dataset: TrainingData | Any | None = None,
        model_id: str = DEFAULT_BASE,
        model_output_path: str = _C.output.model_output_path,
        *,
        llm: LLM | None = None,
        query_generators: Iterable[QueryGenerator] | None = None,
        val_dataset: TrainingData | Any | None = None,
        **kwargs: Any,
    ) -> LoraFinetuneEngine:
        """An engine with `tune="query"` on the passages of an existing index, whose vectors it reads and leaves alone.

        Queries are trained against the stored vectors: nothing is embedded again but texts that the index does not
        hold. All passages of the index are negatives, and all are searched in evaluations. The base is loaded to check
        that it made the vectors: by the index's stamp (`stamp_index`), else by embedding up to 32 of the texts again.

        Args:
            store: A Chroma collection, LlamaIndex's vector store of Chroma, FAISS or Qdrant, a `SimpleVectorStore`; an
                index or a `StorageContext` on one of them, or the folder of a persisted one with a `SimpleVectorStore`;
                or `data.StoredVectors`. A SimpleVectorStore and FAISS keep no texts, so pass the index.
            dataset: Queries whose passages are nodes of the index. None generates queries from the index's nodes, as
                `from_nodes` does.
            model_id: The model that built the index.
            model_output_path: As for the engine.
            llm: Writes the queries where there is no dataset, see `from_nodes`.
            query_generators: See `from_nodes`.
            val_dataset: As for the engine; its passages are nodes of the index, too.
            **kwargs: Everything else that the engine or `from_nodes` takes.

        Raises:
            ConfigError: The store cannot list its vectors, or arguments are wrong.
            DatasetError: The store is empty, holds vectors that are zero or not finite, or lacks passages of a dataset;
                all of them are named.
            WrongIndexError: The index was built by another model.
            LoraEmbedError: As the engine and `from_nodes`.

        Example:
            >>> LoraFinetuneEngine.from_vector_store(collection, dataset, model_id).finetune()  # doctest: +SKIP
        """
        from llama_index_lora_embed.engines.stored_passages import run_from_store

        kwargs |= {"model_id": model_id, "model_output_path": model_output_path}
        register_legacy_base_class(cls)
        engine = cls.__new__(cls)
        engine._run = run_from_store(
            _arguments(kwargs), store, dataset, val_dataset, query_generators, llm, **_objects(kwargs)
        )
        return engine

    def finetune(self, *, callbacks: Sequence[TrainerCallback] = (), **train_kwargs: Any) -> FinetuneResult:
        """Train, keep the step that evaluated best, and write the adapter directory.

        The base is evaluated first and is a candidate: if no later step beats it, the untrained adapter is written,
        `best_step` is 0, and a warning says so. Where the run reads texts otherwise than the base as installed (another
        `max_seq_length`, windows, prompts or pooling), both are candidates, and the verdict is on the base as
        installed. Of several steps that beat it and lie within a standard error of the best, the latest is kept.

        Ctrl-C and SIGTERM finish the step, save a checkpoint, then stop; `finetune(resume_from_checkpoint=True)`
        continues from it. Under torchrun or accelerate launch all processes train together and the first one writes.

        Args:
            callbacks: transformers' callbacks, in a list.
            **train_kwargs: More of sentence-transformers' training arguments, by their own names: e.g.
                `gradient_accumulation_steps`, `gradient_checkpointing`, `lr_scheduler_type="cosine"`,
                `max_grad_norm`, `report_to="tensorboard"`. Those that the engine has an argument for are refused, but
                for `resume_from_checkpoint` and `save_checkpoints`, which take the place of the engine's in this call.

        Returns:
            Metrics of base and tuned, verdict, path.

        Raises:
            ModelNotFoundError: The base cannot be found.
            UnsafeCheckpointError: The base is stored as a pickle only.
            ConfigError: Callbacks or training arguments are wrong, or length, LoRA or loss do not fit the base.
            DeviceMemoryError: The device's memory does not hold a step.
            NonFiniteLossError: The loss became NaN or infinite; no adapter was written.
            OutputDirectoryError: The adapter could not be written; what was there before is unchanged.
            KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
        """

        def take() -> Loaded:  # training changes it, so that another run starts from a model of its own
            loaded, self._loaded = self._loaded, None
            return loaded or self._run.load()

        result = self._run.execute(callbacks, train_kwargs, take)
        self._trained, self._tuned = True, None
        return result

    def get_finetuned_model(self, **model_kwargs: Any) -> LoraEmbedding:
        """The tuned model, read back from the adapter directory.

        Args:
            **model_kwargs: As for `LoraEmbedding`.

        Raises:
            OutputDirectoryError: `finetune()` has not written the directory yet.
            AdapterError: The directory was damaged since.
        """
        from llama_index_lora_embed.embedding import LoraEmbedding

        config = self.config
        path = config.output.model_output_path
        check_written(path)
        defaults = {
            "device": config.training.device,
            "trust_remote_code": config.training.trust_remote_code,
            "cache_folder": config.base.cache_folder,
        }
        return LoraEmbedding(path, **{**defaults, **model_kwargs})


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The engine's arguments that are fields of a configuration, peft's configuration by its fields."""
    arguments = {name: value for name, value in given.items() if name != "loss"}
    if not isinstance(given.get("teacher"), (str, os.PathLike)):
        arguments.pop("teacher", None)
    if hasattr(given.get("lora_config"), "to_dict"):
        from llama_index_lora_embed.training.checkpointing.resume import lora_fields

        arguments["lora_config"] = lora_fields(given["lora_config"])
    return arguments


def _objects(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are Python objects."""
    objects = {name: given.get(name) for name in ("loss", "lora_config", "teacher")}
    if isinstance(objects["teacher"], (str, os.PathLike)):
        objects["teacher"] = None
    return objects


def register_legacy_base_class(engine: type) -> None:
    """Make a class a virtual subclass of llama-index-finetuning's engine base class, if that package was imported.

    It is not imported here, because that takes a second and 50 MB.

    Args:
        engine: The class.
    """
    if (old := sys.modules.get("llama_index.finetuning.types")) is not None:
        old.BaseEmbeddingFinetuneEngine.register(engine)
