"""The verdict of a comparison, and the evidence that it rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np

from llama_index_lora_embed.data.headings import MIN_HEADINGS
from llama_index_lora_embed.data.origins import HUMAN, LLM_JUDGED, TITLE, UNKNOWN, WRITTEN_BY_LLM
from llama_index_lora_embed.evaluation.metrics import metric_label
from llama_index_lora_embed.evaluation.significance import MIN_QUERIES, paired_intervals

TOLERANCE = 0.01
"""Accepted loss of nDCG@10: with 0, the width of the interval would let only a clear gain pass."""
TRANSFER_MARGIN = 0.01
"""How far above 0 the interval of the difference on kept-back headings must lie for LIKELY BETTER. Of 66 trained
models that lost on human-written queries, 10 passed without a margin and 3 with it, beside 20 and 10 that gained
(benchmarks/README.md, "Verdicts")."""


class Verdict(str, Enum):
    """Outcome of a comparison."""

    BETTER = "BETTER"
    LIKELY_BETTER = "LIKELY BETTER"
    NO_CLEAR_DIFFERENCE = "NO CLEAR DIFFERENCE"
    WORSE = "WORSE"
    NOT_EVALUATED = "NOT EVALUATED"


class Evidence(str, Enum):
    """What a verdict rests on, the strongest first."""

    HUMAN = "human-written queries"
    LOGGED = "logged queries judged by an LLM"
    PAIRS = "labelled pairs"
    UNKNOWN = "queries of unknown origin"
    LLM = "LLM-written queries"
    HEURISTIC = "heuristic queries"

    @property
    def rank(self) -> int:
        """0 for the strongest."""
        return list(Evidence).index(self)

    @property
    def real(self) -> bool:
        """Whether a gain is BETTER without further words: people wrote the queries, or labelled the pairs."""
        return self.rank <= Evidence.PAIRS.rank


def evidence_of(origin: str) -> Evidence:
    """The evidence that queries of an origin are."""
    if origin == HUMAN:
        return Evidence.HUMAN
    if origin == LLM_JUDGED:
        return Evidence.LOGGED
    if origin == UNKNOWN:
        return Evidence.UNKNOWN
    return Evidence.LLM if origin.partition("/")[0] in WRITTEN_BY_LLM else Evidence.HEURISTIC


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same queries, or on the same labelled pairs, compared.

    Attributes:
        verdict: BETTER or WORSE if the whole interval is on one side of 0; on synthetic queries see `weigh`.
        difference: Difference in the metric, tuned minus base; for queries, its mean.
        interval: 95 % confidence interval of the difference.
        queries: Number of queries, or of pairs, that the verdict rests on.
        improved: Queries with a higher nDCG@10; pairs that are ranked better (see `compare_pairs`).
        degraded: Queries with a lower nDCG@10; pairs that are ranked worse.
        evidence: What the verdict rests on.
        basis: Further words about it.
        unchanged: Whether no query, with part in the verdict or without, has another nDCG@10.
        metric: "ndcg@10" for queries; "roc_auc" for pairs labelled 0 and 1, "spearman" for graded pairs.
    """

    verdict: Verdict
    difference: float
    interval: tuple[float, float]
    queries: int
    improved: int
    degraded: int
    evidence: Evidence
    basis: str = ""
    metric: str = "ndcg@10"
    unchanged: bool = False

    def accepts(self, tolerance: float) -> bool:
        """Whether the tuned model may replace the base: `RunRegistry.gate` and `reindex` ask this.

        Args:
            tolerance: Accepted loss of the metric: how far below 0 the interval may reach. On synthetic queries, which
                do not show a loss, only LIKELY BETTER and no difference at all are accepted; on fewer than ten queries
                nothing is.
        """
        if self.queries < MIN_QUERIES:
            return False
        if self.evidence.rank <= Evidence.UNKNOWN.rank:
            return self.interval[0] >= -tolerance
        return self.verdict is Verdict.LIKELY_BETTER or self.unchanged

    def meets(self, requirement: Literal["better", "no-worse"], tolerance: float = TOLERANCE) -> bool:
        """Whether the verdict is what a program asks for.

        Args:
            requirement: "better" asks for BETTER, which synthetic queries never give; "no-worse" for `accepts`.
            tolerance: Of "no-worse".
        """
        return self.verdict is Verdict.BETTER if requirement == "better" else self.accepts(tolerance)

    def __str__(self) -> str:
        low, high = self.interval
        counts = f"{self.improved} of {self.queries} queries improved, {self.degraded} degraded"
        if self.metric != "ndcg@10":
            counts = f"{self.improved} of {self.queries} pairs ranked better, {self.degraded} worse"
        return (
            f"{self.verdict.value} on {self.queries} {self.evidence.value}: {metric_label(self.metric)} "
            f"{self.difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f}), {counts}. {self.basis}"
        ).strip()


def decide(interval: tuple[float, float], enough: bool, better: Verdict = Verdict.BETTER) -> Verdict:
    """The verdict for the interval of a difference, if there are enough queries or pairs for one.

    Args:
        interval: Of the difference, tuned - base.
        enough: Whether there are enough queries or pairs.
        better: What a gain is called.
    """
    if enough and interval[0] > 0:
        return better
    return Verdict.WORSE if enough and interval[1] < 0 else Verdict.NO_CLEAR_DIFFERENCE


