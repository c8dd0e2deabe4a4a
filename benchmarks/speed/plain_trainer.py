"""(b) sentence-transformers' trainer with a peft `LoraConfig`, written after their documentation.

From sentence-transformers' page on PEFT adapters: `add_adapter`, MultipleNegativesRankingLoss, a tenth of the steps for
warmup, bf16, no duplicates in a batch. From peft's quicktour: batches of 32 and a learning rate of 1e-3; the 2e-5 on
sentence-transformers' page is for 3 million pairs, and would hardly change a LoRA on a few hundred. Everything else is
a default: 3 epochs, no LoRA dropout, the base's own dropout, the model's own `max_seq_length`.

(b2) like for like: one query per passage, so that rows and passages correspond; all texts up to 512 tokens (or the
limit of the model's position embeddings); a LoRA on all linear layers inside the transformer's layers; batches of 32;
two epochs. `ours.py` has the counterpart (d2). Training tokens per second are compared.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from speed.contenders import Job
from speed.measure import (
    Curve,
    Recorder,
    count_tokens,
    has_bf16,
    linear_layers,
    one_query_each,
    pairs,
    read_dataset,
)

BATCH_SIZE = 32
LEARNING_RATE = 1e-3
LIKE_FOR_LIKE_EPOCHS = 2
LIKE_FOR_LIKE_LENGTH = 512


def like_for_like_length(model: SentenceTransformer) -> int:
    """512, or the limit of the position embeddings."""
    return min(LIKE_FOR_LIKE_LENGTH, int(model.config.max_position_embeddings))


def lora(target_modules: list[str] | str) -> LoraConfig:
    """Rank 16 and alpha 32; everything else is peft's default."""
    return LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=16, lora_alpha=32, target_modules=target_modules)


def run(job: Job, recorder: Recorder) -> None:
    like_for_like = job.contender == "b2"
    bf16 = has_bf16(job.device) and job.setting != "fp32"
    data = read_dataset(job.train)
    rows = pairs(one_query_each(data) if like_for_like else data)
    recorder.begin()
    model = SentenceTransformer(job.model, device=job.device)
    settings: dict[str, Any] = {}
    if like_for_like:
        model.max_seq_length = like_for_like_length(model)
        settings["num_train_epochs"] = LIKE_FOR_LIKE_EPOCHS
    model.add_adapter(lora(linear_layers(model) if like_for_like else "all-linear"))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=job.folder,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            warmup_steps=0.1,
            bf16=bf16,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            save_strategy="no",
            report_to="none",
            use_cpu=job.device == "cpu",
            logging_steps=1,
            disable_tqdm=True,
            seed=job.seed,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"anchor": [q for q, _ in rows], "positive": [p for _, p in rows]}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[Curve(recorder, 1 if like_for_like else job.points)],
    )
    with recorder.paused():
        recorder.facts = {
            "precision": "bf16" if bf16 else "fp32",
            "max_seq_length": model.max_seq_length,
            "tokens_per_epoch": count_tokens(
                model.tokenizer, [text for row in rows for text in row], model.max_seq_length
            ),
        }
    trainer.train()
    model.save_pretrained(f"{job.folder}/model")
    recorder.done()
