"""(d) this package: the engine at its defaults, and with named settings.

The engine holds out a validation set from the training queries and selects the weights on it; its evaluations are not
timed, like all others. The curve is on the test set, which the engine never sees; `kept` is the evaluation of the
written adapter directory on the test set.

(d2) is the counterpart of (b2) in `plain_trainer.py`: the same texts, length, batch size and LoRA, without validation.
"""

from __future__ import annotations

import importlib
from typing import Any

from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraFinetuneEngine
from llama_index_lora_embed.config import ObjectiveSettings
from speed.contenders import Job
from speed.measure import Curve, Recorder, count_tokens, linear_layers, one_query_each, read_dataset
from speed.plain_trainer import BATCH_SIZE, LEARNING_RATE, LIKE_FOR_LIKE_EPOCHS, like_for_like_length

# arguments of LoraFinetuneEngine
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    # each without one optimisation
    "fp32": {"precision": "fp32"},
    "base-dropout": {"base_dropout": True},
    "pefts-lora": {"fused_lora": False},
    "torchs-attention": {"fused_attention": False},
    "no-graphs": {"cuda_graphs": False},
    "plain-decoder": {"fused_decoder": False},
    "whole-batch": {"objective": ObjectiveSettings(mini_batch_size=None)},
    "frozen-each-time": {"lora_layers": 0.5, "frozen_cache_mb": 0},
    # other settings
    "quality": {"window": 512, "epochs": 5, "learning_rate": 1e-3, "val_fraction": 0.0},
    "upper-half": {"lora_layers": 0.5},
    "windows": {"window": 192},
    "short": {"epochs": 2},
    "large-batch": {"batch_size": 64},
    "attention": {"lora_config": LoraConfig(r=16, lora_alpha=32, target_modules=["query", "key", "value"])},
}


class Facts(TrainerCallback):
    """Counts the tokens of an epoch before the first step, with the model's prompts and length."""

    def __init__(self, recorder: Recorder, dataset: EmbeddingQAFinetuneDataset) -> None:
        self.recorder = recorder
        self.dataset = dataset

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with self.recorder.paused():
            trained_on = {ids[0] for ids in self.dataset.relevant_docs.values()}  # each passage once per epoch
            parts = {
                "query": list(self.dataset.queries.values()),
                "document": [self.dataset.corpus[i] for i in trained_on],
            }
            limit = model.max_seq_length
            self.recorder.facts["max_seq_length"] = limit
            self.recorder.facts["tokens_per_epoch"] = sum(
                count_tokens(model.tokenizer, texts, limit, model.prompts.get(task) or "")
                for task, texts in parts.items()
            )


def pause_evaluations(recorder: Recorder) -> list[int]:
    """Pause the clock during the engine's own evaluations, which have no public hook.

    Returns:
        The number of evaluations, in a list of one.
    """
    calls = [0]
    evaluator = importlib.import_module("llama_index_lora_embed.engines.evaluator")
    evaluate_model = evaluator.evaluate_model

    def timed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        with recorder.paused(own=True):
            return evaluate_model(*args, **kwargs)

    evaluator.evaluate_model = timed
    return calls


def run(job: Job, recorder: Recorder) -> None:
    settings: dict[str, Any] = dict(SETTINGS[job.setting])
    dataset = EmbeddingQAFinetuneDataset.from_json(job.train)
    like_for_like = job.contender == "d2"
    if like_for_like:
        base = SentenceTransformer(job.model, device=job.device)
        dataset = EmbeddingQAFinetuneDataset.coerce(one_query_each(read_dataset(job.train)), "dataset")
        own = {
            "lora_config": LoraConfig(r=16, lora_alpha=32, target_modules=linear_layers(base)),
            "max_seq_length": like_for_like_length(base),
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "epochs": LIKE_FOR_LIKE_EPOCHS,
            "val_fraction": 0.0,
        }
        if fixed := settings.keys() & {*own, "lora_layers", "window"}:
            raise ValueError(f"setting {job.setting!r} with d2, which fixes {', '.join(sorted(fixed))}")
        # without masks, like the loss of (b2)
        objective = settings.get("objective", ObjectiveSettings())
        objective = objective.replace(sibling_window=0, mask_near_duplicates=False)
        settings |= {**own, "objective": objective}
    evaluations = pause_evaluations(recorder)
    recorder.begin()
    engine = LoraFinetuneEngine(
        dataset, job.model, f"{job.folder}/adapter", device=job.device, seed=job.seed, **settings
    )
    curve = Curve(recorder, 1 if like_for_like else job.points, last_only=not job.points)
    result = engine.finetune(callbacks=[Facts(recorder, engine.dataset), curve], logging_steps=1)
    assert evaluations[0] >= len(result.history), "the engine evaluated without pausing the clock"
    recorder.facts |= {
        "precision": result.precision,
        "best_step": result.best_step,
        "verdict": result.verdict.value,
    }
    recorder.done()
    # after all measurements, because this loads a second model
    recorder.evaluate(
        SentenceTransformer(result.adapter_path, device=job.device, trust_remote_code=True),
        result.best_step,
        0.0,
        name="kept",
    )
