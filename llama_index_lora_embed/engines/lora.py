"""`LoraFinetuneEngine`, the front desk: arguments in, the line from nodes to embedding model walked."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode

from llama_index_lora_embed.config import (
    MANIFEST_NAME,
    MiningSettings,
    ObjectiveSettings,
    QueryFilterSettings,
    TrainingSettings,
)
from llama_index_lora_embed.core.errors import OutputDirectoryError, warn_user
from llama_index_lora_embed.data import (
    BuildReport,
    EmbeddingQAFinetuneDataset,
    LabelledPairs,
    QueryGenerator,
    dataset_from_nodes,
    split_by_source,
    split_report,
)
from llama_index_lora_embed.data.dataset import normalise
from llama_index_lora_embed.data.split import hold_out
from llama_index_lora_embed.engines.legacy import register_legacy_base_class
from llama_index_lora_embed.engines.result import FinetuneResult, Run, summarise
from llama_index_lora_embed.engines.starting_model import StartingModel
from llama_index_lora_embed.engines.validation import absolute, check_arguments, check_device, rehearsal_set
from llama_index_lora_embed.training.checkpointing.resume import Recorded

if TYPE_CHECKING:
    from pathlib import Path

    from peft import LoraConfig
    from transformers import TrainerCallback

    from llama_index_lora_embed.training.arguments import UserArguments

logger = logging.getLogger(__name__)
_D = TrainingSettings()
_DEFAULT_BASE = "BAAI/bge-small-en"
# Made-up questions are trained on more gently: their wording is soon learnt at the cost of people's.
_MADE_UP_EPOCHS = 2
_MADE_UP_RATE = 5e-4


class LoraFinetuneEngine:
    """Fine-tunes an embedding model with LoRA on questions about a user's own passages.

    It takes the arguments of llama-index-finetuning's `SentenceTransformersFinetuneEngine` in the same order.
    Two defaults differ because the old ones harm: `batch_size` is 32 (was 10: the other passages of a batch are
    the negatives, and nine are few) and `epochs` is 4 (was 2: on the questions held out of tenk_train, nDCG@10
    still rose from 0.829 after two epochs to 0.837 after four; the best evaluation is kept, so that more cannot
    hurt). And where no `val_dataset` is given, a tenth of the questions is held out to judge by instead of none.

    Constructing an engine loads no model.

    Args:
        dataset: Training questions and passages: this package's class, llama-index-finetuning's, a mapping of the
            same fields, or a path to the JSON file; or `LabelledPairs`.
        model_id: Base model: Hub id or folder.
        model_output_path: Adapter directory to write. An adapter there is replaced at the end and kept as
            `<path>.previous`; any other content is refused.
        batch_size: Passages in a step, each with all its questions (pairs in a step, where the dataset is pairs);
            "auto" finds what the device's memory holds.
        val_dataset: Questions (or labelled pairs) to judge by, best some of people's. None holds out `val_fraction`.
        loss: None for the objective's; else a sentence-transformers loss, its class, or a callable that makes one
            from the model.
        epochs: Passes over the data.
        show_progress_bar: Show bars.
        evaluation_steps: Evaluate every so many steps, besides step 0 and the end of each epoch; 0 for epochs only.
        use_all_docs: Train a question with all its relevant passages instead of the first.
        trust_remote_code: Run Python code that the base brings along.
        device: torch device, "cpu" or "cuda:0"; None chooses.
        save_checkpoints: Write checkpoints to `<model_output_path>.run`, where the log (`log.jsonl`) is too. Ctrl-C and
            SIGTERM save one in any case.
        resume_from_checkpoint: Continue from the newest checkpoint, if there is one.
        checkpoint_save_steps: Steps between checkpoints.
        checkpoint_save_total_limit: Checkpoints kept; 0 keeps all.
        lora_config: peft's own configuration; None adapts all linear layers at rank 16.
        objective: What is trained: an `ObjectiveSettings` or its name ("in_batch", "soft_labels", "triplet",
            "distillation"; for labelled pairs "cosent", "cosine"). None takes in-batch negatives, masked by node, for
            questions and passages, and CoSENT for pairs.
        continue_from: Adapter directory to train further, on its own base, into a new directory whose manifest names it
            as the parent. It stands in for the base: as step 0, and in the comparison.
        learning_rate: Peak of the schedule.
        max_seq_length: Tokens per text; None covers 95 % of the training texts.
        precision: "auto", "bf16" or "fp32" for training steps.
        temperature: Of the default loss.
        lora_layers: Share of the layers that the default LoRA adapts, from the last one down; below 1, what the frozen
            ones below put out is computed once for all epochs.
        base_dropout: Train with the dropout that the base's configuration has, and without outputs of frozen layers
            that are kept. It takes longer, and gained nothing where it was tried.
        fused_lora: Compute a LoRA layer's training step in few large operations.
        fused_attention: On processors with bfloat16, compute attention in blocks that their cache holds.
        frozen_cache_mb: Memory for the outputs of frozen layers, see `TrainingSettings`; 0 computes them in every step.
        val_fraction: Share of the questions to hold out without a `val_dataset`; 0 for none.
        on_overlap: What to do if answers of `val_dataset` are also trained on: "error", "drop" their questions
            from training, or "allow".
        query_prompt: Overrides the base's query prompt.
        passage_prompt: Overrides the base's passage prompt.
        pooling: Overrides the base's pooling: "mean", "cls", "lasttoken", "max", "weightedmean" or
            "mean_sqrt_len_tokens".
        window: Read texts that are longer than so many tokens whole, in windows of this length whose vectors are
            averaged (`windows`); None cuts them at `max_seq_length`. Worth it where most nodes are cut.
        quantized: Train on the base in 4 bit (QLoRA), which needs a CUDA GPU and the extra `quantized`.
        best_metric: Measure by which the step to keep is chosen, see `TrainingSettings`.
        early_stopping_patience: Stop after so many evaluations in a row without a new highest figure; 0 for never.
        allow_changes: Names of data and settings that may differ from the checkpoint's on a resume; the error that
            refuses it lists them.
        mining: Mine hard negatives from the training passages before training, and with `rounds` above 1 again with
            the tuned model; None mines none. A step takes longer by the share of negatives it holds.
        revision: Commit of the base on the Hub.
        cache_folder: Of huggingface_hub.
        seed: Of everything random.

    Raises:
        ConfigError: Arguments are wrong, all of them named at once; problems of several kinds come together in it.
        DatasetError: A dataset is empty or inconsistent, or validation overlaps training.
        ModelNotFoundError: `model_id` is a folder that is not there.
        OutputDirectoryError: The output path cannot be written or holds something else.
    """

    def __init__(
        self,
        dataset: EmbeddingQAFinetuneDataset | LabelledPairs | Any,
        model_id: str = _DEFAULT_BASE,
        model_output_path: str = "exp_finetune",
        batch_size: int | Literal["auto"] = _D.batch_size,
        val_dataset: EmbeddingQAFinetuneDataset | Any | None = None,
        loss: Any | None = None,
        epochs: int = _D.epochs,
        show_progress_bar: bool = _D.show_progress_bar,
        evaluation_steps: int = _D.evaluation_steps,
        use_all_docs: bool = False,
        trust_remote_code: bool = _D.trust_remote_code,
        device: Any | None = None,
        save_checkpoints: bool = _D.save_checkpoints,
        resume_from_checkpoint: bool = False,
        checkpoint_save_steps: int = _D.checkpoint_save_steps,
        checkpoint_save_total_limit: int = _D.checkpoint_save_total_limit,
        *,
        lora_config: LoraConfig | None = None,
        objective: ObjectiveSettings | str | None = None,
        continue_from: str | os.PathLike[str] | None = None,
        learning_rate: float = _D.learning_rate,
        max_seq_length: int | None = _D.max_seq_length,
        precision: Literal["auto", "bf16", "fp32"] = _D.precision,
        temperature: float = _D.temperature,
        lora_layers: float = _D.lora_layers,
        base_dropout: bool = _D.base_dropout,
        fused_lora: bool = _D.fused_lora,
        fused_attention: bool = _D.fused_attention,
        frozen_cache_mb: float = _D.frozen_cache_mb,
        val_fraction: float = _D.val_fraction,
        on_overlap: Literal["error", "drop", "allow"] = "error",
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        pooling: str | None = None,
        window: int | None = None,
        quantized: bool = False,
        best_metric: str | None = None,
        early_stopping_patience: int = _D.early_stopping_patience,
        allow_changes: Collection[str] = (),
        mining: MiningSettings | None = None,
        revision: str | None = None,
        cache_folder: str | None = None,
        seed: int = _D.seed,
    ) -> None:
        self.settings = TrainingSettings(
            batch_size=batch_size,
            epochs=epochs,
            learning_rate=learning_rate,
            temperature=temperature,
            lora_layers=lora_layers,
            base_dropout=base_dropout,
            fused_lora=fused_lora,
            fused_attention=fused_attention,
            frozen_cache_mb=frozen_cache_mb,
            max_seq_length=max_seq_length,
            precision=precision,
            evaluation_steps=evaluation_steps,
            early_stopping_patience=early_stopping_patience,
            best_metric=best_metric,
            save_checkpoints=save_checkpoints,
            checkpoint_save_steps=checkpoint_save_steps,
            checkpoint_save_total_limit=checkpoint_save_total_limit,
            val_fraction=val_fraction,
            seed=seed,
            show_progress_bar=show_progress_bar,
            device=None if device is None else str(device),
            trust_remote_code=trust_remote_code,
        )
        self.loss = loss
        self.use_all_docs = use_all_docs
        self.resume_from_checkpoint = resume_from_checkpoint
        self.lora_config = lora_config
        self.objective = ObjectiveSettings(name=objective) if isinstance(objective, str) else objective
        prompts = {"query_prompt": query_prompt, "passage_prompt": passage_prompt}
        self.quantized = quantized
        self.allow_changes = allow_changes
        self.mining = mining
        self.data_report: BuildReport | None = None
        self.dataset, self.val_dataset = check_arguments(
            self.settings,
            dataset,
            val_dataset,
            model_id=model_id,
            model_output_path=model_output_path,
            loss=loss,
            lora_config=lora_config,
            objective=self.objective,
            continue_from=continue_from,
            pooling=pooling,
            window=window,
            mining=mining,
            on_overlap=on_overlap,
            allow_changes=allow_changes,
            flags={
                "use_all_docs": use_all_docs,
                "resume_from_checkpoint": resume_from_checkpoint,
                "quantized": quantized,
            },
            texts={**prompts, "revision": revision, "cache_folder": cache_folder},
        )
        # absolute, so that a changed working directory changes nothing
        self.model_id = absolute(model_id)
        self.continue_from = None if continue_from is None else absolute(continue_from)
        self.model_output_path = os.path.abspath(os.path.expanduser(model_output_path))
        self._start = StartingModel(
            # an adapter knows its base, unless another place is named
            base_model=None if continue_from is not None and model_id == _DEFAULT_BASE else self.model_id,
            adapter=self.continue_from,
            revision=revision,
            cache_folder=None if cache_folder is None else os.path.abspath(os.path.expanduser(cache_folder)),
            device=self.settings.device,
            trust_remote_code=trust_remote_code,
            pooling=pooling,
            window=window,
            prompts=prompts,
        )
        if self.objective is not None and self.objective.teacher is not None:
            self.objective = replace(self.objective, teacher=absolute(self.objective.teacher))
        self._hold_out_note = ""
        if self.val_dataset is None and val_fraction > 0:
            wanted = {"best_metric": best_metric, "early_stopping_patience": early_stopping_patience}
            self.dataset, self.val_dataset, self._hold_out_note = hold_out(
                self.dataset, val_fraction, seed, self.settings.max_eval_passages, [n for n, v in wanted.items() if v]
            )

    @classmethod
    def from_nodes(
        cls,
        nodes: Sequence[BaseNode],
        model_id: str = _DEFAULT_BASE,
        model_output_path: str = "exp_finetune",
        *,
        val_dataset: EmbeddingQAFinetuneDataset | Any | None = None,
        val_fraction: float = _D.val_fraction,
        query_generators: Iterable[QueryGenerator] | None = None,
        filters: QueryFilterSettings | None = QueryFilterSettings(),  # noqa: B008  # frozen
        epochs: int = _MADE_UP_EPOCHS,
        learning_rate: float = _MADE_UP_RATE,
        seed: int = _D.seed,
        **kwargs: Any,
    ) -> LoraFinetuneEngine:
        """An engine on questions made from nodes, validation held out by source document.

        Args:
            nodes: LlamaIndex nodes, as they will be indexed.
            model_id: As for the engine.
            model_output_path: As for the engine.
            val_dataset: People's questions to judge by, about the same nodes or others; made-up questions that it
                also asks are not trained on. None holds out `val_fraction` of the made-up ones.
            val_fraction: 0 trains without a verdict.
            query_generators: Query generators to run; None runs `TitleQueryGenerator`, and `InverseClozeQueryGenerator`
                on nodes without a title. Neither needs an LLM.
            filters: Which questions are dropped, see `QueryFilterSettings`; None keeps all. Where an LLM wrote some,
                the base is loaded to see whether it finds their passages.
            epochs: 2, not 4. On 1,200 documents of medquad_train, judged by people's questions, the first epoch
                gained 0.019 nDCG@10 and a second one 0.001 more.
            learning_rate: 5e-4, not 1e-3. At 1e-3, with inverse cloze on every node, documents of medquad_test lost
                0.026 on people's questions.
            seed: Of question making, split and training.
            **kwargs: Everything else that the engine takes.

        Raises:
            SplitError: The nodes come from one document, so that none can be held out; pass `val_dataset`, or
                `val_fraction=0` to train without a verdict.
            DatasetError: No question could be made.
            ConfigError: Wrong arguments.
        """
        makers = None if query_generators is None else list(query_generators)
        kwargs |= {"val_fraction": val_fraction, "epochs": epochs, "learning_rate": learning_rate, "seed": seed}
        if val_dataset is not None:
            # Nodes that are searched may be trained on: only their questions must not be known.
            val_dataset = EmbeddingQAFinetuneDataset.coerce(val_dataset, "val_dataset")
            kwargs.setdefault("on_overlap", "allow")
        # everything that can be wrong is found before an LLM is paid
        judge = rehearsal_set("v") if val_dataset is None and val_fraction else val_dataset
        rehearsal = cls(rehearsal_set("t"), model_id, model_output_path, val_dataset=judge, **kwargs)
        if rehearsal.quantized:
            check_device(rehearsal.settings.device, quantized=True)
        dataset, report = dataset_from_nodes(
            nodes, makers, seed=seed, filters=filters, embed_model=rehearsal._start.embedding
        )
        if val_dataset is not None:
            known = {normalise(text) for text in val_dataset.queries.values()}
            unknown = [i for i, text in dataset.queries.items() if normalise(text) not in known]
            dataset = dataset.subset(unknown, dataset.corpus)
        elif val_fraction:
            dataset, val_dataset = split_by_source(dataset, val_fraction, seed=seed, max_passages=_D.max_eval_passages)
            report = replace(report, split=split_report(dataset, val_dataset))
        engine = cls(dataset, model_id, model_output_path, val_dataset=val_dataset, **kwargs)
        engine.data_report = report
        return engine

    def finetune(self, *, callbacks: Sequence[TrainerCallback] = (), **train_kwargs: Any) -> FinetuneResult:
        """Train, keep what evaluated best, write the adapter directory.

        The base is evaluated first and is a candidate: if no later step beats it, the adapter that is written is
        the untrained one, `best_step` is 0, and a warning says so. Of several steps that beat it and lie within a
        standard error of the best, the latest is kept.

        Ctrl-C and SIGTERM finish the step, save a checkpoint, then stop; `resume_from_checkpoint=True` goes on from
        it. Under torchrun or accelerate launch all processes train together and the first one writes.

        Args:
            callbacks: More of transformers' callbacks, in a list.
            **train_kwargs: More of sentence-transformers' training arguments, by their own names: e.g.
                `gradient_accumulation_steps`, `gradient_checkpointing`, `lr_scheduler_type="cosine"`,
                `max_grad_norm`, `report_to="tensorboard"`. Those that the engine has an argument for are refused.

        Returns:
            Measures of base and tuned, verdict, path.

        Raises:
            ModelNotFoundError: The base cannot be had.
            UnsafeCheckpointError: The base is stored as a pickle only.
            ConfigError: Callbacks or training arguments are wrong, which is found out before anything is loaded; or
                length, LoRA or loss do not fit the base.
            DeviceMemoryError: The device's memory does not hold a step.
            NonFiniteLossError: The loss became NaN or infinite; no adapter was written.
            OutputDirectoryError: The adapter could not be written; what was there before is unchanged.
            KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
        """
        from llama_index_lora_embed.models import adapter_directory
        from llama_index_lora_embed.training import distributed
        from llama_index_lora_embed.training.arguments import check_user_arguments
        from llama_index_lora_embed.training.checkpointing import checkpoints

        check_device(self.settings.device, self.quantized)
        pairs = isinstance(self.dataset, LabelledPairs)
        asked = check_user_arguments(self.settings, callbacks, train_kwargs, self.objective, self.loss, pairs)
        distributed.join(self.settings.device)
        target = adapter_directory.check_output(self.model_output_path)
        run_dir = target.with_name(target.name + ".run")
        with checkpoints.only_run(run_dir):
            result = self._train_and_write(target, run_dir, asked)
        # what a user must not overlook
        if distributed.is_main() and (result.verdict.value != "BETTER" or result.best_step == 0):
            warn_user(result.summary)
        return result

    def _train_and_write(self, target: Path, run_dir: Path, asked: UserArguments) -> FinetuneResult:
        from llama_index_lora_embed.engines.evaluator import default_metric, evaluate_model
        from llama_index_lora_embed.evaluation import compare
        from llama_index_lora_embed.training import distributed
        from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
        from llama_index_lora_embed.training.efficiency.quantization import onto_full_precision
        from llama_index_lora_embed.training.iterative_mining import train_with_mining

        settings, start, judge = asked.settings, self._start, self.val_dataset
        model, base, parent = start.load(self.quantized)
        more = {"use_all_docs": self.use_all_docs, "quantized": self.quantized, **start.recorded()}
        recorded = Recorded(
            settings, self.dataset, judge, self.lora_config, self.loss, self.objective, self.mining, more
        )
        outcome, mined = train_with_mining(
            model,
            self.dataset,
            settings,
            run_dir,
            self.mining,
            best=CheckpointSelection(
                None
                if judge is None
                else partial(
                    evaluate_model,
                    dataset=judge,
                    precision=settings.precision,
                    fused_attention=settings.fused_attention,
                    show_progress=settings.show_progress_bar,
                ),
                settings.best_metric or default_metric(judge),
            ),
            lora_config=self.lora_config,
            loss=self.loss,
            objective=self.objective,
            use_all_docs=self.use_all_docs,
            resume=self.resume_from_checkpoint,
            allow_changes=self.allow_changes,
            recorded=recorded.as_values(base, parent, asked.train_kwargs),
            callbacks=asked.callbacks,
            train_kwargs=asked.train_kwargs,
        )
        best = outcome.best
        if self.quantized:
            model = onto_full_precision(model, best, lambda: start.load_base(base, quantized=False))
        comparison = None
        if judge is not None:
            comparison = compare(best.base, best.best)  # type: ignore[arg-type]  # what evaluate_model returned
        summary = summarise(comparison, best.best_step, len(best.history), self._hold_out_note, parent is not None)
        run = Run(model, base, parent, self.dataset, settings, outcome, summary, comparison, self.mining, mined)
        fingerprint = distributed.on_main(lambda: run.write(target, run_dir))
        return run.result(str(target), fingerprint, self.data_report, judge)

    def get_finetuned_model(self, **model_kwargs: Any) -> BaseEmbedding:
        """The tuned model, read back from the adapter directory.

        Args:
            **model_kwargs: As for `LoraEmbedding`.

        Raises:
            OutputDirectoryError: `finetune()` has not written the directory yet.
            AdapterError: The directory was damaged since.
        """
        from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

        if not os.path.exists(os.path.join(self.model_output_path, MANIFEST_NAME)):
            raise OutputDirectoryError(
                f"model_output_path {self.model_output_path!r} without an adapter in it",
                "the directory that finetune() writes",
                "Call engine.finetune() first.",
            )
        defaults = {
            "device": self.settings.device,
            "trust_remote_code": self.settings.trust_remote_code,
            "cache_folder": self._start.cache_folder,
        }
        return LoraEmbedding(self.model_output_path, **{**defaults, **model_kwargs})


register_legacy_base_class(LoraFinetuneEngine)
