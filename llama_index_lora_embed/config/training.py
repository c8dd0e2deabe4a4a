"""How an adapter is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llama_index_lora_embed.config.base import (
    NOT_IN_RESULT,
    Above0,
    AtLeast0,
    AtLeast1,
    Settings,
    ShareAbove0,
    ShareBelow1,
    Text,
)

_DEVICE = r"^(cpu|cuda|mps|xpu|hpu|npu|mlu|musa|xla|mtia|privateuseone)(:\d+)?$"
Device = Annotated[
    str,
    Field(pattern=_DEVICE, examples=["cpu", "cuda", "cuda:1", "mps"]),
    BeforeValidator(lambda value: str(value) if type(value).__name__ == "device" else value),  # torch.device
]


class TrainingSettings(Settings):
    """How an adapter is trained."""

    tune: Literal["both", "query"] = "both"
    """"both" adapts the vectors of queries and passages. "query" adapts those of queries alone: an index of the base's
    vectors stays as it is, and every passage of the corpus is a negative in every step."""
    batch_size: AtLeast1 | Literal["auto"] = 64
    """Passages per step, each with all its queries; every other passage of the batch is a negative. 64 was chosen
    together with `epochs` and `lora_layers`. "auto" takes 32, and where the device's memory does not hold such a step,
    computes it in chunks (GradCache) as large as fit; with a loss of your own, halves it until it fits. Labelled pairs:
    pairs per step. `tune="query"`: queries per step. These two, and small
    datasets, keep other defaults (`for_small_batches`)."""
    epochs: AtLeast1 = 5
    """Passes over the training passages. 5 (llama-index-finetuning: 2) in batches of 64: on folds of tenk_train,
    nDCG@10 was 0.770 with windows, and 0.760 with 4 epochs in batches of 32 on all layers without; the best evaluation
    is kept. Where texts are read in windows, 3 with a `learning_rate` of 1.5e-3, if neither is given
    (`for_windows`)."""
    learning_rate: Above0 = 1e-3
    """Peak of AdamW's schedule. 1e-3 for a LoRA of rank 16, on the same folds."""
    warmup_ratio: ShareBelow1 = 0.1
    """Share of all steps over which the rate rises, from 1/(n + 1) of its peak in the first of n; a fixed number of
    steps can outlast a short run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's; 0 because LoRA's low rank already limits the change."""
    max_grad_norm: Above0 = 1.0
    """Gradients are clipped to this norm; transformers' default."""
    temperature: Above0 = 0.05
    """Similarities are divided by it before the softmax; 0.05 is sentence-transformers' scale of 20."""
    max_seq_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens per text, special tokens included; None chooses the shortest length that covers `length_coverage` of
    the training texts."""
    length_coverage: ShareAbove0 = 0.95
    """Share of texts that the chosen length holds whole."""
    lora_r: AtLeast1 = 16
    """Rank of the default LoRA."""
    lora_alpha: AtLeast1 = 32
    """Scale numerator of the default LoRA (scale = alpha / r)."""
    lora_layers: ShareAbove0 = 0.66
    """Share of the layers that the default LoRA adapts, counted from the last one; below 1, the hidden states below
    the first adapted layer are computed once for all epochs. 0.66: on the same folds all layers gave 0.768."""
    negatives: Literal["auto", "corpus", "answered"] = "auto"
    """Of `tune="query"`: what a query is compared with, "corpus" for all passages, "answered" for those that answer
    some training query or are its hard negatives. Passages that no query asks for are learnt to be wrong: that helps
    where there are many of them, and harms future queries about them where there are few. "auto" trains a linear map
    with both on three folds of the training queries, which takes seconds, and takes what did better."""
    adapter_scale: ShareAbove0 = 1.0
    """Share of the trained change that is evaluated and written: below 1, between base and trained model (WiSE-FT;
    Wortsman et al. 2022, arXiv 2109.01903). What `LoraEmbedding(adapter_scale=)` does to an adapter afterwards."""
    base_dropout: bool = False
    """Train with the dropout of the base's configuration. It takes longer, and gained nothing where it was tried."""
    fused_lora: bool = True
    """Compute a LoRA layer's training step in few large operations (`models.kernels.lora`)."""
    fused_attention: bool = True
    """On processors with bfloat16, compute attention in blocks that fit their cache (`models.kernels.attention`)."""
    fused_decoder: bool = True
    """On GPUs, compute RMSNorm, rotary embedding and gated MLP of decoders like Llama in one operation each; the last
    two need the extra `gpu` (`models.kernels.decoders`)."""
    cuda_graphs: bool = True
    """On one GPU, record the passes through the model and launch each at once (`models.kernels.cuda_graphs`)."""
    frozen_cache_mb: Annotated[float, Field(ge=0)] = 64.0
    """Megabytes of memory for the hidden states below the first adapted layer; more of them go into a temporary
    file, from which a step reads some megabytes. 0 computes them in every step, as GPUs do in any case."""
    memory_mb: AtLeast1 | Literal["auto"] = "auto"
    """Megabytes that the process may hold while it trains on a processor. A step is computed in chunks (GradCache), of
    which as many keep their activations as that allows; the others are encoded twice, and with little memory chunks
    are smaller. "auto" keeps up to three times the bytes of the model's weights, but no more than an eighth of the
    machine's memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """"bf16" computes training steps under bfloat16 autocast, "fp32" does not, "auto" uses bf16 where the processor
    or GPU has instructions for it and, on a processor, a short trial finds them faster. Weights stay float32 either
    way, and a resumed run keeps the precision of its checkpoint."""
    evaluation_steps: AtLeast0 = 50
    """Steps between evaluations, besides step 0 and the end of each epoch; 0 for epochs only. A step within a fifth of
    this number from an epoch's end is left to the evaluation there."""
    selection_passages: AtLeast0 = 500
    """Passages on which the steps are compared where the validation set has more, with as many of its queries as have
    their relevant passages among them (`evaluation.subset`); 0 compares on all. Base and kept step are evaluated on all
    passages either way."""
    early_stopping_patience: AtLeast0 = 0
    """Stop after this many evaluations in a row without a new best; 0 never stops."""
    best_metric: Text | None = None
    """Metric that chooses the step to keep, of those that the evaluation reports; None is nDCG@10 for queries and
    passages, ROC-AUC for pairs labelled 0 or 1 and Spearman's correlation for graded ones."""
    save_checkpoints: Annotated[bool, NOT_IN_RESULT] = False
    """Write checkpoints to `<model_output_path>.run`, from which an interrupted run can resume. Ctrl-C and SIGTERM
    save one in any case."""
    checkpoint_save_steps: Annotated[AtLeast1, NOT_IN_RESULT] = 500
    """Steps between checkpoints."""
    checkpoint_save_total_limit: Annotated[AtLeast0, NOT_IN_RESULT] = 0
    """Checkpoints kept; 0 keeps all."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Random seed of initialisation, order of batches, split and query generation."""
    show_progress_bar: Annotated[bool, NOT_IN_RESULT] = True
    """Show progress bars."""
    device: Annotated[Device | None, NOT_IN_RESULT] = None
    """torch device, such as "cpu" or "cuda:0"; None lets sentence-transformers choose."""
    trust_remote_code: Annotated[bool, NOT_IN_RESULT] = False
    """Run Python code that a model on the Hub brings along."""

    @classmethod
    def for_heuristic_queries(cls, **values: Any) -> TrainingSettings:
        """Defaults for queries that no LLM wrote, whose wording is soon learnt at the cost of human-written ones.

        Chosen on the documents of six sets, evaluated on the sets' queries (benchmarks/README.md, "Training without
        labels"): one epoch at 5e-4, because a second one lost on two of them; half of the change, at which none of four
        lost; and a longer `max_seq_length` only where it is needed for half of the texts, because the
        base lost 0.027 nDCG@10 on medquad when it read 512 tokens instead of its own 256. Batches of 32 and all layers,
        as they were chosen with.
        """
        defaults = {"epochs": 1, "learning_rate": 5e-4, "adapter_scale": 0.5, "length_coverage": 0.5}
        return cls(**{**defaults, "batch_size": 32, "lora_layers": 1.0, **values})

    @classmethod
    def for_written_queries(cls, **values: Any) -> TrainingSettings:
        """Defaults for queries that an LLM or people wrote: those of labelled data, which were chosen on such queries.

        As for heuristic queries, `max_seq_length` is raised only where half of the texts need it.
        """
        return cls(**{"length_coverage": 0.5, **values})

    @classmethod
    def for_small_batches(cls, **values: Any) -> TrainingSettings:
        """Defaults for labelled pairs, `tune="query"`, and fewer than 200 passages with queries.

        Larger batches were not tried on the former, and would leave the latter one or two steps in an epoch; they were
        tried on 250 passages and more.
        """
        return cls(**{"batch_size": 32, "epochs": 4, "learning_rate": 1e-3, "lora_layers": 1.0, **values})

    def for_windows(self) -> TrainingSettings:
        """The settings for texts that are read in windows: fewer epochs, each of which takes longer.

        On folds of tenk_train 3 epochs at 1.5e-3 were as good as 5 at 1e-3 (nDCG@10 0.767 and 0.768, means of two
        seeds). Without windows, on medquad_train, they lost 0.011. Nothing changes where one of the two is given.
        """
        if self.model_fields_set & {"epochs", "learning_rate"}:
            return self
        return self.replace(epochs=3, learning_rate=1.5e-3)
