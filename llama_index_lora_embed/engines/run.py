"""`run_finetune`: one configuration, one run, from data to adapter directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode

from llama_index_lora_embed.config import FinetuneConfig, TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError, SplitError, warn_user
from llama_index_lora_embed.data import (
    BuildReport,
    EmbeddingQAFinetuneDataset,
    LLMQueryGenerator,
    QueryGenerator,
    split_by_source,
    split_report,
)
from llama_index_lora_embed.data.headings import validate_on_headings
from llama_index_lora_embed.data.origins import HUMAN, LLM_WRITTEN, METADATA
from llama_index_lora_embed.data.readers.nodes import read_nodes
from llama_index_lora_embed.data.training_data import TrainingData, from_huggingface, hold_out, read_training_data
from llama_index_lora_embed.engines.generate import generators_of, journal_of, queries_for
from llama_index_lora_embed.engines.result import FinetuneResult, write_run
from llama_index_lora_embed.engines.starting_model import Loaded, StartingModel, as_decided
from llama_index_lora_embed.engines.teacher import query_teacher_of, teacher_of
from llama_index_lora_embed.engines.validation import check_device, check_loss, check_run

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.llms import LLM
    from peft import LoraConfig
    from transformers import TrainerCallback

    from llama_index_lora_embed.data.stored_vectors import FloatArray, StoredVectors
    from llama_index_lora_embed.engines.launcher import Launcher
    from llama_index_lora_embed.models.adapter_directory import Manifest
    from llama_index_lora_embed.training.arguments import UserArguments

_FEW_PASSAGES = 200  # with queries; fewer get `TrainingSettings.for_small_batches`


def run_finetune(
    config: FinetuneConfig,
    *,
    dataset: TrainingData | Any | None = None,
    val_dataset: TrainingData | Any | None = None,
    nodes: Sequence[BaseNode] | None = None,
    llm: LLM | None = None,
    query_generators: Iterable[QueryGenerator] | None = None,
    loss: Any | None = None,
    lora_config: LoraConfig | None = None,
    teacher: Any | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    launcher: Launcher | None = None,
    **train_kwargs: Any,
) -> FinetuneResult:
    """Run a configuration: read or take the data, train, evaluate, write the adapter directory.

    What is given here takes the place of what the configuration names.

    Args:
        config: The run.
        dataset: Training data instead of `config.data.dataset`.
        val_dataset: Validation data instead of `config.data.val_dataset`.
        nodes: LlamaIndex nodes to generate queries for, instead of `config.data.nodes`.
        llm: Writes the queries for nodes.
        query_generators: Instead of `config.data.query_generators`.
        loss: A sentence-transformers loss instead of the objective's.
        lora_config: peft's configuration instead of `config.lora_config`.
        teacher: What `LoraFinetuneEngine` takes, instead of `config.teacher`.
        callbacks: transformers' callbacks.
        launcher: Trains in other processes: `ProcessLauncher` (torchrun, accelerate) or `distributed.RayLauncher`. Data
            is read, generated and checked here; None trains here, too.
        **train_kwargs: More sentence-transformers training arguments, see `LoraFinetuneEngine.finetune`.

    Returns:
        Metrics of base and tuned, verdict, path.

    Raises:
        ConfigError: There is no data, or arguments are wrong; all of them are named.
        LoraEmbedError: As `LoraFinetuneEngine` and its `finetune`, and as the launcher.
    """
    run = run_of(
        config,
        dataset=dataset,
        val_dataset=val_dataset,
        nodes=nodes,
        llm=llm,
        query_generators=query_generators,
        loss=loss,
        lora_config=lora_config,
        teacher=teacher,
    )
    if launcher is None:
        return run.execute(callbacks, train_kwargs)
    result = launcher.launch(run, callbacks, train_kwargs)
    _warn_unless_better(result)
    return result


def run_of(
    config: FinetuneConfig,
    *,
    dataset: TrainingData | Any | None = None,
    val_dataset: TrainingData | Any | None = None,
    nodes: Sequence[BaseNode] | None = None,
    llm: LLM | None = None,
    query_generators: Iterable[QueryGenerator] | None = None,
    loss: Any | None = None,
    lora_config: LoraConfig | None = None,
    teacher: Any | None = None,
) -> FinetuneRun:
    """The run that `run_finetune` executes: data read or generated, everything checked, no model loaded for it."""
    data = config.data
    if dataset is None and nodes is None:
        if (data.dataset is None) == (data.nodes is None):
            raise ConfigError(
                f"data.dataset={data.dataset!r} and data.nodes={data.nodes!r}",
                "one of the two, or dataset= or nodes=",
                "Name the training data in the configuration, or pass it to run_finetune.",
            )
        if data.dataset is not None:
            dataset = read_training_data(data.dataset, data.kind)
        else:
            assert data.nodes is not None
            nodes = read_nodes(data.nodes)
    if val_dataset is None and data.val_dataset is not None:
        val_dataset = read_training_data(data.val_dataset, data.kind if dataset is not None else "queries")
    if teacher is not None:
        by_name = isinstance(teacher, (str, os.PathLike))
        config, teacher = config.replace(teacher=teacher if by_name else None), None if by_name else teacher
    objects: dict[str, Any] = {"loss": loss, "lora_config": lora_config, "teacher": teacher}
    if nodes is None:
        return prepare(config, dataset, val_dataset, **objects)
    if query_generators is None and data.query_generators is not None:
        query_generators = generators_of(config, llm, journal_of(config))
    return run_from_nodes(config, nodes, val_dataset, query_generators, llm, **objects)


def run_from_nodes(
    config: FinetuneConfig | dict[str, Any],
    nodes: Sequence[BaseNode],
    val_dataset: Any | None,
    query_generators: Iterable[QueryGenerator] | None,
    llm: LLM | None,
    *,
    loss: Any | None = None,
    lora_config: LoraConfig | None = None,
    embed_model: BaseEmbedding | None = None,
    teacher: Any | None = None,
) -> FinetuneRun:
    """A run on queries generated from nodes, validation held out by source document.

    Everything that can be wrong about the run is found before an LLM is paid. Generated queries that a `val_dataset`
    also holds are not trained on. Where the validation queries are held out, headings stand for them as far as there
    are some (`validate_on_headings`).

    Args:
        config: A configuration, or flat arguments of one.
        nodes: As they will be indexed.
        val_dataset: Validation data; None holds out `val_fraction` of the generated queries.
        query_generators: Generators to run; None takes the LLM, or `default_query_generators()`.
        llm: Writes the queries.
        loss: A loss of the user's own.
        lora_config: peft's configuration.
        embed_model: Looks for the passages of generated queries; None takes the base.
        teacher: A teacher that is an object, not a name.

    Raises:
        SplitError: The nodes come from one document, so that none can be held out.
        DatasetError: No query could be generated.
        ConfigError: Wrong arguments.
    """
    if val_dataset is not None:
        val_dataset = EmbeddingQAFinetuneDataset.coerce(from_huggingface(val_dataset, "val_dataset"), "val_dataset")
    generators = None if query_generators is None else list(query_generators)
    objects: dict[str, Any] = {"loss": loss, "lora_config": lora_config, "teacher": teacher}
    config = check_run(config, None, val_dataset, **objects).config
    config = _with_defaults(config, _written(generators, llm), plain_lora=lora_config is None)
    if config.base.quantized:
        check_device(config)
    if generators is None and llm is not None:
        generators = [LLMQueryGenerator(llm=llm, journal=journal_of(config))]
    seed, fraction = config.training.seed, config.data.val_fraction
    dataset, report = queries_for(config, nodes, generators, embed_model)
    held_out = None
    if val_dataset is not None:
        known = set(dataset.shared_queries(val_dataset))
        dataset = dataset.subset((i for i in dataset.queries if i not in known), dataset.corpus)
    elif fraction:
        dataset, val_dataset = split_by_source(dataset, fraction, seed=seed, max_passages=config.data.max_eval_passages)
        report = replace(report, split=split_report(dataset, val_dataset))
        held_out = val_dataset.origins()
        val_dataset = validate_on_headings(val_dataset, dataset.origins(), nodes, seed=seed)
        # headings of passages that are trained on may be among them
        config = config.replace(data=config.data.replace(on_overlap="drop"))
    run = prepare(config, dataset, val_dataset, **objects)
    if held_out is not None and isinstance(run.val_dataset, EmbeddingQAFinetuneDataset):
        origins = run.val_dataset.origins()
        report = replace(report, validated_on=origins if origins != held_out else {})
    return replace(run, data_report=report)


def _written(generators: Sequence[QueryGenerator] | None, llm: LLM | None) -> bool:
    """Whether an LLM or people wrote some of the queries; those of other generators are trained more gently."""
    if generators is None:
        return llm is not None
    names = (str(getattr(generator, "name", "")) for generator in generators)
    parts = [part for name in names for part in name.split(" or ")]
    return any(part.startswith(LLM_WRITTEN) or part in (HUMAN, METADATA) for part in parts)


def _with_defaults(config: FinetuneConfig, written: bool, *, plain_lora: bool) -> FinetuneConfig:
    """The configuration with the training defaults for synthetic queries where it says nothing itself.

    An adapter that is trained further, or in several rounds of mining, keeps its whole change (`check_scalable`).
    """
    given = {name: getattr(config.training, name) for name in config.training.model_fields_set}
    if written:
        return config.replace(training=TrainingSettings.for_written_queries(**given))
    further = config.base.continue_from is not None or (config.mining is not None and config.mining.rounds > 1)
    if further or config.lora_config is not None or not plain_lora:
        given = {"adapter_scale": 1.0, **given}
    base = config.base if "window" in config.base.model_fields_set else config.base.replace(window=None)
    return config.replace(base=base, training=TrainingSettings.for_heuristic_queries(**given))


@dataclass(frozen=True)
class FinetuneRun:
    """A run that was checked and can be executed; nothing is loaded yet.

    Attributes:
        config: With absolute paths.
        dataset: Training data.
        val_dataset: Validation data; None for a run that is not evaluated.
        loss: A loss of the user's own.
        lora_config: peft's configuration; None for the default LoRA.
        teacher: A teacher that is an object; None where there is none, or the configuration names it.
        hold_out_note: How the validation data was held out, and what was dropped from it, in words.
        data_report: What became of the nodes; None if a dataset was given.
        stored: Vectors of the passages, where an index holds them.
    """

    config: FinetuneConfig
    dataset: TrainingData
    val_dataset: TrainingData | None
    loss: Any | None = None
    lora_config: LoraConfig | None = None
    teacher: Any | None = None
    hold_out_note: str = ""
    data_report: BuildReport | None = None
    stored: StoredVectors | None = None

    def with_loss(self, loss: Any | None) -> FinetuneRun:
        """The same run with another loss of the user's own; raises a ConfigError if it is none."""
        check_loss(self.config, loss, pairs=self.dataset.kind == "pairs")
        return replace(self, loss=loss)

    def load(self) -> Loaded:
        """What training starts from; raises as `check_device` and `StartingModel.load`."""
        from llama_index_lora_embed.training import distributed

        check_device(self.config)
        distributed.join(self.config.training.device)
        data = self.dataset
        # a loss of the user's own may not allow windows, so that they must be asked for
        passages = data.corpus.values() if isinstance(data, EmbeddingQAFinetuneDataset) and self.loss is None else ()
        return StartingModel(self.config).load(passages)

    def execute(
        self,
        callbacks: Sequence[TrainerCallback],
        train_kwargs: dict[str, Any],
        load: Callable[[], Loaded] | None = None,
        *,
        warn: bool = True,
    ) -> FinetuneResult:
        """Train, keep the step that evaluated best, write the adapter directory; see `LoraFinetuneEngine.finetune`.

        `load` hands over what training starts from, if that may be loaded already. `warn` says whether users see the
        warnings of this process.
        """
        from llama_index_lora_embed.models.adapter_directory import check_output
        from llama_index_lora_embed.training import distributed
        from llama_index_lora_embed.training.arguments import check_user_arguments
        from llama_index_lora_embed.training.checkpointing.checkpoints import only_run

        started = time.perf_counter()
        check_device(self.config)
        arguments = check_user_arguments(
            self.config, callbacks, train_kwargs, own_loss=self.loss is not None, pairs=self.dataset.kind == "pairs"
        )
        distributed.join(self.config.training.device)
        target = check_output(self.config.output.model_output_path)
        run_dir = target.with_name(target.name + ".run")
        with only_run(run_dir):
            result = self._train_and_write(target, run_dir, arguments, load or self.load)
        result = replace(result, wall_seconds=time.perf_counter() - started)
        if warn and distributed.is_main():
            _warn_unless_better(result)
        return result

    def _train_and_write(
        self, target: Path, run_dir: Path, arguments: UserArguments, load: Callable[[], Loaded]
    ) -> FinetuneResult:
        from llama_index_lora_embed.engines.evaluator import StepEvaluator, default_metric
        from llama_index_lora_embed.engines.run_verdict import RunVerdict
        from llama_index_lora_embed.training import distributed
        from llama_index_lora_embed.training.checkpointing.resume import lora_fields, record
        from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
        from llama_index_lora_embed.training.efficiency.quantization import onto_full_precision
        from llama_index_lora_embed.training.iterative_mining import train_with_mining

        config, val = arguments.config, self.val_dataset
        query_side = config.training.tune == "query"
        teacher = None if query_side else teacher_of(config, self.teacher)
        model, base, parent, installed = load()
        config = as_decided(config, model, parent)
        settings = config.training
        start = StartingModel(config)
        lora_config = self._lora_config()
        if lora_config is not None:  # with peft's defaults left out, whoever wrote them
            config = config.replace(lora_config=lora_fields(lora_config))
        passages = None
        if query_side:
            passages = start.frozen_passages(model, self._stored_vectors(), query_teacher_of(config, self.teacher))
        evaluator = evaluate_as_installed = None
        if val is not None:
            # the base as installed has the same vectors of passages where they stay as they are
            evaluator = StepEvaluator(val, settings, passages)
            evaluate_as_installed = partial(installed.evaluate, dataset=val, evaluate=evaluator)
        outcome, mined = train_with_mining(
            model,
            self.dataset,
            config,
            run_dir,
            selection=CheckpointSelection(
                evaluator,
                settings.best_metric or default_metric(val),
                settings.adapter_scale,
                None if evaluator is None else evaluator.subset_of,
                evaluate_as_installed,
            ),
            lora_config=lora_config,
            loss=self.loss,
            teacher=teacher,
            run_record=record(
                config, self.dataset, val, base=base, parent=parent, loss=self.loss,
                train_kwargs=arguments.train_kwargs, stored=self.stored,
            ),
            callbacks=arguments.callbacks,
            train_kwargs=arguments.train_kwargs,
            passages=passages,
        )  # fmt: skip
        best = outcome.selection
        if config.base.quantized:
            model = onto_full_precision(model, best, lambda: start.load_base(base, quantized=False))
        verdict = RunVerdict.of(best, self.dataset, val, self.hold_out_note, continued=parent is not None)

        def write() -> Manifest:
            with installed.to_write(model) if best.keeps_installed else nullcontext(model) as kept:
                return write_run(target, run_dir, config, self.dataset, kept, base, parent, outcome, mined, verdict)

        manifest = distributed.on_main(write)
        return FinetuneResult.of(outcome, str(target), manifest, verdict, mined, self.data_report, val)

    def _stored_vectors(self) -> dict[str, FloatArray]:
        """The vectors of an index by the texts of training and validation; none where there is no index."""
        if self.stored is None:
            return {}
        datasets = (data for data in (self.dataset, self.val_dataset) if isinstance(data, EmbeddingQAFinetuneDataset))
        return self.stored.by_text(*datasets)

    def _lora_config(self) -> LoraConfig | None:
        if self.lora_config is not None or self.config.lora_config is None:
            return self.lora_config
        from peft import LoraConfig

        from llama_index_lora_embed.training.lora import lora_problems

        try:
            made = LoraConfig(**self.config.lora_config)
            problems = lora_problems(made)
        except (TypeError, ValueError) as error:
            problems = [f"lora_config: {error}"]
        if problems:
            raise ConfigError("a lora_config that cannot be trained", "fields of peft.LoraConfig", "Correct:", problems)
        return made


