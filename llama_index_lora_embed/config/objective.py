"""What is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from llama_index_lora_embed.config.base import Above0, AtLeast0, AtLeast1, Settings

Objective = Literal["in_batch", "soft_labels", "triplet", "cosent", "cosine", "distillation", "margin_mse"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
"""What `ObjectiveSettings.name` can be."""
DISTILLED = ("distillation", "margin_mse")
"""Those that learn a teacher's scores."""
IN_BATCH = ("in_batch", "soft_labels", *DISTILLED)
"""Those that compare a query with all passages of the batch, and whose steps can be computed in chunks (GradCache)."""
FOR_PAIRS = ("cosent", "cosine")
"""Those that labelled pairs can be trained with."""
_ONLY_FOR = {
    "mini_batch_size": IN_BATCH,
    "guide": ("in_batch", "soft_labels"),  # a teacher finds false negatives itself
    "matryoshka_dims": IN_BATCH,
    "contrastive_weight": DISTILLED,
    "teacher_temperature": ("distillation",),
}


class ObjectiveSettings(Settings):
    """What is trained.

    The softmaxes of the similarities use `TrainingSettings.temperature`.
    """

    name: Objective | None = None
    """None is "in_batch" for queries and passages, "cosent" for labelled pairs. "in_batch": a query's passage
    against all others of the batch that are no false negatives (van den Oord et al. 2018, arXiv 1807.03748).
    "soft_labels": the same, with all of the query's passages in the batch as targets, in proportion to their
    relevance (Bruch et al. 2019, "An Analysis of the Softmax Cross Entropy Loss for Learning-to-Rank with Binary
    Relevance"). "triplet": each passage against one negative, at a distance of `triplet_margin`. "cosent": pairs
    ranked by their labels (Huang et al. 2024, doi 10.1109/TASLP.2024.3402087). "cosine": regression of a pair's
    cosine similarity on its label. "distillation": the distribution of a cross-encoder's scores over a query's
    passage and hard negatives (Ren et al. 2021, arXiv 2110.07367; CADET, Tamber et al. 2025, arXiv 2505.19274); the
    default where there is a teacher. "margin_mse": the differences of these scores between the passage and each
    negative (Hofstätter et al. 2020, arXiv 2010.02666; GPL, Wang et al. 2021, arXiv 2112.07577)."""
    mini_batch_size: AtLeast1 | Literal["auto"] | None = "auto"
    """Texts encoded at once, so that a batch of any size fits into memory, at the price of encoding texts twice
    (GradCache; Gao et al. 2021, arXiv 2101.06983). "auto" does so on a processor with 8 passages or 32 queries at once,
    or fewer, and encodes only those twice whose activations `TrainingSettings.memory_mb` does not hold. None keeps the
    activations of the whole batch."""
    guide: bool = False
    """Ignore in-batch negatives that the untuned base finds closer to the query than its own passage (GISTEmbed;
    Solatorio 2024, arXiv 2402.16829). Hard negatives of the dataset are kept."""
    guide_margin: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """How much less similar than the query's passage a negative must be to the guide; 0 is the paper's rule, a
    negative number ignores fewer of them."""
    matryoshka_dims: tuple[AtLeast1, ...] | None = None
    """Train the first dimensions of the vectors, for each of these numbers, to be vectors of their own (Kusupati et
    al. 2022, arXiv 2205.13147). All dimensions are always among them."""
    sibling_window: AtLeast0 | None = 2
    """Passages of the same document within this distance of a query's passage are no negatives; 0 allows all of
    them, None excludes the whole document. 2 as in `MiningSettings`."""
    mask_near_duplicates: bool = True
    """Passages with nearly the text of a query's passage are no negatives either."""
    triplet_margin: Annotated[float, Field(gt=0, le=2)] = 0.1
    """In cosine distance. 0.1 is FaceNet's 0.2 (Schroff et al. 2015, arXiv 1503.03832), which is in squared
    Euclidean distance between unit vectors: twice the cosine distance."""
    contrastive_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of "in_batch" beside what is learnt from a teacher. None is CADET's 0.1 for "distillation", and 0 for
    "margin_mse", as in GPL."""
    teacher_temperature: Above0 = 0.3
    """The teacher's scores, which are scaled to 0 to 1, are divided by it before the softmax of "distillation"; 0.3
    is CADET's."""

    @field_validator("matryoshka_dims", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> ObjectiveSettings:
        wrong = []
        dims = self.matryoshka_dims
        if dims is not None and (not dims or len(set(dims)) < len(dims)):
            wrong.append(f"matryoshka_dims={dims!r}: expected None or whole numbers of at least 1, each once")
        if self.name is not None:
            wrong += self._ignored(_ONLY_FOR)
        if self.guide_margin and not self.guide:
            wrong.append(f"guide_margin={self.guide_margin!r} with guide=False: set guide=True, or remove guide_margin")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _given(self, fields: Iterable[str]) -> list[str]:
        """Those of the fields that do not have their default."""
        return [field for field in fields if getattr(self, field) != type(self).model_fields[field].default]

    def _ignored(self, fields: Iterable[str]) -> list[str]:
        """One line for each of the fields that is given and that this objective ignores."""
        ignored = [field for field in self._given(fields) if self.name not in _ONLY_FOR[field]]
        names = {field: ", ".join(map(repr, _ONLY_FOR[field])) for field in ignored}
        return [
            f"{field}={getattr(self, field)!r} with name={self.name!r}: only for {names[field]}" for field in ignored
        ]

    def without_teacher(self) -> list[str]:
        """One line for each field that needs a teacher."""
        if self.name in DISTILLED:
            return [f"objective {self.name!r} without a teacher: expected teacher=, a cross-encoder to learn from"]
        return self._ignored(["contrastive_weight", "teacher_temperature"])

    def weight_of_in_batch(self) -> float:
        """`contrastive_weight`, or its default for this objective."""
        if self.contrastive_weight is None:
            return 0.1 if self.name == "distillation" else 0.0
        return self.contrastive_weight

    def name_for(self, pairs: bool) -> str:
        """The objective's name; for None the default of labelled pairs, or of queries and passages."""
        return self.name or ("cosent" if pairs else "in_batch")

    def misfits(self, *, pairs: bool, own_loss: bool) -> list[str]:
        """One line for each field that cannot be combined with labelled pairs, or with a loss of the user's own."""
        if own_loss:
            masks = {"sibling_window": self.sibling_window, "mask_near_duplicates": self.mask_near_duplicates}
            if self == ObjectiveSettings(**masks):
                return []
            return [
                f"a loss together with {self}: expected one of the two; of the objective, only sibling_window and "
                "mask_near_duplicates go with a loss"
            ]
        if not pairs:
            return []
        names = [] if self.name_for(pairs) in FOR_PAIRS else ["name"]
        names += self._given(_ONLY_FOR)
        if not names:
            return []
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return [
            f"labelled pairs with {given}: expected one of {', '.join(map(repr, FOR_PAIRS))}, or no objective for "
            "'cosent'; pairs that only say what belongs together can become questions and passages, which the other "
            "objectives train"
        ]
