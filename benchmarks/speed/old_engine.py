"""(a) llama-index-finetuning 0.4.2: `SentenceTransformersFinetuneEngine` at its defaults.

Full fine-tuning in float32, batches of 10 rows, 2 epochs, the model's own `max_seq_length`, on all training queries.
`finetune()` fails without `val_dataset`, because the default `evaluation_steps=50` needs an evaluator. It is the test
set, as in LlamaIndex's example. The engine writes the model with the best metric on it; this benchmark's figure for (a)
is the model after the last step instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import sentence_transformers.sentence_transformer.fit_mixin as fit_mixin
import transformers.trainer
from llama_index.finetuning import EmbeddingQAFinetuneDataset, SentenceTransformersFinetuneEngine
from sentence_transformers.base.evaluation import BaseEvaluator

from speed.contenders import Job
from speed.measure import Curve, Recorder, count_tokens, pairs, read_dataset


class TestCurve(BaseEvaluator):
    """The engine's evaluator with the clock paused; called every 50 steps and at the end of each epoch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.primary_metric = recorder.primary_metric

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1, **kwargs: Any
    ) -> dict[str, float]:
        return dict(self.recorder.evaluate(model, steps, epoch, own=True))


def run(job: Job, recorder: Recorder) -> None:
    train, test = (EmbeddingQAFinetuneDataset.from_json(path) for path in (job.train, job.test))
    rows = pairs(read_dataset(job.train))
    # the engine has no seed argument; without this line all runs would use transformers' default, 42
    arguments: Any = fit_mixin.SentenceTransformerTrainingArguments
    fit_mixin.SentenceTransformerTrainingArguments = partial(arguments, seed=job.seed)
    # it takes no callbacks either; these are the defaults of every trainer
    transformers.trainer.DEFAULT_CALLBACKS.append(Curve(recorder, points=0))
    recorder.begin()
    engine = SentenceTransformersFinetuneEngine(
        train, model_id=job.model, model_output_path=f"{job.folder}/model", val_dataset=test
    )
    with recorder.paused():
        model = engine.model
        texts = [text for row in rows for text in row]
        recorder.facts = {
            "precision": "fp32",
            "max_seq_length": model.max_seq_length,
            "tokens_per_epoch": count_tokens(model.tokenizer, texts, model.max_seq_length),
        }
    engine.evaluator = TestCurve(recorder)
    engine.finetune()
    recorder.done()
