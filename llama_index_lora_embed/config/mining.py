"""How hard negatives are mined."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from llama_index_lora_embed.config.base import Settings, is_int, is_number


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
            need(name, is_int(getattr(self, name), 1), "a whole number of at least 1")
        for name in ("range_min", "audit"):
            need(name, is_int(getattr(self, name), 0), "a whole number of at least 0")
        if not found:
            least = self.range_min + self.num_negatives
            need("range_max", self.range_max >= least, f"at least range_min + num_negatives, which is {least}")
        need("absolute_margin", self.absolute_margin is None or is_number(self.absolute_margin, above=-1e-12),
             "None or a number of at least 0")  # fmt: skip
        share = self.relative_margin
        need("relative_margin", share is None or (is_number(share, above=-1e-12) and share < 1),
             "None or a number from 0 to below 1")  # fmt: skip
        top = self.max_score
        need("max_score", top is None or (is_number(top, above=-1.0) and top <= 1),
             "None or a cosine similarity above -1, at most 1")  # fmt: skip
        need("sibling_window", self.sibling_window is None or is_int(self.sibling_window, 0),
             "None or a whole number of at least 0")  # fmt: skip
        need("memory_mb", is_number(self.memory_mb, above=0.0), "a number above 0")
        need("use_faiss", self.use_faiss is None or isinstance(self.use_faiss, bool), "None, True or False")
        need("show_progress_bar", isinstance(self.show_progress_bar, bool), "True or False")
        return found

    def result_affecting(self) -> dict[str, Any]:
        """Those that decide which negatives are found; a resumed run may have others of the rest."""
        passing = ("show_progress_bar", "audit", "batch_size", "memory_mb", "use_faiss")
        return {name: value for name, value in asdict(self).items() if name not in passing}
