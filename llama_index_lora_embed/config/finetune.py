"""`FinetuneConfig`: everything that decides a run, in one frozen, serialisable object."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from llama_index_lora_embed.config.base import (
    NOT_IN_RESULT,
    AtLeast1,
    ModelText,
    PathText,
    Settings,
    ShareBelow1,
    config_error,
)
from llama_index_lora_embed.config.files import read_values
from llama_index_lora_embed.config.mining import MiningSettings
from llama_index_lora_embed.config.objective import ObjectiveSettings
from llama_index_lora_embed.config.questions import QueryFilterSettings, QueryGeneratorSettings
from llama_index_lora_embed.config.training import TrainingSettings
from llama_index_lora_embed.core.files import absolute

Pooling = Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]
POOLING_MODES: tuple[str, ...] = get_args(Pooling)
SHORTEST_WINDOW = 16
"""Tokens; a shorter window would hold little more than its special tokens and the prompt."""
DEFAULT_BASE = "BAAI/bge-small-en"
DEFAULT_WINDOW: int | Literal["auto"] | None = "auto"


class DataSettings(Settings):
    """What is trained on and evaluated with; files by reference."""

    dataset: Annotated[PathText | None, NOT_IN_RESULT] = None
    """Training data: JSON of an `EmbeddingQAFinetuneDataset`, or a file of labelled pairs. None where `run_finetune`
    is given the data itself."""
    val_dataset: Annotated[PathText | None, NOT_IN_RESULT] = None
    """The same for validation, best with human-written queries; None holds out `val_fraction`."""
    kind: Annotated[Literal["queries", "pairs"], NOT_IN_RESULT] = "queries"
    """What `dataset` and `val_dataset` hold: queries and passages, or labelled pairs."""
    nodes: Annotated[PathText | None, NOT_IN_RESULT] = None
    """Instead of `dataset`: a folder of documents, or a JSONL file of LlamaIndex nodes, for which queries are
    generated."""
    query_generators: Annotated[tuple[QueryGeneratorSettings, ...] | None, NOT_IN_RESULT] = None
    """Generators to run on `nodes`; None takes an LLM's queries where an LLM is given, else titles and inverse
    cloze."""
    filters: Annotated[QueryFilterSettings | None, NOT_IN_RESULT] = QueryFilterSettings()
    """Which generated queries are dropped; None keeps all."""
    val_fraction: ShareBelow1 = 0.1
    """Share of the queries, by source document, held out where there is no `val_dataset`; 0 for none."""
    max_eval_passages: AtLeast1 = 500
    """Passages searched when the validation set is held out: those with queries, and others up to this number.
    Limits the time of an evaluation."""
    on_overlap: Annotated[Literal["drop", "raise"], NOT_IN_RESULT] = "drop"
    """What to do about a `val_dataset` that shares something with training. "drop" drops its queries (pairs) that are
    training queries (pairs) too, and holds out `val_fraction` instead if none is left; passages that are trained on
    with other queries stay, and the verdict names their share. "raise" refuses shared queries, passages and source
    documents, and shared texts of pairs."""
    use_all_docs: bool = False
    """Train a query with all its relevant passages instead of the first."""


class BaseModelSettings(Settings):
    """The model that training starts from."""

    model_id: Annotated[ModelText, NOT_IN_RESULT] = DEFAULT_BASE
    """Base model: Hub id or folder."""
    continue_from: Annotated[ModelText | None, NOT_IN_RESULT] = None
    """Adapter directory or Hub id to train further, on its own base. It stands in for the base: as step 0, and in
    the comparison; the manifest of the new directory names it as the parent."""
    revision: Annotated[str | None, NOT_IN_RESULT] = None
    """Commit on the Hub, of the adapter if `continue_from` is given, else of the base."""
    cache_folder: Annotated[PathText | None, NOT_IN_RESULT] = None
    """Cache of huggingface_hub."""
    query_prompt: str | None = None
    """Overrides the base's query prompt."""
    passage_prompt: str | None = None
    """Overrides the base's passage prompt."""
    pooling: Pooling | None = None
    """Overrides the base's pooling; for an adapter to continue, only if it is of peft alone and records none."""
    window: Annotated[int, Field(ge=SHORTEST_WINDOW)] | Literal["auto"] | None = DEFAULT_WINDOW
    """Read texts that are longer than this many tokens whole, in windows of this length whose vectors are averaged;
    None truncates them at `max_seq_length`. "auto" takes windows as long as the base's positions allow where these
    truncate many of the passages (`training.lengths.choose_window`), and none elsewhere; result, manifest and
    checkpoints record which. An adapter that is trained further keeps its own."""
    quantized: bool = False
    """Train on the base in 4 bit (QLoRA), which needs a CUDA GPU and the extra `quantized`."""


