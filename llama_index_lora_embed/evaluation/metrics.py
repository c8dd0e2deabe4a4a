"""Ranking metrics, computed by trec_eval (pytrec-eval-terrier)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_index_lora_embed.core.errors import DatasetError

DEPTH = 100
"""Ranks that any metric looks at."""

_MRR_CUTOFF = 10
_JUDGED_CUTOFF = 10
_GRADE_SCALE = 1000  # trec_eval takes integer grades; nDCG depends only on their ratio to the highest one of the query
# our names, which are the field's, and those of trec_eval
_TREC_NAMES = {
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
_LABELS = {
    **{"ndcg": "nDCG", "mrr": "MRR", "map": "MAP", "roc_auc": "ROC-AUC", "spearman": "Spearman"},
    "condensed_ndcg": "condensed nDCG",
}

NAMES = tuple(_TREC_NAMES)
"""Names of the metrics, all from 0 to 1."""
HEADLINE = NAMES[:5]
"""The metrics to show where there is little room."""
JUDGED_NAMES = ("judged@10", "bpref", "condensed_ndcg@10")
"""Further metrics where passages were judged irrelevant, so that the others are known to be unjudged."""


def compute_metrics(
    rankings: Mapping[str, Sequence[str]], relevance: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Compute the metrics of each ranking as trec_eval defines them.

    hit@k: 1 if at least one of the first k passages is relevant. mrr@10: 1 / rank of the first relevant passage, 0
    beyond rank 10. ndcg@10: the grade as gain and log2(rank + 1) as discount (Järvelin and Kekäläinen 2002). map@100:
    mean of the precision at the rank of each relevant passage, 0 for those beyond rank 100. recall@k: share of the
    relevant passages among the first k. precision@k: share of the first k that is relevant. A grade above 0 is
    relevant.

    All of these count an unjudged passage as wrong, which disadvantages a model whose passages were not judged. If
    `relevance` has grades of 0, unjudged passages are those without a grade, and there are three more metrics.
    judged@10: share of the first 10 that is judged. bpref: how few of the passages judged irrelevant are ranked above a
    relevant one, mean over the relevant ones (Buckley and Voorhees 2004). condensed_ndcg@10: ndcg@10 of the ranking
    without the unjudged passages (Sakai 2007). The latter two see the first 100 ranks.

    trec_eval sorts passages with equal scores by descending id, sentence-transformers by ascending id. Here the ranking
    is given, so there are no ties left.

    Args:
        rankings: Query id to passage ids, best first. Of a repeated passage the first rank counts; ranks beyond 100
            are ignored.
        relevance: Query id to passage id to grade. A grade of 0 or less means not relevant.

    Returns:
        Query id to metrics by name (`NAMES`, and `JUDGED_NAMES` where any grade is 0), in the order of `rankings`.

    Raises:
        DatasetError: A query has no relevant passage; all such queries are named.
    """
    import pytrec_eval

    grades = {q: {i: grade for i, grade in relevance.get(q, {}).items() if grade > 0} for q in rankings}
    unjudged = [query_id for query_id, graded in grades.items() if not graded]
    if unjudged:
        raise DatasetError(
            f"{len(unjudged)} of {len(rankings)} queries without judgments",
            "at least one relevant passage for each query",
            "Add judgments or leave these queries out:",
            [repr(query_id) for query_id in unjudged],
        )
    judgments: dict[str, dict[str, int]] = {}
    scores: dict[str, dict[str, float]] = {}
    for number, (query_id, ranking) in enumerate(rankings.items()):
        ranked, graded = list(dict.fromkeys(ranking))[:DEPTH], grades[query_id]
        judged = relevance[query_id]
        names: dict[str, str] = {}  # trec_eval cannot read every string as an id
        for passage_id in (*ranked, *judged):
            names.setdefault(passage_id, str(len(names)))
        key, highest = str(number), max(graded.values())
        judgments[key] = {
            names[i]: max(1, round(grade / highest * _GRADE_SCALE)) if grade > 0 else 0 for i, grade in judged.items()
        }
        scores[key] = {names[i]: float(-rank) for rank, i in enumerate(ranked)}
    run = {key: ranked for key, ranked in scores.items() if ranked}
    values = pytrec_eval.RelevanceEvaluator(judgments, {*_TREC_NAMES.values(), "bpref"}).evaluate(run)
    condensed = None
    if any(len(relevance[query_id]) > len(graded) for query_id, graded in grades.items()):
        condensed = pytrec_eval.RelevanceEvaluator(judgments, {"ndcg_cut_10"}, judged_docs_only_flag=True).evaluate(run)
    zeros = dict.fromkeys((*_TREC_NAMES.values(), "bpref"), 0.0)  # for a query with an empty ranking
    metrics: dict[str, dict[str, float]] = {}
    for number, query_id in enumerate(rankings):
        found = values.get(str(number), zeros)
        metrics[query_id] = {name: float(found[trec_name]) for name, trec_name in _TREC_NAMES.items()}
        if metrics[query_id]["mrr@10"] < 1 / _MRR_CUTOFF - 1e-9:
            metrics[query_id]["mrr@10"] = 0.0  # recip_rank has no cutoff
        if condensed is not None:
            first = list(scores[str(number)])[:_JUDGED_CUTOFF]
            share = sum(i in judgments[str(number)] for i in first) / len(first) if first else 1.0
            ndcg = condensed.get(str(number), zeros)["ndcg_cut_10"]
            metrics[query_id] |= zip(JUDGED_NAMES, (share, float(found["bpref"]), float(ndcg)), strict=True)
    return metrics


def query_metrics(ranking: Sequence[str], relevant: set[str]) -> dict[str, float]:
    """`compute_metrics` of one ranking with binary relevance."""
    return compute_metrics({"": ranking}, {"": dict.fromkeys(relevant, 1.0)})[""]


def metric_label(metric: str) -> str:
    """The name of a metric as papers write it: "nDCG@10"."""
    name, at, cutoff = metric.partition("@")
    return _LABELS.get(name, name.replace("_", " ")) + at + cutoff
