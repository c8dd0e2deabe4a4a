"""What is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from llama_index_lora_embed.config.base import Settings, is_int, is_number

OBJECTIVES = ("in_batch", "soft_labels", "triplet", "cosent", "cosine", "distillation")
"""What `ObjectiveSettings.name` can be."""
IN_BATCH = ("in_batch", "soft_labels")
"""Those whose negatives are the other passages of the batch, and whose steps can be computed in pieces (GradCache)."""
FOR_PAIRS = ("cosent", "cosine")
"""Those that labelled pairs can be trained with."""
_FOR_IN_BATCH = {"mini_batch_size": "auto", "guide": False, "matryoshka_dims": None}


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
            encoding nearly each text twice (GradCache; Gao et al. 2021, arXiv 2101.06983). "auto" does so on a
            processor with 8 passages at once, or 32 questions: on tenk half the memory for a quarter more time
            (benchmarks/README.md). None keeps the activations of the whole batch.
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
    mini_batch_size: int | Literal["auto"] | None = "auto"
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
        need("mini_batch_size", self.mini_batch_size in (None, "auto") or is_int(self.mini_batch_size, 1),
             "'auto', None or a whole number of at least 1")  # fmt: skip
        margin = self.guide_margin
        need("guide_margin", is_number(margin, above=-2.0 - 1e-12) and margin <= 2, "a number from -2 to 2")
        dims = self.matryoshka_dims
        sizes = list(dims) if isinstance(dims, (list, tuple)) else []
        need("matryoshka_dims",
             dims is None or (bool(sizes) and all(is_int(d, 1) for d in sizes) and len(set(sizes)) == len(sizes)),
             "None or whole numbers of at least 1, each once")  # fmt: skip
        need("sibling_window", self.sibling_window is None or is_int(self.sibling_window, 0),
             "None or a whole number of at least 0")  # fmt: skip
        need("triplet_margin", is_number(self.triplet_margin, above=0.0) and self.triplet_margin <= 2,
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
                for name, default in _FOR_IN_BATCH.items()
                if getattr(self, name) != default
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
        names += [name for name, default in _FOR_IN_BATCH.items() if getattr(self, name) != default]
        if not names:
            return []
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return [
            f"labelled pairs with {given}: expected one of {', '.join(map(repr, FOR_PAIRS))}, or no objective for "
            "'cosent'; pairs that only say what belongs together can become questions and passages, which the other "
            "objectives train"
        ]

    def result_affecting(self, pairs: bool) -> dict[str, Any]:
        """What decides what is learnt, the default's name written out."""
        return {**asdict(self), "name": self.name_for(pairs)}
