"""`train`, `tune`, `doctor` and `config-schema`."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_index_lora_embed.cli.command import ERROR, InterruptedWithHint, Outcome, command
from llama_index_lora_embed.cli.flags import takes_config
from llama_index_lora_embed.cli.options import (
    LLM,
    LLM_OPTIONS,
    REQUIRE,
    exit_code,
    llm_of,
    takes_launcher,
)
from llama_index_lora_embed.config import FinetuneConfig

DRY_RUN = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what the run will do and how long it will take; train and write nothing."),
]

SPACE = Annotated[
    str | None,
    typer.Option(
        metavar="YAML",
        help="Settings with their values, such as '{lora_r: [8, 16], learning_rate: {low: 0.0001, high: 0.001}}'. "
        "By default learning rate, rank, batch size and temperature.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(
        app,
        "lora-embed train --config run.yaml",
        "lora-embed train --config run.yaml --dry-run",
        "lora-embed train --config run.yaml --epochs 2 --model-output-path runs/short --require no-worse",
        "lora-embed train --dataset train.json --val-dataset val.json --model-id base --model-output-path runs/flags",
        "lora-embed train --nodes documents --model-id base --model-output-path runs/nodes --json",
        "lora-embed train --config run.yaml --launcher torchrun --num-workers 2",
    )(train)
    command(
        app,
        "lora-embed tune --config run.yaml --trials 2 --folds 2 --space '{lora_r: [4, 8], temperature: [0.02, 0.05]}'",
    )(tune)
    command(app, "lora-embed config-schema", name="config-schema")(config_schema)
    command(app, "lora-embed doctor --config run.yaml", "lora-embed doctor --model-id base")(doctor)


@takes_config()
@takes_launcher
def train(
    config: FinetuneConfig,
    *,
    dry_run: DRY_RUN = False,
    llm: LLM = None,
    llm_options: LLM_OPTIONS = None,
    require: REQUIRE = None,
    launcher: Any = None,
) -> Outcome:
    """Train an adapter, evaluate it against the base, and write it.

    The run is what a FinetuneConfig says: a file, flags over it, or flags alone. Every flag has the name of its field,
    with or without its group, so that --training.epochs is --epochs. Lists and mappings are written in YAML.
    """
    from llama_index_lora_embed.engines import run_finetune
    from llama_index_lora_embed.engines.dry_run import dry_run as planned
    from llama_index_lora_embed.engines.launcher import ProcessLauncher
    from llama_index_lora_embed.evaluation import Verdict
    from llama_index_lora_embed.training.callbacks import ProgressLines

    if dry_run:
        plan = planned(config, llm=llm_of(llm, llm_options))
        return Outcome(plan, str(plan))
    elsewhere = launcher is not None and not isinstance(launcher, ProcessLauncher)
    bars = sys.stderr.isatty()
    if not bars:
        config = config.replace(training=config.training.replace(show_progress_bar=False))
    for verdict in Verdict:  # the result says it
        warnings.filterwarnings("ignore", message=verdict.value)
    started = time.time()
    try:
        result = run_finetune(
            config,
            llm=llm_of(llm, llm_options),
            callbacks=[] if bars or elsewhere else [ProgressLines()],
            launcher=launcher,
        )
    except KeyboardInterrupt:
        again = "The same command with --resume-from-checkpoint true goes on from the last checkpoint in the storage."
        raise InterruptedWithHint(again if elsewhere else _how_to_resume(config, started)) from None
    return Outcome(result, str(result), *exit_code(result.comparison, require))


@takes_config()
@takes_launcher
def tune(
    config: FinetuneConfig,
    *,
    space: SPACE = None,
    trials: Annotated[int, typer.Option(help="Choices of settings to try.")] = 20,
    folds: Annotated[int, typer.Option(help="Parts of the training data, each evaluated on once per choice.")] = 3,
    require: REQUIRE = None,
    launcher: Any = None,
) -> Outcome:
    """Choose settings of the training on folds of the training data, and train with them.

    The validation data has no part in the choice, and gives the verdict. The same command goes on with a sweep that
    was interrupted.
    """
    from llama_index_lora_embed.config.files import parse_yaml_mapping
    from llama_index_lora_embed.engines.tune import tune as tuned

    config = config.replace(training=config.training.replace(show_progress_bar=False))
    values = None if space is None else parse_yaml_mapping(space, "--space")
    try:
        result = tuned(config, values, trials=trials, folds=folds, launcher=launcher, show=print)
    except KeyboardInterrupt:
        raise InterruptedWithHint("The same command goes on with the sweep.") from None
    return Outcome(result, str(result), *exit_code(result.comparison, require))


def _how_to_resume(config: FinetuneConfig, started: float) -> str:
    from llama_index_lora_embed.training.checkpointing.checkpoints import latest_checkpoint

    path = Path(config.output.model_output_path).expanduser()
    newest = latest_checkpoint(path.with_name(f"{path.name}.run"))
    if newest is None or newest.stat().st_mtime < started:
        return "No step was taken yet, so there is no checkpoint."
    return f"The checkpoint {newest} is kept; the same command with --resume-from-checkpoint true goes on from it."


@takes_config("preset", "data", "base", "training", "output")
def doctor(config: FinetuneConfig) -> Outcome:
    """Look at versions, hardware, precision, disk, model and data: what a run will do, and how long it will take.

    The time comes from a second of work that is measured now. Exit code 1 says that a run would fail.
    """
    from llama_index_lora_embed.engines.doctor import examine

    found = examine(config)
    return Outcome(found, str(found), ERROR if found.problems else 0)


def config_schema() -> Outcome:
    """Print the JSON schema of a configuration file, for editors, forms and services."""
    import json

    schema = FinetuneConfig.model_json_schema()
    return Outcome(schema, json.dumps(schema, indent=2))