@dataclass(frozen=True)
class Weighed:
    """What `weigh` found: the verdict, the queries that it rests on, their difference and what kind they are."""

    verdict: Verdict
    query_ids: list[str]
    interval: tuple[float, float]
    evidence: Evidence
    basis: str


def weigh(
    changes: Mapping[str, float], origins: Mapping[str, str], trained_on: Collection[str] | None, *, seed: int = 0
) -> Weighed:
    """The verdict on the strongest evidence among the queries.

    - Queries that people wrote or typed, at least ten: BETTER or WORSE if the interval of the difference is on one
      side of 0. Weaker evidence is not looked at.
    - Queries of unknown origin: the same, but a gain is LIKELY BETTER.
    - Synthetic queries: a gain on kinds that were trained on says nothing, because it comes with losses on
      human-written queries as well as with gains. LIKELY BETTER needs 30 queries of kinds that were not trained on,
      with an interval above `TRANSFER_MARGIN`: headings, or LLM-written queries of another style (for which the error
      was not measured). Other heuristic queries are parts of passages, which nearly every training improves. WORSE is
      a loss on headings, trained on or not, on the kinds that were not trained on, or on all queries.

    Where there are fewer than ten queries of the strongest kind, the next one joins them. Passages that were trained on
    with other queries do not weaken the evidence, because users ask new questions about the same passages; the basis
    names their share (`compare(note=)`).

    The rules come from models that were evaluated on synthetic and on human-written queries (benchmarks/README.md,
    "Verdicts").

    Args:
        changes: Query id to difference in nDCG@10, tuned - base.
        origins: Query id to origin, for those that have one.
        trained_on: Origins of the queries that the tuned model was trained on; None if they are not known, which
            counts as all of them.
        seed: Random seed of the bootstrap.
    """
    by_evidence: dict[Evidence, list[str]] = {}
    for query_id in changes:
        by_evidence.setdefault(evidence_of(origins.get(query_id, UNKNOWN)), []).append(query_id)
    ids: list[str] = []
    for evidence in (Evidence.HUMAN, Evidence.LOGGED, Evidence.UNKNOWN):
        if evidence not in by_evidence:
            continue
        ids += by_evidence[evidence]
        enough = len(ids) >= MIN_QUERIES
        if not enough and len(ids) < len(changes):
            continue
        interval = _interval(changes, ids, seed)
        verdict = decide(interval, enough, Verdict.BETTER if evidence.real else Verdict.LIKELY_BETTER)
        basis = [] if enough else [_TOO_FEW]
        if left_out := len(changes) - len(ids):
            basis.append(f"{left_out} queries of other kinds have no part in it.")
        if evidence is Evidence.UNKNOWN:
            basis.append(_SAY_SO)
        return Weighed(verdict, ids, interval, evidence, " ".join(basis))
    synthetic = {i: change for i, change in changes.items() if i not in ids}  # fewer than ten
    return _weigh_synthetic(synthetic, {i: origins[i] for i in synthetic}, trained_on, seed)


def _weigh_synthetic(
    changes: Mapping[str, float], kinds: Mapping[str, str], trained_on: Collection[str] | None, seed: int
) -> Weighed:
    everything = list(changes)
    headings = [i for i in everything if kinds[i] == TITLE]
    kept_back = [i for i in everything if trained_on is not None and _transfers(kinds[i], trained_on)]
    transfer = len(kept_back) >= MIN_HEADINGS
    looked_at = [(ids, _interval(changes, ids, seed)) for ids in (kept_back, headings) if len(ids) >= MIN_HEADINGS]
    looked_at.append((everything, _interval(changes, everything, seed)))
    lost = [found for found in looked_at if found[1][1] < 0 and len(found[0]) >= MIN_QUERIES]
    ids, interval = (lost or looked_at)[0]
    verdict = Verdict.WORSE if lost else Verdict.NO_CLEAR_DIFFERENCE
    if transfer and not lost and interval[0] > TRANSFER_MARGIN:
        verdict = Verdict.LIKELY_BETTER
    counts = Counter(kinds[i].replace("_", " ") for i in ids)
    why = "They are of kinds that were trained on, where nearly every training gains, or parts of passages"
    if ids is kept_back:
        why = "They are of kinds that were not trained on"
    basis = [f"{why} ({', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))}).", _ASK_PEOPLE]
    if len(ids) < MIN_QUERIES:
        basis.insert(0, _TOO_FEW)
    evidence = max((evidence_of(kinds[i]) for i in ids), key=lambda e: e.rank)
    return Weighed(verdict, list(ids), interval, evidence, " ".join(basis))


def _transfers(kind: str, trained_on: Collection[str]) -> bool:
    """Whether a gain on a kind of synthetic queries is a gain on something that was not trained on."""
    if kind in trained_on:
        return False
    if evidence_of(kind) is not Evidence.LLM:
        return kind == TITLE
    # queries of an unnamed style may be of any style
    return "/" in kind and WRITTEN_BY_LLM.isdisjoint(trained_on)


_TOO_FEW = f"A verdict needs at least {MIN_QUERIES} queries."
_SAY_SO = "If people wrote them, dataset.with_origin('human') says so, and a gain is called BETTER."
_ASK_PEOPLE = (
    "Only real queries show whether users are served better: label twenty with label_queries(), or let an LLM judge "
    "logged ones with judge_queries(), and pass them as val_dataset."
)


def _interval(changes: Mapping[str, float], ids: Collection[str], seed: int) -> tuple[float, float]:
    return paired_intervals(np.array([[changes[i]] for i in ids]), seed=seed)[0]
