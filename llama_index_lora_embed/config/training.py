"""How an adapter is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from llama_index_lora_embed.config.base import Settings, is_int, is_number

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu|mlu|musa|xla|mtia|privateuseone)(:\d+)?")


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """How an adapter is trained.

    Attributes:
        batch_size: Passages per step, each with all its questions; every other passage of the batch is a
            negative. 32: on folds of tenk_train 64 gained 0.004 of nDCG@10 (standard error 0.004), and a short run has
            half as many steps then. "auto" takes 32, and where the device's memory does not hold such a step,
            computes it in pieces (GradCache) as large as fit; with a loss of your own, halves it until it fits.
        epochs: Passes over the training passages.
        learning_rate: Peak of AdamW's schedule. 1e-3 for a LoRA of rank 16, on the same folds.
        warmup_ratio: Share of all steps over which the rate rises from 0; a fixed number of steps can
            outlast a short run.
        weight_decay: AdamW's; 0 because LoRA's low rank already limits the change.
        max_grad_norm: Gradients are clipped to this norm; transformers' default.
        temperature: Similarities are divided by it before the softmax; 0.05 is sentence-transformers' scale of 20.
        max_seq_length: Tokens per text, special tokens included; None chooses the shortest length that
            covers `length_coverage` of the training texts.
        length_coverage: Share of texts that the chosen length holds whole.
        lora_r: Rank of the default LoRA.
        lora_alpha: Scale numerator of the default LoRA (scale = alpha / r).
        lora_layers: Share of the layers that the default LoRA adapts, counted from the last one.
        base_dropout: Train with the dropout that the base's configuration has; see `training.trainer`.
        fused_lora: Compute a LoRA layer's training step in few large operations (`training.fast_lora`).
        fused_attention: On processors with bfloat16, compute attention in blocks that their cache holds
            (`fast_attention`).
        frozen_cache_mb: Megabytes of memory for the outputs of the frozen layers below the first adapted one, which
            are then computed once for all epochs (`training.prefix`); more of them go into a temporary file. 0 computes
            them in every step.
        precision: "bf16" computes training steps under bfloat16 autocast, "fp32" does not, "auto" takes
            bf16 where the processor or GPU has instructions for it. Weights stay float32 either way.
        evaluation_steps: Evaluate every so many steps, besides step 0 and the end of each epoch; 0 for epochs only.
        early_stopping_patience: Stop after so many evaluations in a row without a new highest figure; 0 for never.
        best_metric: Measure that says which step is kept, of those that the evaluation reports; None takes nDCG@10 for
            questions and passages, ROC-AUC for pairs labelled 0 or 1 and Spearman's correlation for graded ones.
        save_checkpoints: Write checkpoints from which an interrupted run can resume.
        checkpoint_save_steps: Steps between checkpoints.
        checkpoint_save_total_limit: Checkpoints kept; 0 keeps all.
        val_fraction: Share of the questions, by source document, held out to judge by where no validation set is given.
        max_eval_passages: Passages searched when the validation set is held out from the training set:
            the answers, and others up to this number. Bounds the time that an evaluation takes.
        seed: Of initialisation, order of batches, split and question making.
        show_progress_bar: Show tqdm's bars.
        device: torch device; None lets sentence-transformers choose.
        trust_remote_code: Run Python code that a model on the Hub brings along.
    """

    batch_size: int | Literal["auto"] = 32
    epochs: int = 4
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 0.05
    max_seq_length: int | None = None
    length_coverage: float = 0.95
    lora_r: int = 16
    lora_alpha: int = 32
    lora_layers: float = 1.0
    base_dropout: bool = False
    fused_lora: bool = True
    fused_attention: bool = True
    frozen_cache_mb: float = 1024.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    evaluation_steps: int = 50
    early_stopping_patience: int = 0
    best_metric: str | None = None
    save_checkpoints: bool = False
    checkpoint_save_steps: int = 500
    checkpoint_save_total_limit: int = 0
    val_fraction: float = 0.1
    max_eval_passages: int = 500
    seed: int = 42
    show_progress_bar: bool = True
    device: str | None = None
    trust_remote_code: bool = False

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        found: list[str] = []
        need = partial(self._need, found)
        need("batch_size", self.batch_size == "auto" or is_int(self.batch_size, 1),
             "'auto' or a whole number of at least 1")  # fmt: skip
        metric = self.best_metric
        need("best_metric", metric is None or (isinstance(metric, str) and bool(metric.strip())),
             "None or a measure's name")  # fmt: skip
        for name in (
            "epochs",
            "checkpoint_save_steps",
            "lora_r",
            "lora_alpha",
            "max_eval_passages",
        ):
            need(name, is_int(getattr(self, name), 1), "a whole number of at least 1")
        for name in ("evaluation_steps", "early_stopping_patience", "checkpoint_save_total_limit"):
            need(name, is_int(getattr(self, name), 0), "a whole number of at least 0")
        need("seed", is_int(self.seed, 0) and self.seed < 2**32, "a whole number from 0 to below 2**32")
        device = self.device
        need("device", device is None or (isinstance(device, str) and bool(_DEVICE.fullmatch(device))),
             "None or a torch device: 'cpu', 'cuda', 'cuda:1', 'mps', 'xpu', ...")  # fmt: skip
        for name in ("learning_rate", "max_grad_norm", "temperature"):
            need(name, is_number(getattr(self, name), above=0.0), "a number above 0")
        need("weight_decay", is_number(self.weight_decay, above=-1e-12), "a number of at least 0")
        for name in ("warmup_ratio", "val_fraction"):
            value = getattr(self, name)
            need(name, is_number(value, above=-1e-12) and value < 1, "a number from 0 to below 1")
        need("length_coverage", is_number(self.length_coverage, above=0.0) and self.length_coverage <= 1,
             "a number above 0, at most 1")  # fmt: skip
        need("max_seq_length", self.max_seq_length is None or is_int(self.max_seq_length, 3),
             "None or a whole number of at least 3 tokens")  # fmt: skip
        need("precision", self.precision in ("auto", "bf16", "fp32"), "'auto', 'bf16' or 'fp32'")
        need("lora_layers", is_number(self.lora_layers, above=0.0) and self.lora_layers <= 1,
             "a number above 0, at most 1")  # fmt: skip
        need("frozen_cache_mb", is_number(self.frozen_cache_mb, above=-1e-12), "a number of at least 0")
        for name in (
            "base_dropout",
            "fused_lora",
            "fused_attention",
            "save_checkpoints",
            "show_progress_bar",
            "trust_remote_code",
        ):
            need(name, isinstance(getattr(self, name), bool), "True or False")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def result_affecting(self) -> dict[str, Any]:
        """Those that decide which weights are written; a resumed run may have others of the rest."""
        passing = ("show_progress_bar", "device", "save_checkpoints", "checkpoint_save_steps",
                   "checkpoint_save_total_limit", "trust_remote_code")  # fmt: skip
        return {name: value for name, value in self.to_dict().items() if name not in passing}