class OutputSettings(Settings):
    """Where the adapter is written, and how a run continues."""

    model_output_path: Annotated[PathText, NOT_IN_RESULT] = "exp_finetune"
    """Adapter directory to write. An adapter there is replaced at the end and kept as `<path>.previous`; any other
    content is refused."""
    resume_from_checkpoint: Annotated[bool | PathText, NOT_IN_RESULT] = False
    """True continues from the newest checkpoint, if there is one; a path from that checkpoint of
    `<model_output_path>.run`."""
    allow_changes: Annotated[
        tuple[str, ...],
        NOT_IN_RESULT,
        BeforeValidator(lambda v: tuple(v) if isinstance(v, (list, set, frozenset)) else v),
    ] = ()
    """Names of data and fields that may differ from the checkpoint's on a resume; the error that refuses a resume
    lists them."""


@dataclass(frozen=True)
class Preset:
    """What `preset` sets, by the fields' own names."""

    epochs: int = TrainingSettings().epochs
    batch_size: int | Literal["auto"] = TrainingSettings().batch_size
    lora_layers: float = TrainingSettings().lora_layers
    window: int | Literal["auto"] | None = DEFAULT_WINDOW
    val_fraction: float = DataSettings().val_fraction


PRESETS = {
    "fast": Preset(epochs=2, batch_size=32, lora_layers=0.5, window=None),
    "balanced": Preset(),
    "best": Preset(epochs=8, val_fraction=0.05),
}
"""Presets by name; "balanced" is the defaults (benchmarks/README.md, "Experiments on quality")."""


