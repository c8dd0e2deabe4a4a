"""`tune`: a sweep over settings of the training, chosen on folds, with the optimism of the choice reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.config.space import DEFAULT_SPACE, Range, Space, checked_space
from llama_index_lora_embed.core.errors import ConfigError, DeviceMemoryError, NonFiniteLossError
from llama_index_lora_embed.core.files import replace_directory, staging_beside, write_json
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data.training_data import folds_of
from llama_index_lora_embed.engines.launcher import ProcessLauncher, check_numbers
from llama_index_lora_embed.engines.run import FinetuneRun, run_finetune, run_of
from llama_index_lora_embed.evaluation.metrics import metric_label

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from llama_index_lora_embed.data.training_data import TrainingData
    from llama_index_lora_embed.engines.launcher import Launcher
    from llama_index_lora_embed.engines.result import FinetuneResult
    from llama_index_lora_embed.evaluation import Comparison

_FOLDS, _ERROR = "folds", "error"  # what a trial records


@dataclass(frozen=True)
class Trial:
    """A choice of settings, and how it did.

    Attributes:
        number: From 0.
        values: The settings by name.
        base: The metric of the base on each fold.
        tuned: The metric of the tuned model on each fold; empty where training failed.
        error: Why it failed.
    """

    number: int
    values: dict[str, Any]
    base: tuple[float, ...]
    tuned: tuple[float, ...]
    error: str | None = None

    @property
    def gains(self) -> tuple[float, ...]:
        """Tuned minus base on each fold."""
        return tuple(after - before for before, after in zip(self.base, self.tuned, strict=True))


@dataclass(frozen=True)
class TuneResult:
    """The result of a sweep; print it.

    Attributes:
        values: The settings that were chosen: those with the highest mean over the folds.
        trials: All that were tried.
        metric: What they were compared by.
        gain: Of the chosen settings over the base, the mean over the folds on which they were chosen.
        nested_gain: What such a choice gains on a fold that had no part in it: for each fold, the settings that are
            best on the others are taken, and their gain on it counts (Varma and Simon 2006, BMC Bioinformatics 7:91).
        result: Of the run with the chosen settings on all training data.
        comparison: Of its adapter with the base, on the validation data that no choice has seen, neither of settings
            nor of steps.
    """

    values: dict[str, Any]
    trials: tuple[Trial, ...]
    metric: str
    gain: float
    nested_gain: float
    result: FinetuneResult
    comparison: Comparison

    @property
    def optimism(self) -> float:
        """How much of the gain is due to choosing and measuring on the same folds: `gain` minus `nested_gain`."""
        return self.gain - self.nested_gain

    def __str__(self) -> str:
        name = metric_label(self.metric)
        lines = [
            f"{self.comparison} This data had no part in any choice.",
            f"chosen of {len(self.trials)}: {_named(self.values)}",
            f"{name} on the folds it was chosen on: {self.gain:+.3f}; on folds that had no part in the choice: "
            f"{self.nested_gain:+.3f} (optimism {self.optimism:+.3f})",
        ]
        for trial in sorted(self.trials, key=lambda trial: -_mean(trial.tuned)):
            lines.append(f"  {trial.error or f'{_mean(trial.gains):+.3f}'}  {_named(trial.values)}")
        return "\n".join([*lines, f"adapter in {self.result.adapter_path}"])


def tune(
    config: FinetuneConfig,
    space: Space | Mapping[str, Any] | None = None,
    *,
    dataset: TrainingData | Any | None = None,
    val_dataset: TrainingData | Any | None = None,
    trials: int = 20,
    folds: int = 3,
    launcher: Launcher | None = None,
    show: Callable[[str], None] | None = None,
) -> TuneResult:
    """Choose settings of the training by cross-validation, and train with them.

    The validation data, given or held out, has no part in any choice. The training data is divided into folds by source
    document; each choice of settings is trained on all folds but one and evaluated on that one, in turn. With the
    settings of the highest mean, all training data is trained on, of which a tenth selects the step, and the adapter is
    compared with the base on the validation data. Settings are proposed by Optuna (TPE).

    A sweep lies in `<model_output_path>.tune`. The same call goes on with one that was killed, in the middle of a run
    from its last checkpoint, and ends as it would have ended without that.

    Args:
        config: The run; its data and everything that is not in the space.
        space: Fields of `TrainingSettings` with a list of values or a `Range` each; None for `DEFAULT_SPACE`.
        dataset: Training data instead of the configuration's.
        val_dataset: Validation data instead of the configuration's.
        trials: How many choices of settings are tried, each in `folds` runs.
        folds: Number of folds.
        launcher: As for `run_finetune`.
        show: Called with a line about each trial.

    Raises:
        ConfigError: Wrong arguments; or the folder holds the sweep of another configuration, space or data.
        SplitError: Too few documents for the folds.
        MissingExtraError: The extra "tune" is not installed.
        LoraEmbedError: As `run_finetune`.
    """
    require("optuna")
    check_numbers(trials=(trials, 1), folds=(folds, 2))
    checked = checked_space(DEFAULT_SPACE if space is None else space, config)
    run = run_of(config, dataset=dataset, val_dataset=val_dataset)
    sweep = _Sweep(run, checked, folds, launcher)
    with sweep.locked():
        while (done := len(sweep.finished())) < trials:
            trial = sweep.next()
            if show is not None:
                show(f"trial {done + 1} of {trials}: {_told(trial)}")
        chosen, gain, nested_gain = _choice(sweep.trials()[:trials])
        if show is not None:
            show(f"training with the settings of trial {chosen.number + 1}")
        result, comparison = sweep.final(chosen)
        return TuneResult(
            chosen.values, tuple(sweep.trials()[:trials]), sweep.metric, gain, nested_gain, result, comparison
        )


class _Sweep:
    """A sweep on disk: `study.db` with the trials, `sweep.json` with what they are of, and the runs."""

    def __init__(
        self, run: FinetuneRun, space: dict[str, tuple[Any, ...] | Range], folds: int, launcher: Launcher | None
    ) -> None:
        from llama_index_lora_embed.engines.evaluator import default_metric
        from llama_index_lora_embed.models.adapter_directory import check_output

        config = run.config
        if run.val_dataset is None:
            raise ConfigError(
                "a sweep without validation data",
                "data that no choice sees",
                "Set val_fraction above 0, or name a val_dataset.",
            )
        self.run, self.space, self.launcher = run, space, launcher
        self.metric = config.training.best_metric or default_metric(run.val_dataset)
        self.target = check_output(config.output.model_output_path)
        self.folder = self.target.with_name(f"{self.target.name}.tune")
        settings = config.training
        self.folds = folds_of(run.dataset, folds, seed=settings.seed, max_passages=config.data.max_eval_passages)

    def locked(self) -> Any:
        """A context in which no other process works on the sweep; raises a ConfigError if it is another one's."""
        from llama_index_lora_embed.training.checkpointing.checkpoints import only_run

        self._check_record()
        return only_run(self.folder)

    def _check_record(self) -> None:
        run = self.run
        fixed = {name: value for name, value in run.config.result_affecting().items() if name not in self.space}
        space = {
            name: vars(values) if isinstance(values, Range) else list(values) for name, values in self.space.items()
        }
        record = {
            **{"config": fixed, "base": run.config.base.model_dump(mode="json"), "space": space},
            **{"dataset": run.dataset.order_digest(), "folds": len(self.folds)},
            "val_dataset": None if run.val_dataset is None else run.val_dataset.order_digest(),
        }
        record = json.loads(json.dumps(record, default=str))
        file = self.folder / "sweep.json"
        if file.exists():
            then = json.loads(file.read_text(encoding="utf-8"))
            if changed := [name for name, value in record.items() if then.get(name) != value]:
                raise ConfigError(
                    f"a sweep with another {', '.join(changed)} in {str(self.folder)!r}",
                    "the same configuration, space and data",
                    "Restore them, choose another model_output_path, or remove the folder.",
                )
        else:
            write_json(file, record)

    @property
    def study(self) -> Study:
        """Optuna's study, on disk."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.create_study(
            study_name="tune",
            storage=f"sqlite:///{self.folder / 'study.db'}",
            direction="maximize",
            load_if_exists=True,
        )

    def finished(self) -> list[FrozenTrial]:
        """The trials that have ended, with a value or without."""
        return [trial for trial in self.study.trials if trial.state.is_finished()]

    def trials(self) -> list[Trial]:
        """The same as plain values."""
        found: list[Trial] = []
        for trial in self.finished():
            scores = trial.user_attrs.get(_FOLDS, []) if trial.value is not None else []
            base, tuned = ([score[side] for score in scores] for side in ("base", "tuned"))
            error = trial.user_attrs.get(_ERROR)
            found.append(Trial(len(found), dict(trial.params), tuple(base), tuple(tuned), error))
        return found

    def next(self) -> Trial:
        """Finish the trial that was begun, or a new one."""
        import optuna

        study = self.study
        begun = [trial for trial in study.trials if not trial.state.is_finished()]
        trial = optuna.trial.Trial(study, begun[0]._trial_id) if begun else study.ask()
        values = {name: self._suggest(study, trial, name) for name in self.space}
        scores = list(trial.user_attrs.get(_FOLDS, []))
        folder = self.folder / f"trial-{trial.number}"
        try:
            for number in range(len(scores), len(self.folds)):
                train, val = self.folds[number]
                result = self._train(values, folder / f"fold-{number}", train, val)
                scores.append({"base": result.base_metrics[self.metric], "tuned": result.tuned_metrics[self.metric]})
                trial.set_user_attr(_FOLDS, scores)
            study.tell(trial, _mean([score["tuned"] for score in scores]))
        except (NonFiniteLossError, DeviceMemoryError) as error:  # of these settings, not of all
            trial.set_user_attr(_ERROR, f"{type(error).__name__}: {error.got}")
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        shutil.rmtree(folder, ignore_errors=True)
        return self.trials()[-1]

    def _suggest(self, study: Study, trial: Any, name: str) -> Any:
        """A value for a setting; what was suggested before a kill is suggested again."""
        import optuna

        # the sampler's random state is nowhere on disk, so that it must not matter what was drawn before
        seed = self.run.config.training.seed + 1000 * trial.number + list(self.space).index(name)
        study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32)
        values = self.space[name]
        if not isinstance(values, Range):
            return trial.suggest_categorical(name, values)
        if isinstance(values.low, int) and isinstance(values.high, int):
            return trial.suggest_int(name, values.low, values.high, log=values.log)
        return trial.suggest_float(name, values.low, values.high, log=values.log)

    def _train(
        self, values: Mapping[str, Any], output: Path, dataset: TrainingData, val_dataset: TrainingData | None
    ) -> FinetuneResult:
        import warnings

        from llama_index_lora_embed.evaluation import Verdict

        run = self.run
        data = {"dataset": None, "nodes": None, "val_dataset": None, "query_generators": None}
        settings = dict(values)
        if self.launcher is None or isinstance(self.launcher, ProcessLauncher):  # others keep checkpoints by themselves
            settings |= {"save_checkpoints": True, "checkpoint_save_total_limit": 1}
        config = run.config.replace(
            data=run.config.data.replace(**data),
            training=run.config.training.replace(**settings),
            output=run.config.output.replace(model_output_path=str(output), resume_from_checkpoint=True),
        )
        with warnings.catch_warnings():
            for verdict in Verdict:  # of one of many
                warnings.filterwarnings("ignore", message=verdict.value)
            return run_finetune(config, dataset=dataset, val_dataset=val_dataset, launcher=self.launcher)

    def final(self, chosen: Trial) -> tuple[FinetuneResult, Comparison]:
        """The run with the chosen settings on all training data, and its adapter compared with the base."""
        from llama_index_lora_embed.embedding.open_embedding import open_base, open_embedding
        from llama_index_lora_embed.evaluation.models import compare_models, comparison_of

        output, device = self.folder / f"final-{chosen.number}", self.run.config.training.device
        result = self._train(chosen.values, output, self.run.dataset, None)
        assert self.run.val_dataset is not None
        models = (open_base(str(output), device=device), open_embedding(str(output), device=device))
        comparison = comparison_of(compare_models(*models, self.run.val_dataset))
        with staging_beside(self.target) as staging:
            shutil.copytree(output, staging / "adapter")
            replace_directory(staging / "adapter", self.target)
        return replace(result, adapter_path=str(self.target)), comparison


def _choice(trials: Sequence[Trial]) -> tuple[Trial, float, float]:
    """The trial with the highest mean, its gain over the base, and the gain of such choices on other folds."""
    complete = [trial for trial in trials if trial.tuned]
    if not complete:
        raise ConfigError(
            f"{len(trials)} trial(s) that all failed, the last with {trials[-1].error}",
            "settings that can be trained",
            "Lower the learning rates or the batch sizes of the space.",
        )
    scores = np.array([trial.tuned for trial in complete])
    gains = np.array([trial.gains for trial in complete])
    best = int(scores.mean(axis=1).argmax())
    others = [np.delete(scores, fold, axis=1).mean(axis=1).argmax() for fold in range(scores.shape[1])]
    nested = float(np.mean([gains[choice, fold] for fold, choice in enumerate(others)]))
    return complete[best], float(gains[best].mean()), nested


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("-inf")


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _told(trial: Trial) -> str:
    outcome = trial.error or f"{_mean(trial.tuned):.3f} ({_mean(trial.gains):+.3f} over the base)"
    return f"{_named(trial.values)}: {outcome}"