def _warn_unless_better(result: FinetuneResult) -> None:
    """Say what a user must not overlook."""
    if result.verdict.value != "BETTER" or result.best_step == 0:
        warn_user(result.summary)


def prepare(
    config: FinetuneConfig | dict[str, Any],
    dataset: Any,
    val_dataset: Any | None,
    *,
    loss: Any | None = None,
    lora_config: LoraConfig | None = None,
    teacher: Any | None = None,
) -> FinetuneRun:
    """Check everything about a run and hold out validation data where there is none that is not trained on.

    Warns (UserWarning) of validation queries and pairs that are trained on: they are not evaluated on.

    Args:
        config: A configuration, or flat arguments of one.
        dataset: Training data.
        val_dataset: Validation data; None holds out `val_fraction`.
        loss: A loss of the user's own.
        lora_config: peft's configuration.
        teacher: A teacher that is an object, not a name.

    Raises:
        LoraEmbedError: As `check_run`.
    """
    objects: dict[str, Any] = {"loss": loss, "lora_config": lora_config, "teacher": teacher}
    checked = check_run(config, {} if dataset is None else dataset, val_dataset, **objects)
    config, train, val = checked.config, checked.dataset, checked.val_dataset
    assert train is not None
    small = train.kind == "pairs" or config.training.tune == "query" or len(train.answer_ids()) < _FEW_PASSAGES
    if config.preset == "balanced" and small:
        given = {name: getattr(config.training, name) for name in config.training.model_fields_set}
        config = config.replace(training=TrainingSettings.for_small_batches(**given))
    note = checked.overlap_note
    if val is None and config.data.val_fraction:
        training, data = config.training, config.data
        try:
            train, val, how = hold_out(
                train, data.val_fraction, seed=training.seed, max_passages=data.max_eval_passages
            )
            note = f"{note} Others are evaluated on instead. {how}" if note else how
            if isinstance(val, EmbeddingQAFinetuneDataset):
                held_out = val.origins()
                val = validate_on_headings(val, train.summary()["origins"], seed=training.seed)
                if val.origins() != held_out:
                    note += " Headings of the passages were added, or stand for parts of passages."
        except SplitError as error:
            wanted = {"best_metric": training.best_metric, "early_stopping_patience": training.early_stopping_patience}
            idle = ", ".join(name for name, value in wanted.items() if value)
            warn_user(f"Nothing is held out for evaluation: {error}" + (f" Without effect: {idle}." if idle else ""))
    if checked.overlap_note:
        warn_user(note)
    return FinetuneRun(config, train, val, hold_out_note=note, **objects)
