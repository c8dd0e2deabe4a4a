"""The scale on which passages are graded, an LLM's grade out of its answer, and the agreement of two judges."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama_index_lora_embed.data.questions.parsing import strip_reasoning

HIGHEST = 3
"""Best grade. The scale from 0 to 3 is that of TREC's Deep Learning tracks and of UMBRELA (Upadhyay et al. 2024, arXiv
2406.06519), whose grades by an LLM ranked systems as those of TREC's assessors did."""
THRESHOLD = 2
"""Lowest grade of a relevant passage, as in TREC's Deep Learning tracks."""

RUBRIC = """\
3: the passage is about the query and gives the whole answer
2: the passage answers the query in part, or the answer is hard to find in it
1: the passage is on the subject of the query, but does not answer it
0: the passage has nothing to do with the query"""

GRADING_PROMPT = """\
Search query: {query_str}

Passage:
---
{context_str}
---

How well does the passage answer the query, whatever their languages? The grades:
{rubric}

Reply with the grade alone, one digit.
"""
"""Asks for the grade of a passage."""

_NAMED = re.compile(r"(?:grade|score|rating|relevance)\W{0,6}(?:(?:is|of)\W{0,4})?(?=-?\d)", re.IGNORECASE)
# "2/3" is a grade; "2/5" and "1 or 2" are none, which the second group tells
_NUMBER = re.compile(
    r"(?<![0-9A-Za-z.,/])(-?\d+(?:[.,]\d+)?)(?![0-9A-Za-z])"
    r"(?:\s*(?:/|out of)\s*3\b)?(\s*(?:/|out of|-|–|or|to)\s*\d+)?"
)


def parse_grade(answer: str) -> int | None:
    """The grade in an LLM's answer: its last "Grade: ..." or else its only number; None if that is not 0 to 3.

    Small models repeat the words of a grade instead of its digit; without any number, the one grade of `RUBRIC` whose
    words are in the answer is taken.
    """
    text = strip_reasoning(answer)
    named = [match for place in _NAMED.finditer(text) if (match := _NUMBER.match(text, place.end()))]
    found = named[-1:] or list(_NUMBER.finditer(text))
    if not found:
        quoted = [line[0] for line in RUBRIC.splitlines() if line[3:] in text.lower()]
        return int(quoted[0]) if len(quoted) == 1 else None
    numbers = {-1.0 if match[2] else float(match[1].replace(",", ".")) for match in found}
    grade = numbers.pop() if len(numbers) == 1 else -1
    return int(grade) if grade in range(HIGHEST + 1) else None


@dataclass(frozen=True)
class Agreement:
    """How far grades agree with human labels.

    Attributes:
        pairs: Pairs of query and passage that both judged.
        same: Share of them on which both agree whether the passage is relevant.
        kappa: Cohen's kappa, 1 for full agreement and 0 for that of chance: of the grades with quadratic weights
            (Cohen 1968), where those below the threshold count as 0, which is what datasets keep of them; or of
            relevant or not where the human labels have no grades. NaN if all labels are the same.
        graded: Whether it is that of grades.
        assumed: Pairs without a human label, which count as not relevant because the labels name no irrelevant ones.
    """

    pairs: int
    same: float
    kappa: float
    graded: bool
    assumed: int

    def __str__(self) -> str:
        kind = "weighted kappa" if self.graded else "kappa"
        value = "undefined, because all labels are the same" if math.isnan(self.kappa) else f"{self.kappa:.2f}"
        text = f"{self.same:.0%} of {self.pairs} human labels agree on relevant or not; Cohen's {kind} is {value}"
        if self.assumed:
            text += f" ({self.assumed} passages without a human label count as not relevant)"
        return text


def agreement(
    grades: Sequence[int], human: Sequence[float | None], *, threshold: int, graded: bool
) -> Agreement | None:
    """Compare grades with human labels for the same pairs; None if there are none.

    Args:
        grades: 0 to 3.
        human: For each of them the human grade, 0 (not relevant) to 1; None if it is assumed to be 0.
        threshold: Lowest grade that counts as relevant.
        graded: Whether human labels have grades; otherwise they are only relevant or not.
    """
    from sklearn.metrics import cohen_kappa_score

    if not grades:
        return None
    relevant = [grade >= threshold for grade in grades]
    labels = [bool(label) for label in human]
    ours: list[int] = [*relevant]
    theirs: list[int] = [*labels]
    if graded:
        ours = [grade if grade >= threshold else 0 for grade in grades]
        theirs = [round((label or 0) * HIGHEST) for label in human]
    kappa = math.nan
    if len({*ours, *theirs}) > 1:
        scale = list(range(HIGHEST + 1 if graded else 2))
        kappa = float(cohen_kappa_score(ours, theirs, labels=scale, weights="quadratic" if graded else None))
    same = sum(left == right for left, right in zip(relevant, labels, strict=True)) / len(grades)
    return Agreement(len(grades), same, kappa, graded, sum(label is None for label in human))
