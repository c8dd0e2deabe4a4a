"""(c) khoji 0.4.0, with the configuration for MiniLM that it ships (`khoji init` writes `minilm_scifact_full.yaml`).

It trains on three triplets per query (one mined negative, two random ones), with a LoRA of rank 16 on query, key and
value, 512 tokens, batches of 16, 5 epochs, in float32. The steps of `khoji.run` are called one by one, as its README
shows for Python, so that the clock can be paused; mining counts as preparation. Its training loop has no hooks, so
epochs are detected by counting batches. With tenk_train an epoch has 2,004 triplets: use `--timeout` if that is too
long.

khoji reads a model's pooling from the Hub, and uses the first token's vector for models in a folder; here the pooling
is read from the folder instead.
"""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import khoji.model
import khoji.trainer
import torch
import yaml
from khoji import EmbeddingModel, LoRASettings, RetrievalDataset, Trainer, TrainingConfig, TripletDataset
from khoji import build_mixed_negatives as build_triplets
from khoji.example_configs import CONFIGS
from khoji.loss import infonce_loss
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from speed.contenders import Job
from speed.measure import Recorder, count_tokens, read_dataset

ENCODED_PER_BATCH = 3  # queries, passages, negatives: one call each


class WatchedTrainer(Trainer):
    """khoji's trainer with regular evaluations.

    Args:
        *args: Arguments of khoji's trainer.
        recorder: The recorder of the run.
        evaluated: A sentence-transformers model with the same weights.
        batches: Batches per epoch.
        every: Batches between evaluations.
        **kwargs: Arguments of khoji's trainer.
    """

    def __init__(
        self, *args: Any, recorder: Recorder, evaluated: SentenceTransformer, batches: int, every: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.recorder, self.evaluated, self.batches, self.every = recorder, evaluated, batches, every
        self.calls = 0
        # peft changed khoji's transformer in place, so these modules are evaluated
        evaluated[0].model = self.model.base_model.model

    def _encode_batch(self, texts: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():  # khoji's own look at a few samples, before and after training
            return super()._encode_batch(texts)
        done, inside = divmod(self.calls, ENCODED_PER_BATCH)
        if done and not inside and (done % self.batches == 0 or done % self.every == 0):
            self.evaluate(done)
        self.calls += 1
        return super()._encode_batch(texts)

    def evaluate(self, done: int) -> None:
        """Evaluate after `done` batches."""
        self.recorder.evaluate(self.evaluated, done, done / self.batches)


def run(job: Job, recorder: Recorder) -> None:
    data = read_dataset(job.train)
    config = yaml.safe_load(CONFIGS["minilm_scifact_full.yaml"])
    chosen, lora, train = config["data"], config["lora"], config["train"]
    assert (chosen["negatives"], train["loss"]) == ("mixed", "infonce"), "khoji's example has changed"
    evaluated = SentenceTransformer(job.model, device="cpu")
    positions = int(evaluated.config.max_position_embeddings)
    evaluated.max_seq_length = min(train["max_length"], positions)
    mode = next(module for module in evaluated if isinstance(module, Pooling)).pooling_mode
    khoji.model._detect_pooling = khoji.trainer._detect_pooling = lambda name: mode
    random.seed(job.seed)
    torch.manual_seed(job.seed)

    recorder.begin()
    qrels = {query_id: {ids[0]: 1} for query_id, ids in data["relevant_docs"].items()}
    dataset = RetrievalDataset(queries=data["queries"], corpus=data["corpus"], qrels=qrels)
    triplets = build_triplets(
        dataset,
        EmbeddingModel(job.model, max_length=evaluated.max_seq_length),
        n_random=chosen["n_random"],
        n_hard=chosen["n_hard"],
        top_k=chosen["top_k"],
        skip_top=chosen["skip_top"],
        seed=job.seed,
    )
    batches = math.ceil(len(triplets) / train["batch_size"])
    trainer = WatchedTrainer(
        job.model,
        TrainingConfig(
            epochs=train["epochs"],
            batch_size=train["batch_size"],
            grad_accum_steps=train["grad_accum_steps"],
            lr=float(train["lr"]),
            weight_decay=train["weight_decay"],
            warmup_steps=train["warmup_steps"],
            max_grad_norm=train["max_grad_norm"],
            max_length=evaluated.max_seq_length,
            mixed_precision=train["mixed_precision"],
            loss_fn=partial(infonce_loss, temperature=train["temperature"]),
            lora=LoRASettings(r=lora["r"], alpha=lora["alpha"], dropout=lora["dropout"]),
            save_dir=f"{job.folder}/model",
        ),
        recorder=recorder,
        evaluated=evaluated,
        batches=batches,
        every=max(1, round(batches / job.points)),
    )
    with recorder.paused():
        texts = [text for t in triplets for text in (t.query, t.positive, t.negative)]
        recorder.facts = {
            "precision": train["mixed_precision"] or "fp32",
            "max_seq_length": evaluated.max_seq_length,
            "tokens_per_epoch": count_tokens(evaluated.tokenizer, texts, evaluated.max_seq_length),
            "steps": batches * train["epochs"],
            "epochs": train["epochs"],
        }
    recorder.train_begin(trainer.model)
    trainer.train(TripletDataset(triplets))
    recorder.train_end()
    trainer.evaluate(batches * train["epochs"])
    recorder.done()
