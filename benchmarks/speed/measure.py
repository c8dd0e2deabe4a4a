"""Clock, evaluation and token count: the same code for all contenders.

The clock starts before a contender loads its model, after libraries are imported and data is read, and ends when the
model is on disk. It is paused during every evaluation, on the test set for the curve as well as a contender's own. The
remaining time is preparation, steps and writing. The seconds of a contender's own evaluations, for which its user waits
as well, are counted separately; where it evaluates on the test set, as (a) does, those of the curve are its own.

Tokens are those of the texts in an epoch, including prompts and special tokens, with each text truncated at the model's
`max_seq_length` and without padding. A text in two rows counts twice, because a trainer that encodes rows computes it
twice. Tokens per second are these tokens divided by the time from the first step to the last. `tokens_embedded` is a
second count, taken at the embedding table, on processors alone; it is lower where hidden states of frozen layers are
cached, higher where a step is computed twice, and should equal the first count otherwise.

Memory is the peak of the process, on a GPU the peak of torch's allocations, with a contender's own evaluations. Those
of the curve alone are left out on Linux, where a peak can be forgotten (/proc/self/clear_refs, after what they freed
went back to the system); `peak_in_evaluation` is true where an evaluation set the peak.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from transformers import TrainerCallback

LIBRARIES = ("torch", "transformers", "sentence-transformers", "peft", "accelerate", "llama-index-core",
             "llama-index-finetuning", "mistralai", "khoji", "llama-index-lora-embed")  # fmt: skip
METRICS = {"ndcg@10": "cosine_ndcg@10", "hit@5": "cosine_accuracy@5"}


def peak_mb() -> float:
    """Peak memory so far, on the GPU if one is used; `ru_maxrss` is in kilobytes on Linux and in bytes on macOS."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak() -> None:
    """Let `peak_mb` begin again from what is held now; a processor's stays elsewhere than on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def has_bf16(device: str = "cpu") -> bool:
    """Whether the device computes bfloat16 natively; emulation is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def read_dataset(path: str) -> dict[str, Any]:
    """`queries`, `corpus` and `relevant_docs` of an `EmbeddingQAFinetuneDataset` file."""
    data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return data


def pairs(data: dict[str, Any]) -> list[tuple[str, str]]:
    """(query, passage) of every query, with its first relevant passage."""
    return [(text, data["corpus"][data["relevant_docs"][i][0]]) for i, text in data["queries"].items()]


def one_query_each(data: dict[str, Any]) -> dict[str, Any]:
    """The dataset with only the first query of every passage.

    Rows and passages then correspond, so that encoding each passage once and encoding each row is the same work.
    """
    first: dict[str, str] = {}
    for query_id in data["queries"]:
        first.setdefault(data["relevant_docs"][query_id][0], query_id)
    kept = {query_id: passage_id for passage_id, query_id in first.items()}
    return {
        "queries": {i: data["queries"][i] for i in kept},
        "corpus": {i: data["corpus"][i] for i in kept.values()},
        "relevant_docs": {i: [passage_id] for i, passage_id in kept.items()},
        "mode": "text",
    }


def linear_layers(model: Any) -> list[str]:
    """Names of all linear layers inside the transformer's numbered layers, for identical LoRAs."""
    named = model.transformers_model.named_modules()
    return [n for n, m in named if isinstance(m, torch.nn.Linear) and any(part.isdigit() for part in n.split("."))]


def count_tokens(tokenizer: Any, texts: Iterable[str], limit: int, prompt: str = "") -> int:
    """Tokens of these texts, including prompt and special tokens, with each text truncated at `limit`."""
    encoded = tokenizer([prompt + text for text in texts], truncation=False, padding=False, verbose=False)
    return sum(min(len(ids), limit) for ids in encoded["input_ids"])


