"""Base against tuned: the difference with its uncertainty, and a verdict that names what it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from llama_index_lora_embed.data.dataset import PEOPLE
from llama_index_lora_embed.errors import DatasetError
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation

_RESAMPLES = 2000
_METRIC = "ndcg@10"
# origins that say nothing of who asked; everything else but PEOPLE was made up
_UNKNOWN = "unknown"


class Verdict(str, Enum):
    """What a comparison comes to."""

    BETTER = "BETTER"
    NO_CLEAR_DIFFERENCE = "NO CLEAR DIFFERENCE"
    WORSE = "WORSE"
    NOT_EVALUATED = "NOT EVALUATED"


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same queries, compared.

    Attributes:
        verdict: BETTER or WORSE if the whole interval is on one side of 0.
        difference: Mean difference of nDCG@10, tuned minus base.
        interval: Its 95 % interval.
        queries: Number of queries compared.
        won: Queries with a higher nDCG@10.
        lost: Queries with a lower one.
        basis: Which questions it rests on, in words.
    """

    verdict: Verdict
    difference: float
    interval: tuple[float, float]
    queries: int
    won: int
    lost: int
    basis: str

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.verdict.value}: nDCG@10 {self.difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f}), "
            f"{self.won} queries won, {self.lost} lost of {self.queries}. {self.basis}"
        )


def compare(base: RetrievalEvaluation, tuned: RetrievalEvaluation, *, seed: int = 0) -> Comparison:
    """Compare two models on the same queries.

    The interval is a paired bootstrap over the queries (Efron and Tibshirani, 1993, chapter 13: percentiles of
    the mean difference over 2,000 resamples).

    Args:
        base: Evaluation of the base.
        tuned: Evaluation of the tuned model on the same dataset.
        seed: Of the resamples.

    Raises:
        DatasetError: The two were evaluated on different queries.
    """
    if base.per_query.keys() != tuned.per_query.keys():
        raise DatasetError(
            "two evaluations of different queries",
            "the same dataset for both",
            "Evaluate both on one dataset.",
        )
    differences = np.array([tuned.per_query[i][_METRIC] - base.per_query[i][_METRIC] for i in base.per_query])
    rng = np.random.default_rng(seed)
    means = [float(rng.choice(differences, len(differences)).mean()) for _ in range(_RESAMPLES)]
    low, high = (float(np.percentile(means, q)) for q in (2.5, 97.5))
    if low > 0:
        verdict = Verdict.BETTER
    elif high < 0:
        verdict = Verdict.WORSE
    else:
        verdict = Verdict.NO_CLEAR_DIFFERENCE
    return Comparison(
        verdict,
        float(differences.mean()),
        (low, high),
        len(differences),
        int((differences > 0).sum()),
        int((differences < 0).sum()),
        describe_basis(base.origins),
    )


def describe_basis(origins: dict[str, int]) -> str:
    """One sentence on which questions a verdict rests, and how far to trust it.

    Args:
        origins: Number of questions by how they were made.
    """
    made_up = {name: count for name, count in origins.items() if name not in (PEOPLE, _UNKNOWN)}
    people, unknown = origins.get(PEOPLE, 0), origins.get(_UNKNOWN, 0)
    parts = [f"{people} asked by people"] if people else []
    parts += [f"{count} made by {name.replace('_', ' ')}" for name, count in made_up.items()]
    parts += [f"{unknown} of unknown origin"] if unknown else []
    sentence = f"It rests on {', '.join(parts)}."
    if made_up and not people:
        sentence += (
            " Made-up questions flatter: they resemble those trained on more than your users' questions do. "
            "Judge by a val_dataset of real questions where you can."
        )
    return sentence
