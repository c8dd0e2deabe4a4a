"""How hard negatives are mined."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from llama_index_lora_embed.config.base import (
    NOT_IN_RESULT,
    Above0,
    AtLeast0,
    AtLeast1,
    Settings,
    ShareBelow1,
)


class MiningSettings(Settings):
    """How hard negatives are mined."""

    num_negatives: AtLeast1 = 3
    """Hard negatives per query, those of the dataset included; 3 is sentence-transformers' default, which recommends
    at most 10."""
    range_min: AtLeast0 = 0
    """Closest passages to skip, of those that nothing else excludes."""
    range_max: AtLeast1 = 100
    """Closest passages to look at. 100 because a candidate further down is no longer hard; a query that finds too
    few among them has fewer negatives, and `MiningReport.with_fewer` counts it."""
    absolute_margin: Annotated[float, Field(ge=0)] | None = None
    """A negative's similarity is at least this much below the positive's; None switches it off."""
    relative_margin: ShareBelow1 | None = 0.05
    """A negative's similarity is below the positive's by at least this share of it. 0.05 is NV-Retriever's
    TopK-PercPos at 95 % (Moreira et al. 2024, arXiv 2407.15831), which sentence-transformers' miner recommends too;
    None switches it off."""
    max_score: Annotated[float, Field(gt=-1, le=1)] | None = None
    """Highest cosine similarity to the query that a negative may have."""
    sibling_window: AtLeast0 | None = 2
    """Passages of the same document within this distance of a positive are no negatives; 0 allows all of them, None
    excludes the whole document. 2 because an answer often continues in the next chunk."""
    batch_size: Annotated[AtLeast1, NOT_IN_RESULT] = 32
    """Texts encoded at once; sentence-transformers' default."""
    memory_mb: Annotated[Above0, NOT_IN_RESULT] = 256.0
    """Megabytes for the similarities of some queries to all passages. The embeddings come on top."""
    rounds: AtLeast1 = 1
    """How often to mine: 1 with the base alone, 2 once more with the model tuned on these, and so on."""
    audit: Annotated[AtLeast0, NOT_IN_RESULT] = 10
    """Closest negatives that the report shows."""
    show_progress_bar: Annotated[bool, NOT_IN_RESULT] = True
    """Show a progress bar while encoding."""

    @model_validator(mode="after")
    def _range_holds_the_negatives(self) -> MiningSettings:
        least = self.range_min + self.num_negatives
        if self.range_max < least:
            raise ValueError(
                f"range_max={self.range_max}: expected at least range_min + num_negatives, which is {least}"
            )
        return self

    @classmethod
    def for_teacher(cls, **values: Any) -> MiningSettings:
        """Defaults where a teacher scores what is mined: no margin, because it finds the false negatives itself.

        As in GPL and CADET, whose negatives are the nearest passages as they come; learning from a passage that answers
        the query as well is what the teacher's score is for.
        """
        return cls(**{"relative_margin": None, **values})
