"""Measures of rankings, by trec_eval (pytrec-eval-terrier)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_index_lora_embed.core.errors import DatasetError

DEPTH = 100
"""Places of a ranking that any measure looks at."""

_CUT = 10
_GRADES = 1000  # trec_eval takes whole numbers; nDCG is the same whatever the highest of a query's grades is called
# our names, which are the field's, and trec_eval's
_TREC = {
    "hit@1": "success_1",
    "hit@5": "success_5",
    "mrr@10": "recip_rank",
    "ndcg@10": "ndcg_cut_10",
    "recall@10": "recall_10",
    "hit@10": "success_10",
    "map@100": "map_cut_100",
    "recall@1": "recall_1",
    "recall@5": "recall_5",
    "precision@1": "P_1",
    "precision@5": "P_5",
    "precision@10": "P_10",
}
_ASKED = {"success.1,5,10", "recip_rank", "ndcg_cut.10", "map_cut.100", "recall.1,5,10", "P.1,5,10"}

NAMES = tuple(_TREC)
"""Names of the measures, all from 0 to 1."""
HEADLINE = NAMES[:5]
"""Those that stand alone where there is little room."""


def measure(
    rankings: Mapping[str, Sequence[str]], relevance: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Measures of each ranking, as trec_eval has them.

    hit@k: one relevant passage or more among the first k. mrr@10: 1 / rank of the first relevant one, 0 beyond 10.
    ndcg@10: the grade as gain and log2(rank + 1) as discount (Järvelin and Kekäläinen 2002). map@100: mean of the
    precision at the rank of each relevant passage, 0 for those beyond 100. recall@k: share of the relevant passages
    among the first k. precision@k: share of the first k that are relevant. A grade above 0 is relevant.

    trec_eval puts passages of one score in the reverse order of their ids, sentence-transformers in that of their
    ids. Here the order is given, so that nothing is tied any more.

    Args:
        rankings: Query id to passage ids, best first; of one that comes again the first place counts, and what is
            beyond the first hundred is not looked at.
        relevance: Query id to passage id to grade; what is graded 0 or less is not relevant, as if it were not there.

    Returns:
        Query id to measures by name (`NAMES`), in the order of `rankings`.

    Raises:
        DatasetError: A query has no relevant passage; all such queries are named.
    """
    import pytrec_eval

    grades = {q: {i: grade for i, grade in relevance.get(q, {}).items() if grade > 0} for q in rankings}
    unjudged = [query_id for query_id, graded in grades.items() if not graded]
    if unjudged:
        raise DatasetError(
            f"{len(unjudged)} of {len(rankings)} queries without judgments",
            "a relevant passage for each query",
            "Judge them or leave them out:",
            [repr(query_id) for query_id in unjudged],
        )
    judged: dict[str, dict[str, int]] = {}
    found: dict[str, dict[str, float]] = {}
    for number, (query_id, ranking) in enumerate(rankings.items()):
        places, graded = list(dict.fromkeys(ranking))[:DEPTH], grades[query_id]
        names: dict[str, str] = {}  # ids need not be what trec_eval can read
        for passage_id in (*places, *graded):
            names.setdefault(passage_id, str(len(names)))
        key, highest = str(number), max(graded.values())
        judged[key] = {names[i]: max(1, round(grade / highest * _GRADES)) for i, grade in graded.items()}
        found[key] = {names[i]: float(-rank) for rank, i in enumerate(places)}
    values = pytrec_eval.RelevanceEvaluator(judged, _ASKED).evaluate({k: v for k, v in found.items() if v})
    nothing = dict.fromkeys(_TREC.values(), 0.0)  # of a query that got no answer at all
    return {query_id: _by_name(values.get(str(number), nothing)) for number, query_id in enumerate(rankings)}


def query_metrics(ranking: Sequence[str], relevant: set[str]) -> dict[str, float]:
    """`measure` of one ranking under binary relevance.

    Args:
        ranking: Passage ids, best first.
        relevant: Ids of all relevant passages.
    """
    return measure({"": ranking}, {"": dict.fromkeys(relevant, 1.0)})[""]


def _by_name(values: Mapping[str, float]) -> dict[str, float]:
    measured = {name: float(values[theirs]) for name, theirs in _TREC.items()}
    if measured["mrr@10"] < 1 / _CUT - 1e-9:
        measured["mrr@10"] = 0.0  # trec_eval's has no end
    return measured
