"""How a map on top of a frozen embedding model's query vectors is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llama_index_lora_embed.config.base import (
    NOT_IN_RESULT,
    Above0,
    AtLeast1,
    PathText,
    Settings,
    ShareBelow1,
)
from llama_index_lora_embed.config.training import Device


class EmbeddingAdapterSettings(Settings):
    """How `EmbeddingAdapterFinetuneEngine` trains; it takes each field as an argument of the same name.

    The defaults were chosen on folds of tenk_train, medquad_train, cisi and cacm (benchmarks/README.md, "Embedding
    adapters").
    """

    batch_size: AtLeast1 = 10
    """Queries per step. Unlike with in-batch negatives, it does not decide what a query is compared with."""
    epochs: AtLeast1 = 10
    """Passes over the queries. 10 (llama-index-finetuning: 1): on folds of tenk_train nDCG@10 was 0.649 after one
    epoch, 0.676 after five and 0.683 after ten, and an epoch of 500 queries takes a fraction of a second; the best
    evaluation is kept."""
    learning_rate: Above0 = 1e-3
    """Peak of AdamW's schedule (llama-index-finetuning: 2e-5)."""
    warmup_ratio: ShareBelow1 = 0.1
    """Share of all steps over which the rate rises, from 1/(n + 1) of its peak in the first of n.
    It then falls to 0."""
    max_grad_norm: Above0 = 1.0
    """Gradients are clipped to this norm."""
    temperature: Above0 = 0.02
    """Similarities are divided by it before the softmax. 0.02: on the same folds of tenk_train nDCG@10 was 0.680, with
    0.05 (llama-index-finetuning's scale of 20) 0.666 and with 0.1 0.644."""
    identity_weight: Annotated[float, Field(ge=0)] = 10.0
    """Pull towards the identity: the squared distance of the map to it (|W - I|², Frobenius), times this, divided by
    the number of training queries, is added to the loss; for a map that is not linear, the mean squared distance by
    which it moves the vectors of a batch, times their dimensions. On folds of tenk_train 3, 10 and 30 were within
    0.004 of each other; with 300 queries of medquad_train 3 gained 0.005 more than 10, and 30 gained 0.006 less."""
    negatives: Literal["auto", "corpus", "answered"] = "auto"
    """What a query is compared with: "corpus" for all passages, "answered" for those that answer some training query.
    Passages that no query asks for are learnt to be wrong: that helps where there are many of them, and harms future
    queries about them where there are few. "auto" tries both on three folds of the training queries."""
    bias: bool = False
    """Whether the default adapter, a `LinearLayer`, has a bias."""
    val_fraction: ShareBelow1 = 0.1
    """Share of the queries, by source document, held out where there is no `val_dataset`; 0 for none."""
    max_eval_passages: AtLeast1 = 500
    """Passages searched when the validation set is held out."""
    on_overlap: Annotated[Literal["drop", "raise"], NOT_IN_RESULT] = "drop"
    """As in `DataSettings`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Random seed of the order of the queries and of the split."""
    model_output_path: Annotated[PathText, NOT_IN_RESULT] = "model_output"
    """Directory to write. An adapter there is replaced at the end and kept as `<path>.previous`."""
    model_checkpoint_path: Annotated[PathText | None, NOT_IN_RESULT] = None
    """Folder in which the adapter is saved as `step_<n>` every `checkpoint_save_steps` steps; None for none."""
    checkpoint_save_steps: Annotated[AtLeast1, NOT_IN_RESULT] = 100
    """Steps between checkpoints of either kind."""
    save_checkpoints: Annotated[bool, NOT_IN_RESULT] = False
    """Write checkpoints to `<model_output_path>.run`, from which a killed run can resume. Ctrl-C and SIGTERM save one
    in any case, and embeddings are kept in any case."""
    resume_from_checkpoint: Annotated[bool, NOT_IN_RESULT] = False
    """Continue from the newest checkpoint, if there is one."""
    num_workers: Annotated[AtLeast1 | None, NOT_IN_RESULT] = None
    """Concurrent requests to an embedding model behind an API, by its asynchronous methods; None for one at a time."""
    cache_folder: Annotated[PathText | None, NOT_IN_RESULT] = None
    """Folder of the embeddings by model, side and text; None for "lora_embed" in LlamaIndex's cache folder."""
    device: Annotated[Device | None, NOT_IN_RESULT] = None
    """torch device of the training; None for a GPU if there is one."""
    verbose: Annotated[bool, NOT_IN_RESULT] = False
    """Show progress bars."""
