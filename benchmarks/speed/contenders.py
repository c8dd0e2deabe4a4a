"""The contenders: letter, file, environment and title."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        module: File in this folder with `run(job, recorder)`.
        environment: A name in `environments.REQUIREMENTS`; None for the interpreter that runs the benchmark.
        title: Description in one line.
    """

    module: str
    environment: str | None
    title: str


CONTENDERS = {
    "a": Contender("old_engine", "llama-index-finetuning", "llama-index-finetuning 0.4.2 at its defaults"),
    "b": Contender("plain_trainer", None, "sentence-transformers' trainer with a peft LoRA"),
    "c": Contender("khoji_example", "khoji", "khoji 0.4.0, its own example for MiniLM"),
    "d": Contender("ours", None, "this package"),
    "b2": Contender("plain_trainer", None, "like for like: sentence-transformers' trainer"),
    "d2": Contender("ours", None, "like for like: this package"),
}


@dataclass(frozen=True)
class Job:
    """Arguments of a contender's process.

    Attributes:
        contender: Key of `CONTENDERS`.
        setting: Name in the table of settings in `ours.py`; "default" for the other contenders.
        model: Folder of the base model.
        train: JSON file of the training set.
        test: JSON file of the test set, which is only used for the curve.
        seed: Random seed.
        points: Evaluations per epoch, if the contender can be evaluated within one.
        threads: Threads of torch; None for torch's own choice.
        device: torch device to train on.
        events: File to write JSON lines to.
        folder: Folder for models.
    """

    contender: str
    setting: str
    model: str
    train: str
    test: str
    seed: int
    points: int
    threads: int | None
    device: str
    events: str
    folder: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the child process."""
        return asdict(self)
