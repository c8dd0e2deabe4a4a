"""Settings as small frozen objects: the only place where a default is written.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal, TypeVar

from llama_index_lora_embed.errors import ConfigError

MANIFEST_NAME = "finetune.json"
"""File beside the adapter that says how it was made (see `adapter.Manifest`)."""

JOURNAL_NAME = "finetune_questions.journal.jsonl"
"""File in the working directory in which an LLM's answers are kept, where no other is named."""

S = TypeVar("S", bound="Settings")
# what torch and its extensions call their kinds of device
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu|mlu|musa|xla|mtia|privateuseone)(:\d+)?")


class Settings:
    """What all settings can do: name every value that cannot be used, at once."""

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        raise NotImplementedError

    def checked(self: S) -> S:
        """These settings, if every one of them can be used.

        Raises:
            ConfigError: Naming all that cannot.
        """
        if problems := self.problems():
            raise ConfigError(
                f"{len(problems)} unusable value(s) in {type(self).__name__}",
                "the values named below",
                "Correct them all:",
                problems,
            )
        return self

    def _need(self, found: list[str], name: str, ok: bool, expected: str) -> None:
        if not ok:
            found.append(f"{name}={getattr(self, name)!r}: expected {expected}")


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """How an adapter is trained.

    Attributes:
        batch_size: Passages per step, each with all its questions; every other passage of the batch is a
            negative. 32: measured on folds of tenk_train, 64 gained nothing (nDCG@10 0.760 against 0.763)
            and took twice the memory. "auto" takes 32, and where the device's memory does not hold such a step,
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
        fused_lora: Compute a LoRA layer's training step in few large operations (`training.fast_lora`).
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
    fused_lora: bool = True
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
        need("batch_size", self.batch_size == "auto" or _is_int(self.batch_size, 1),
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
            need(name, _is_int(getattr(self, name), 1), "a whole number of at least 1")
        for name in ("evaluation_steps", "early_stopping_patience", "checkpoint_save_total_limit"):
            need(name, _is_int(getattr(self, name), 0), "a whole number of at least 0")
        need("seed", _is_int(self.seed, 0) and self.seed < 2**32, "a whole number from 0 to below 2**32")
        device = self.device
        need("device", device is None or (isinstance(device, str) and bool(_DEVICE.fullmatch(device))),
             "None or a torch device: 'cpu', 'cuda', 'cuda:1', 'mps', 'xpu', ...")  # fmt: skip
        for name in ("learning_rate", "max_grad_norm", "temperature"):
            need(name, _is_number(getattr(self, name), above=0.0), "a number above 0")
        need("weight_decay", _is_number(self.weight_decay, above=-1e-12), "a number of at least 0")
        for name in ("warmup_ratio", "val_fraction"):
            value = getattr(self, name)
            need(name, _is_number(value, above=-1e-12) and value < 1, "a number from 0 to below 1")
        need("length_coverage", _is_number(self.length_coverage, above=0.0) and self.length_coverage <= 1,
             "a number above 0, at most 1")  # fmt: skip
        need("max_seq_length", self.max_seq_length is None or _is_int(self.max_seq_length, 3),
             "None or a whole number of at least 3 tokens")  # fmt: skip
        need("precision", self.precision in ("auto", "bf16", "fp32"), "'auto', 'bf16' or 'fp32'")
        need("lora_layers", _is_number(self.lora_layers, above=0.0) and self.lora_layers <= 1,
             "a number above 0, at most 1")  # fmt: skip
        need("frozen_cache_mb", _is_number(self.frozen_cache_mb, above=-1e-12), "a number of at least 0")
        for name in ("fused_lora", "save_checkpoints", "show_progress_bar", "trust_remote_code"):
            need(name, isinstance(getattr(self, name), bool), "True or False")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def lasting(self) -> dict[str, Any]:
        """Those that decide which weights are written; a resumed run may have others of the rest."""
        passing = ("show_progress_bar", "device", "save_checkpoints", "checkpoint_save_steps",
                   "checkpoint_save_total_limit", "trust_remote_code")  # fmt: skip
        return {name: value for name, value in self.to_dict().items() if name not in passing}


@dataclass(frozen=True)
class MiningSettings(Settings):
    """How hard negatives are mined.

    Attributes:
        num_negatives: Hard negatives per question, those of the dataset's own included; 3 is
            sentence-transformers' default, which recommends at most 10.
        range_min: Closest passages to skip, of those that nothing else excludes.
        range_max: Closest passages to look at. 100 because a candidate further down is no longer hard; a question
            that finds too few among them stays short, and `MiningReport.with_fewer` counts it.
        absolute_margin: A negative's similarity is at least this much below the positive's; None switches it off.
        relative_margin: A negative's similarity is below the positive's by at least this share of it. 0.05 is
            NV-Retriever's TopK-PercPos at 95 % (Moreira et al. 2024, arXiv 2407.15831), which
            sentence-transformers' miner recommends too; None switches it off.
        max_score: Highest cosine similarity to the question that a negative may have.
        sibling_window: Passages of the same document that stand up to so many places before or after a positive
            are no negatives; 0 for none, None for the whole document. 2 because an answer runs on in the next chunk.
        use_faiss: Search with FAISS, which is exact too; None does so from 100,000 passages where it is installed.
        batch_size: Texts encoded at once; sentence-transformers' default.
        memory_mb: Megabytes for the similarities of one chunk of questions, and as much for the candidates of
            one slice. The vectors of corpus and questions come on top, and FAISS's copy of the corpus'.
        rounds: How often to mine: 1 with the base alone, 2 once more with the model tuned on these, and so on.
        audit: Closest negatives that the report shows.
        show_progress_bar: Show a bar while encoding. sentence-transformers draws its own while searching.
    """

    num_negatives: int = 3
    range_min: int = 0
    range_max: int = 100
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    max_score: float | None = None
    sibling_window: int | None = 2
    use_faiss: bool | None = None
    batch_size: int = 32
    memory_mb: float = 256.0
    rounds: int = 1
    audit: int = 10
    show_progress_bar: bool = True

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        found: list[str] = []
        need = partial(self._need, found)
        for name in ("num_negatives", "range_max", "batch_size", "rounds"):
            need(name, _is_int(getattr(self, name), 1), "a whole number of at least 1")
        for name in ("range_min", "audit"):
            need(name, _is_int(getattr(self, name), 0), "a whole number of at least 0")
        if not found:
            least = self.range_min + self.num_negatives
            need("range_max", self.range_max >= least, f"at least range_min + num_negatives, which is {least}")
        need("absolute_margin", self.absolute_margin is None or _is_number(self.absolute_margin, above=-1e-12),
             "None or a number of at least 0")  # fmt: skip
        share = self.relative_margin
        need("relative_margin", share is None or (_is_number(share, above=-1e-12) and share < 1),
             "None or a number from 0 to below 1")  # fmt: skip
        top = self.max_score
        need("max_score", top is None or (_is_number(top, above=-1.0) and top <= 1),
             "None or a cosine similarity above -1, at most 1")  # fmt: skip
        need("sibling_window", self.sibling_window is None or _is_int(self.sibling_window, 0),
             "None or a whole number of at least 0")  # fmt: skip
        need("memory_mb", _is_number(self.memory_mb, above=0.0), "a number above 0")
        need("use_faiss", self.use_faiss is None or isinstance(self.use_faiss, bool), "None, True or False")
        need("show_progress_bar", isinstance(self.show_progress_bar, bool), "True or False")
        return found

    def lasting(self) -> dict[str, Any]:
        """Those that decide which negatives are found; a resumed run may have others of the rest."""
        passing = ("show_progress_bar", "audit", "batch_size", "memory_mb", "use_faiss")
        return {name: value for name, value in asdict(self).items() if name not in passing}


OBJECTIVES = ("in_batch", "soft_labels", "triplet", "cosent", "cosine", "distillation")
"""What `ObjectiveSettings.name` can be."""
IN_BATCH = ("in_batch", "soft_labels")
"""Those whose negatives are the other passages of the batch, and whose steps can be computed in pieces (GradCache)."""
FOR_PAIRS = ("cosent", "cosine")
"""Those that labelled pairs can be trained with."""
_FOR_IN_BATCH = ("mini_batch_size", "guide", "matryoshka_dims")


@dataclass(frozen=True)
class ObjectiveSettings(Settings):
    """What is trained.

    The softmaxes of "in_batch", "soft_labels", "cosent" and "distillation" take `TrainingSettings.temperature`.

    Attributes:
        name: None takes "in_batch" for questions and passages, "cosent" for labelled pairs.
            "in_batch": a question's passage against all others of the batch that are no false negatives (van den Oord
            et al. 2018, arXiv 1807.03748).
            "soft_labels": the same, with all of the question's passages in the batch as targets, in proportion to
            their relevance (Bruch et al. 2019, "An Analysis of the Softmax Cross Entropy Loss for Learning-to-Rank
            with Binary Relevance").
            "triplet": one negative for each passage, which is to be `triplet_margin` further off.
            "cosent": pairs in the order of their labels (Huang et al. 2024, doi 10.1109/TASLP.2024.3402087).
            "cosine": the cosine similarity of a pair is to be its label.
            "distillation": the similarities to a question's passages are to be distributed as a cross-encoder's
            scores (Ren et al. 2021, arXiv 2110.07367).
        mini_batch_size: Texts that are encoded at once, so that a batch of any size fits into memory, at the price of
            encoding each text twice (GradCache; Gao et al. 2021, arXiv 2101.06983). None encodes the whole batch.
        guide: Ignore in-batch negatives that the untuned base finds closer to the question than its own passage
            (GISTEmbed; Solatorio 2024, arXiv 2402.16829). Hard negatives of the dataset stay.
        guide_margin: How much less similar than the question's passage a negative must be to the guide; 0 is the
            paper's rule, a negative number lets more of them through.
        matryoshka_dims: Train the first so many dimensions of the vectors to be vectors of their own, too
            (Kusupati et al. 2022, arXiv 2205.13147). All of the dimensions are always among them.
        sibling_window: Passages of the same document that stand up to so many places before or after a question's
            passage are no negatives; 0 for none, None for the whole document. 2 as in `MiningSettings`.
        mask_near_duplicates: Passages with nearly the text of an answer are no negatives either.
        triplet_margin: In cosine distance. 0.1 is FaceNet's 0.2 (Schroff et al. 2015, arXiv 1503.03832), which is in
            squared Euclidean distance between unit vectors: twice the cosine distance.
        teacher: Cross-encoder with one score, as a folder or an id on the Hub; for "distillation".
    """

    name: str | None = None
    mini_batch_size: int | None = None
    guide: bool = False
    guide_margin: float = 0.0
    matryoshka_dims: tuple[int, ...] | None = None
    sibling_window: int | None = 2
    mask_near_duplicates: bool = True
    triplet_margin: float = 0.1
    teacher: str | None = None

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        found: list[str] = []
        need = partial(self._need, found)
        need("name", self.name is None or self.name in OBJECTIVES, f"None or one of {', '.join(OBJECTIVES)}")
        need("mini_batch_size", self.mini_batch_size is None or _is_int(self.mini_batch_size, 1),
             "None or a whole number of at least 1")  # fmt: skip
        margin = self.guide_margin
        need("guide_margin", _is_number(margin, above=-2.0 - 1e-12) and margin <= 2, "a number from -2 to 2")
        dims = self.matryoshka_dims
        sizes = list(dims) if isinstance(dims, (list, tuple)) else []
        need("matryoshka_dims",
             dims is None or (bool(sizes) and all(_is_int(d, 1) for d in sizes) and len(set(sizes)) == len(sizes)),
             "None or whole numbers of at least 1, each once")  # fmt: skip
        need("sibling_window", self.sibling_window is None or _is_int(self.sibling_window, 0),
             "None or a whole number of at least 0")  # fmt: skip
        need("triplet_margin", _is_number(self.triplet_margin, above=0.0) and self.triplet_margin <= 2,
             "a cosine distance above 0, at most 2")  # fmt: skip
        teacher = self.teacher
        need("teacher", teacher is None or (isinstance(teacher, str) and bool(teacher.strip())),
             "None or the folder or id of a cross-encoder")  # fmt: skip
        for name in ("guide", "mask_near_duplicates"):
            need(name, isinstance(getattr(self, name), bool), "True or False")
        if self.name == "distillation" and teacher is None:
            found.append("teacher=None: expected a cross-encoder, which name='distillation' learns from")
        elif teacher is not None and self.name != "distillation":
            found.append(f"teacher={teacher!r} with name={self.name!r}: only name='distillation' has a teacher")
        if self.name is not None and self.name not in IN_BATCH:
            found += [
                f"{name}={getattr(self, name)!r} with name={self.name!r}: only for 'in_batch' and 'soft_labels'"
                for name in _FOR_IN_BATCH
                if getattr(self, name)
            ]
        if margin and self.guide is False:
            found.append(f"guide_margin={margin!r} with guide=False: set guide=True, or leave the margin out")
        return found

    def name_for(self, pairs: bool) -> str:
        """The objective's name; for None the default of labelled pairs, or of questions and passages."""
        return self.name or ("cosent" if pairs else "in_batch")

    def misfits(self, *, pairs: bool, own_loss: bool) -> list[str]:
        """One line for each thing that does not go with labelled pairs, or with a loss of the user's own."""
        if own_loss:
            masks = {"sibling_window": self.sibling_window, "mask_near_duplicates": self.mask_near_duplicates}
            if self == ObjectiveSettings(**masks):  # type: ignore[arg-type]
                return []
            return [
                f"a loss together with {self}: expected one of the two; of the objective, only sibling_window and "
                "mask_near_duplicates go with a loss"
            ]
        if not pairs:
            return []
        names = [] if self.name_for(pairs) in FOR_PAIRS else ["name"]
        names += [name for name in _FOR_IN_BATCH if getattr(self, name)]
        if not names:
            return []
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return [
            f"labelled pairs with {given}: expected one of {', '.join(map(repr, FOR_PAIRS))}, or no objective for "
            "'cosent'; pairs that only say what belongs together can become questions and passages, which the other "
            "objectives train"
        ]

    def lasting(self, pairs: bool) -> dict[str, Any]:
        """What decides what is learnt, the default's name written out."""
        return {**asdict(self), "name": self.name_for(pairs)}


@dataclass(frozen=True)
class AskingSettings(Settings):
    """How an LLM is asked.

    Attributes:
        in_flight: Requests under way at once; None for 32, or 1 where the LLM has no asynchronous methods of its
            own (local models, mostly).
        attempts: Times that a request is made until it has a usable answer.
        timeout: Seconds until a call counts as failed; None waits for ever, as do LLMs that only have synchronous
            methods. Waiting for the LLM's rate limiter does not count.
        backoff: Seconds within which the first repetition comes at random; doubled each time.
        max_backoff: Seconds at most between repetitions.
        on_failure: "continue" counts a request without a usable answer and goes on, "fail" ends the run.
        max_requests: Calls after which a run stops cleanly; None for no bound.
        max_tokens: The same in tokens, as far as the LLM tells; what is under way then still ends. Plain text is asked
            for, because structured output comes without a count.
        show_progress: Show a bar.
    """

    in_flight: int | None = None
    attempts: int = 5
    timeout: float | None = 120.0
    backoff: float = 1.0
    max_backoff: float = 60.0
    on_failure: Literal["continue", "fail"] = "continue"
    max_requests: int | None = None
    max_tokens: int | None = None
    show_progress: bool = True

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        found: list[str] = []
        need = partial(self._need, found)
        need("attempts", _is_int(self.attempts, 1), "a whole number of at least 1")
        for name in ("in_flight", "max_requests", "max_tokens"):
            value = getattr(self, name)
            need(name, value is None or _is_int(value, 1), "None or a whole number of at least 1")
        for name in ("backoff", "max_backoff"):
            need(name, _is_number(getattr(self, name), above=0.0), "a number of seconds above 0")
        need("timeout", self.timeout is None or _is_number(self.timeout, above=0.0), "None or seconds above 0")
        need("on_failure", self.on_failure in ("continue", "fail"), "'continue' or 'fail'")
        need("show_progress", isinstance(self.show_progress, bool), "True or False")
        return found


NEAR_DUPLICATE = 0.9
"""Jaccard similarity of word 3-shingles from which passages count as the same: in 120 words two changed words that
stand apart, or a run of ten words added."""


@dataclass(frozen=True)
class FilterSettings(Settings):
    """Which questions are dropped before training. None or False switches a filter off.

    Attributes:
        unreadable: Drop questions with control characters, or with no letter or digit.
        max_words: Longer questions are dropped. 60: half as long again as the sentences that inverse cloze takes.
        max_characters: The same for scripts that write no spaces; 600 are 60 long words.
        repeated: Drop a question that was asked before about the same passage.
        max_passages_per_wording: Wordings asked about more passages than this say too little about each of them;
            all of theirs are dropped. 3, as for titles that nodes share (`TitleMaker`).
        near_duplicate_questions: Jaccard similarity of character 3-shingles from which a question about the same
            document counts as asked before. 0.85 lets a plural or a comma differ, and keeps "hypertension" from
            "hypotension" in a question of usual length; questions with different numbers are never the same.
        near_duplicate_passages: Similarity from which a passage is a copy of an earlier one; see
            `data.near_duplicates.near_duplicate_groups`.
        max_copied: Share of a question's runs of four words that may stand in its passage. 0.8 leaves room for a
            technical term of many words, and for no more than two or three words around a copied sentence.
        copy_min_words: Shorter questions may consist of the passage's words, as what people type often does.
        speaks_of_passage: Drop questions such as "What does the author say in this passage?", which nobody asks
            who does not have the passage before them.
        other_language: Drop questions in another language than their passage, where both are known.
        round_trip_k: Keep a question only if one of its answers is among so many nearest passages of the corpus.
            10: the depth of the measures here.
        round_trip_max_dropped: If the round trip would drop more than this share of the questions it judges, it is
            not applied: the embedding model is then worse at these texts than the questions are.
        examples: Dropped questions shown in the report for each reason.
    """

    unreadable: bool = True
    max_words: int | None = 60
    max_characters: int | None = 600
    repeated: bool = True
    max_passages_per_wording: int | None = 3
    near_duplicate_questions: float | None = 0.85
    near_duplicate_passages: float | None = NEAR_DUPLICATE
    max_copied: float | None = 0.8
    copy_min_words: int = 8
    speaks_of_passage: bool = True
    other_language: bool = True
    round_trip_k: int | None = 10
    round_trip_max_dropped: float = 0.5
    examples: int = 3

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        found: list[str] = []
        need = partial(self._need, found)
        for name in ("max_words", "max_characters", "max_passages_per_wording", "round_trip_k"):
            value = getattr(self, name)
            need(name, value is None or _is_int(value, 1), "None or a whole number of at least 1")
        for name in ("near_duplicate_questions", "near_duplicate_passages", "max_copied"):
            value = getattr(self, name)
            need(name, value is None or (_is_number(value, above=0.0) and value <= 1),
                 "None or a number above 0, at most 1")  # fmt: skip
        need("copy_min_words", _is_int(self.copy_min_words, 4), "a whole number of at least 4")
        need("examples", _is_int(self.examples, 0), "a whole number of at least 0")
        share = self.round_trip_max_dropped
        need("round_trip_max_dropped", _is_number(share, above=-1e-12) and share <= 1, "a number from 0 to 1")
        for name in ("unreadable", "repeated", "speaks_of_passage", "other_language"):
            need(name, isinstance(getattr(self, name), bool), "True or False")
        return found


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, above: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > above
