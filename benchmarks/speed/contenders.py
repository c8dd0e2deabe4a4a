"""Who runs: a letter, the file, the environment, and one line that says what it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        module: File in this folder with `run(job, recorder)`.
        environment: A name in `environments.REQUIREMENTS`; None for the interpreter that runs the benchmark.
        title: What it is.
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
    """What a contender's process is told.

    Attributes:
        contender: Key of `CONTENDERS`.
        setting: Name in the contender's own table of settings; "default" everywhere but in `ours.py`.
        model: Folder of the base model.
        train: JSON file of the training questions.
        test: JSON file of the test questions, which draw the curve and nothing else.
        seed: Of everything random.
        points: Evaluations in an epoch, where the contender can be evaluated within one.
        threads: Of torch; None leaves torch's own choice.
        device: torch device to train on.
        events: File to write JSON lines to.
        folder: Where models may be written.
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
        """Plain values for the child's process."""
        return asdict(self)