class Recorder:
    """Writes the events of a run as JSON lines, each with the seconds on the clock.

    Args:
        events: File to write to.
        test: Test set of the curve.
    """

    def __init__(self, events: str, test: dict[str, Any]) -> None:
        self._path = Path(events)
        relevant = {query_id: set(ids) for query_id, ids in test["relevant_docs"].items()}
        self._evaluator = InformationRetrievalEvaluator(
            test["queries"], test["corpus"], relevant, batch_size=16, write_csv=False, show_progress_bar=False
        )
        self._started: float | None = None
        self._paused_seconds = 0.0
        self._own_seconds = 0.0
        self._depth = 0
        self._evaluated: dict[tuple[int, int], dict[str, float]] = {}
        self._took: dict[tuple[int, int], float] = {}
        self._round = 0
        self._embedded = 0
        self._counting = False
        self._raised_to = self._highest = 0.0
        self.facts: dict[str, Any] = {}

    def begin(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds on the clock, after waiting for the GPU; only valid while the clock runs."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        assert self._started is not None, "begin() comes first"
        return time.perf_counter() - self._started - self._paused_seconds

    @contextmanager
    def paused(self, own: bool = False) -> Iterator[None]:
        """Pause the clock and the token count; `own` is for an evaluation that the contender makes by itself."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started, before = time.perf_counter(), peak_mb()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._paused_seconds += time.perf_counter() - started
                self._own_seconds += time.perf_counter() - started if own else 0.0
                if peak_mb() > before:
                    self._raised_to = peak_mb()

    def peak(self) -> float:
        """Peak memory of the contender so far, in MB."""
        self._highest = max(self._highest, peak_mb())
        return self._highest

    def event(self, name: str, **values: Any) -> None:
        """Write a line; it is kept if the process is stopped."""
        line = {"event": name, "seconds": round(self.seconds, 3), **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def train_begin(self, model: Any) -> None:
        """Call before the first step; tokens are counted at this model's embedding table from here on."""
        self._round += 1
        table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if table is not None and not torch.cuda.is_available():  # CUDA graphs would not show it each pass
            table.register_forward_pre_hook(self._count)
        self._counting = True
        self.event("train_begin", **self.facts)

    def train_end(self) -> None:
        """Call after the last step."""
        self._counting = False
        self.event("train_end")

    def evaluate(
        self, model: Any, step: int, epoch: float, name: str = "evaluated", own: bool = False
    ) -> dict[str, float]:
        """Evaluate a sentence-transformers model on the test set, once per step; `own` as for `paused`."""
        seconds, peak, key, raised = self.seconds, self.peak(), (self._round, step), self._raised_to
        if name != "evaluated" or key not in self._evaluated:
            with self.paused(), torch.autocast(model.device.type, enabled=False):
                training = [module for module in model.modules() if module.training]
                started = time.perf_counter()
                self._evaluated[key] = self._evaluator(model)
                self._took[key] = time.perf_counter() - started
                for module in training:  # encoding switches the model to eval mode
                    module.training = True
            if not own:
                forget_peak()
                self._raised_to = raised
            values = {ours: round(float(self._evaluated[key][theirs]), 4) for ours, theirs in METRICS.items()}
            self.event(
                name,
                **{
                    "step": step,
                    "epoch": round(epoch, 3),
                    **values,
                    "peak_mb": round(peak),
                    "seconds": round(seconds, 3),
                },
            )
        self._own_seconds += self._took[key] if own else 0.0
        return self._evaluated[key]

    @property
    def primary_metric(self) -> str:
        """Name of the metric for sentence-transformers' callbacks."""
        return "cosine_ndcg@10"

    def done(self) -> None:
        """Call when the model is on disk; writes the summary of the run."""
        seconds = self.seconds
        versions = {}
        for library in LIBRARIES:
            try:
                versions[library] = importlib.metadata.version(library)
            except importlib.metadata.PackageNotFoundError:
                continue
        self.event("done", seconds=round(seconds, 3), evaluation_seconds=round(self._paused_seconds, 3),
                   own_evaluation_seconds=round(self._own_seconds, 3),
                   peak_mb=round(self.peak()), peak_in_evaluation=self.peak() <= self._raised_to,
                   tokens_embedded=self._embedded, threads=torch.get_num_threads(),
                   python=".".join(map(str, sys.version_info[:3])), versions=versions, **self.facts)  # fmt: skip

    def _count(self, table: Any, inputs: tuple[Any, ...]) -> None:
        if self._counting and not self._depth:
            padding = table.padding_idx
            self._embedded += int((inputs[0] != padding).sum()) if padding is not None else inputs[0].numel()


class Curve(TrainerCallback):
    """A transformers callback that evaluates on the test set at the end of each epoch and at points within.

    Args:
        recorder: The recorder of the run.
        points: Evaluations per epoch.
        last_only: Evaluate after the last step alone.
    """

    def __init__(self, recorder: Recorder, points: int, last_only: bool = False) -> None:
        self.recorder = recorder
        self.points = points
        self.last_only = last_only
        self.every = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        steps = state.max_steps / args.num_train_epochs
        self.every = max(1, round(steps / self.points)) if self.points > 1 else 0
        self.recorder.train_begin(model.transformers_model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.recorder.evaluate(model, state.global_step, state.epoch)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.recorder.event("loss", step=state.global_step, loss=round(float(logs["loss"]), 4))

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.last_only or state.global_step >= state.max_steps:
            self.recorder.evaluate(model, state.global_step, state.epoch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.facts |= {"steps": state.global_step, "epochs": round(state.epoch, 3)}
        self.recorder.train_end()