class FinetuneConfig(Settings):
    """Everything that decides a run.

    `run_finetune(config)` runs it. `LoraFinetuneEngine` builds one from its arguments, which have the names of the
    fields.

    Example:
        >>> config = FinetuneConfig.from_arguments(model_id="BAAI/bge-small-en-v1.5", epochs=2)
        >>> config.training.epochs, config.base.model_id
        (2, 'BAAI/bge-small-en-v1.5')
    """

    preset: Annotated[Literal["fast", "balanced", "best"], NOT_IN_RESULT] = "balanced"
    """Values for a few fields that are not given (`PRESETS`): "fast" trains half of the layers for half of the time,
    "balanced" stands for the defaults, "best" takes longer. The defaults for heuristic queries win over it."""
    data: DataSettings = DataSettings()
    """What is trained on and evaluated with."""
    base: BaseModelSettings = BaseModelSettings()
    """The base, or the adapter that is trained further."""
    lora_config: dict[str, Any] | None = None
    """Fields of `peft.LoraConfig`; None adapts all linear layers at rank `lora_r`."""
    objective: Annotated[
        ObjectiveSettings, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else {} if v is None else v)
    ] = ObjectiveSettings()
    """What is trained: `ObjectiveSettings`, or the name of an objective."""
    mining: MiningSettings | None = None
    """Mine hard negatives from the training passages before training, and with `rounds` above 1 again with the tuned
    model; None mines none, or with a teacher those of `MiningSettings.for_teacher`. A step takes longer by the share
    of negatives it holds."""
    teacher: Annotated[ModelText | None, NOT_IN_RESULT] = None
    """Cross-encoder with one score (folder, or id on the Hub) that scores each query's passage and hard negatives
    before training; its scores are learnt (`objective`), and kept in `<model_output_path>.teacher.jsonl`. Checkpoints
    record the digest of the scores. With `tune="query"`: a model that was tuned on both sides (an adapter's folder or
    Hub id); the queries learn to find in the index what it finds, without labels, and from sentences of the passages,
    too."""
    training: TrainingSettings = TrainingSettings()
    """How the adapter is trained."""
    output: OutputSettings = OutputSettings()
    """Where the adapter is written."""

    @model_validator(mode="after")
    def _fill_in_preset(self) -> FinetuneConfig:
        """Give fields that are not set the preset's values. They still count as not set, so that it can be changed."""
        for field, value in asdict(PRESETS[self.preset]).items():
            group = getattr(self, _GROUP_OF[field])
            if field not in group.model_fields_set and getattr(group, field) != value:
                filled = group.model_copy(update={field: value})
                filled.model_fields_set.discard(field)
                self.__dict__[_GROUP_OF[field]] = filled  # the configuration is frozen
        return self

    @classmethod
    def from_arguments(cls, **arguments: Any) -> FinetuneConfig:
        """A configuration from flat arguments: each field of `data`, `base`, `training` and `output` by its own name.

        Raises:
            ConfigError: Some are unknown or wrong; all of them are named.
        """
        values: dict[str, Any] = {}
        for name, value in arguments.items():
            group = _GROUP_OF.get(name)
            (values if group is None else values.setdefault(group, {}))[name] = value
        return cls.validated(values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> FinetuneConfig:
        """A configuration from a YAML (`.yaml`, `.yml`), TOML (`.toml`) or JSON (`.json`) file.

        Paths in the file are relative to the working directory.

        Raises:
            ConfigError: The file cannot be read, or some values are wrong; `.problems` names all of them by their path.
        """
        return cls.from_json_values(read_values(path))

    @classmethod
    def from_json_values(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """A configuration from what a file holds: nested mappings, with lists where fields are tuples.

        Raises:
            ConfigError: Some values are wrong; `.problems` names all of them by their path.
        """
        try:
            return cls.model_validate_json(json.dumps(values, default=str))  # JSON has lists where fields are tuples
        except ValidationError as error:
            raise config_error(cls, error) from None

    def with_absolute_paths(self) -> FinetuneConfig:
        """The same run from any working directory; Hub ids stay as they are."""
        base, output = self.base, self.output
        cache, resume = base.cache_folder, output.resume_from_checkpoint
        return self.replace(
            base=base.replace(
                model_id=absolute(base.model_id),
                continue_from=None if base.continue_from is None else absolute(base.continue_from),
                cache_folder=None if cache is None else os.path.abspath(os.path.expanduser(cache)),
            ),
            teacher=None if self.teacher is None else absolute(self.teacher),
            output=output.replace(
                model_output_path=os.path.abspath(os.path.expanduser(output.model_output_path)),
                resume_from_checkpoint=resume if isinstance(resume, bool) else absolute(resume),
            ),
        )

    def for_teacher(self) -> FinetuneConfig:
        """This run with what a teacher needs where it says nothing: "distillation", and hard negatives to score."""
        objective = self.objective if self.objective.name else self.objective.replace(name="distillation")
        progress = self.training.show_progress_bar
        mining = self.mining or MiningSettings.for_teacher(show_progress_bar=progress)
        return self.replace(objective=objective, mining=mining)

    def result_affecting(self) -> dict[str, Any]:
        """Everything here that decides which weights are trained, as JSON values by the fields' own names.

        Checkpoints record it, a resumed run is compared with it, and the manifest of the adapter holds it. Data, base,
        parent and the teacher's scores are not in it: they are recorded by their digests.
        """
        groups = (self.data, self.base, self.training)
        return {
            **{name: value for group in groups for name, value in group.result_affecting().items()},
            "objective": self.objective.result_affecting(),
            "mining": None if self.mining is None else self.mining.result_affecting(),
            "lora_config": self.lora_config,
        }

    def digest(self) -> str:
        """SHA-256 (64 hexadecimal digits) of the fields that decide which weights are trained."""
        return hashlib.sha256(json.dumps(self.result_affecting(), sort_keys=True, default=str).encode()).hexdigest()


FLAT_GROUPS: dict[str, type[Settings]] = {
    "data": DataSettings, "base": BaseModelSettings, "training": TrainingSettings, "output": OutputSettings
}  # fmt: skip
"""Settings whose fields are flat arguments by their own names."""
_GROUP_OF = {name: group for group, settings in FLAT_GROUPS.items() for name in settings.model_fields}
