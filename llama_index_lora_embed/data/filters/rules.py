"""Filters for generated queries: which ones are dropped before training, and why."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from llama_index.core.base.embeddings.base import BaseEmbedding

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.filters.language import detect, may_be_same
from llama_index_lora_embed.data.filters.round_trip import RoundTrip, round_trip
from llama_index_lora_embed.data.near_duplicates import Sketches, near_duplicate_groups
from llama_index_lora_embed.data.origins import HEURISTIC, HUMAN, LLM_JUDGED, NEIGHBOUR
from llama_index_lora_embed.data.text import is_unspaced, normalise, tokens_of

# Origins of queries that people wrote or typed, or that come from the documents. All others count as written for the
# dataset, mostly by an LLM, and so do those without an origin.
_NOT_WRITTEN = HEURISTIC | {HUMAN, LLM_JUDGED}

_RUN = 4  # words; runs of four are rarely shared by chance

# Phrases that only a reader of the passage understands. Each needs more than "text" or "author", because "How is text
# aligned?" and "Who is the author of Faust?" are good queries, and so is "according to article 5".
_NO_NUMBER = r"(?! \w?\.? ?\d)"
_TEXT_EN = r"(?:passage|excerpt|text|paragraph|snippet|context)"
_SOURCE_EN = rf"(?:{_TEXT_EN}|document|article|section){_NO_NUMBER}"
_SOURCE_DE = rf"(?:text\w*|abschnitts?|passage|auszugs?|absatz(?:es)?|dokuments?|artikels?|kontexts?){_NO_NUMBER}"
_SOURCE_FR = rf"(?:texte|passage|extrait|paragraphe|document|article|contexte){_NO_NUMBER}"
_SOURCE_ES = rf"(?:texto|pasaje|fragmento|extracto|p[áa]rrafo|documento|art[íi]culo|contexto){_NO_NUMBER}"
_PHRASES = {
    "en": (
        r"\bthis (?:passage|excerpt|text|paragraph|snippet)\b(?! messages?\b)",
        rf"\bthe (?:given|provided|above|following|preceding) (?:{_SOURCE_EN}|information|content)\b",
        rf"\b{_TEXT_EN} (?:above|provided|given)\b|\bbased on the (?:information|content) (?:provided|given|above)\b",
        rf"\b(?:according to|based on|as (?:stated|described|mentioned) in) (?:the|this) {_SOURCE_EN}",
        rf"\b(?:mentioned|described|discussed|stated|provided|listed|given) (?:in|by) (?:the|this) {_SOURCE_EN}",
        rf"\bdo(?:es)? (?:the|this) {_SOURCE_EN} (?:say|state|mention|describe|suggest|discuss|explain|imply|tell)\b",
        r"\bthe excerpt\b|\bthe passage\b(?! (?:of|through|from|to|into|between|across|along)\b)",
        r"^(?:what|who|which) (?:is|are|does|do) the text\b|^the text (?:is|describes|discusses|explains|says)\b",
        r"\baccording to the authors?\b|\bdo(?:es)? the authors? (?!need|have|retain|own|get|hold|keep|pay)\w+",
        r"\bthe authors? (?:say|state|mention|argue|describe|suggest|claim|propose|conclude|explain|believe|think)s?\b",
    ),
    "de": (
        rf"\b(?:laut|gemäß|nach) (?:dem|der|diesem|dieser|des)(?: \w+en)? {_SOURCE_DE}\b|\blaut {_SOURCE_DE}\b",
        r"\b(?:dieser|diese|dieses|diesen|diesem) (?:text|abschnitt|passage|textstelle|auszug)\b",
        rf"\bim (?:\w+en )?{_SOURCE_DE} (?:erwähnt|genannt|beschrieben|erklärt|angegeben|gesagt)\b",
        rf"\b(?:obige|vorliegende|gegebene|angegebene)[nmrs]? {_SOURCE_DE}\b",
        r"\b(?:laut|nach|gemäß) (?:dem|der|den) autor(?:in|en)?\b|\b(?:meint|sagt|schreibt|behauptet|argumentiert|"
        r"empfiehlt|erwähnt|beschreibt) (?:der|die) autor(?:in|en)?\b",
    ),
    "fr": (
        rf"\b(?:selon|d['’]apr[èe]s) (?:le |la |l['’]|ce |cet |cette ){_SOURCE_FR}\b",
        r"\b(?:dans ce texte|ce passage|cet extrait|ce paragraphe)\b",
        rf"\b{_SOURCE_FR} (?:ci-dessus|fourni|donn[ée])|\bmentionn\w+ dans (?:le |l['’]|ce |cet ){_SOURCE_FR}\b",
        r"\b(?:selon|d['’]apr[èe]s) (?:l['’]auteure?|les auteurs)\b|\bl['’]auteure? (?:dit|affirme|mentionne|d[ée]crit|"
        r"explique|sugg[èe]re|propose|pense)\b|\bque (?:dit|pense|affirme) l['’]auteur",
    ),
    "es": (
        rf"\b(?:según|de acuerdo (?:con|a)) (?:el|este) {_SOURCE_ES}\b",
        r"\ben este (?:texto|p[áa]rrafo)\b|\beste (?:pasaje|fragmento|extracto)\b",
        rf"\b{_SOURCE_ES} (?:anterior|proporcionado|dado|de arriba)\b|\bmencionad\w+ en el {_SOURCE_ES}\b",
        r"\bsegún (?:el autor|la autora|los autores)\b|\b(?:dice|afirma|menciona|describe|sugiere|propone|piensa) "
        r"(?:el autor|la autora)\b",
    ),
    # Chinese has no word boundaries: the lookarounds keep 日本文化, 文本文件, 线上文档 and the like
    "zh": (
        r"(?:根据|依据|按照)(?:本|该|这篇|这段|以上|上述|所给|给定|提供|的)*(?:文章|文本|文档|段落|短文|原文|上下文|文段|材料)",
        r"(?:从|在)(?:本|该|这篇|这段|以上|上述|所给|给定|提供|的)+(?:文章|文本|文档|段落|短文|原文|上下文|文段|材料|文)",
        r"这段(?:文字|话|文本|文章)|这篇文章|该(?:文章|段落|文本|段文字)|(?:^|[，,。在从])文中|(?:^|[，,。在从据如])上文(?!化|件|档|字)",
        r"(?<![日文基版样剧脚])本文(?!化|件|字|档|学|明)|(?:上述|以上)(?:文字|文本|段落|文章|材料|信息)",
        r"作者(?:认为|指出|提到|提出|建议|描述|强调|主张|如何看)",
    ),
}
_SPEAKS = re.compile("|".join(f"(?:{p})" for patterns in _PHRASES.values() for p in patterns), re.IGNORECASE)


@dataclass(frozen=True)
class QueryFilterReport:
    """How many queries were dropped, and why.

    Attributes:
        given: Queries before filtering.
        kept: Queries after filtering; with the sum of `dropped` this is `given`.
        dropped: Dropped queries by reason; each counts once, for the first filter that dropped it.
        examples: Some of the dropped queries, by reason.
        notes: Warnings that were issued.
        kept_hard: Queries among those kept whose passage BM25 finds and the embedding model of the round trip does
            not: what training can teach it.
    """

    given: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept_hard: int = 0

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.given} queries kept"]
        if self.kept_hard:
            lines.append(f"  {self.kept_hard} of them hard: found by BM25, not by the embedding model")
        for reason, count in self.dropped.items():
            lines.append(f"  {count} dropped: {reason}")
            lines += [f"    {' '.join(text.split())[:100]!r}" for text in self.examples.get(reason, [])]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


Drops = Iterator[tuple[str, str]]  # (query id, reason)


def filter_queries(
    dataset: EmbeddingQAFinetuneDataset,
    settings: QueryFilterSettings | None = None,
    *,
    embed_model: BaseEmbedding | Callable[[], BaseEmbedding] | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, QueryFilterReport]:
    """Drop queries that are not worth training on.

    The filters run in this order, each on the queries that the one before kept: unreadable or too long; repeated, too
    general, nearly repeated; about a copy of an earlier passage; copied from the passage; referring to the passage;
    in another language; not found again (`round_trip`). Human-written queries are dropped only where the same one
    occurs twice for the same passages, and are preferred to generated queries that say the same. The last four
    filters apply only to queries that were written for the dataset: not by people, nor taken from the documents.

    Args:
        dataset: Queries and corpus, or what `EmbeddingQAFinetuneDataset.coerce` takes.
        settings: What to drop; None takes `QueryFilterSettings()`.
        embed_model: For the round trip: a LlamaIndex embedding model, or a function that makes one and is called
            only if there are queries to check. None skips the round trip.

    Returns:
        The dataset of the queries kept, in their order and with the whole corpus, and the report.

    Raises:
        NonFiniteLossError: `embed_model` returns NaN or infinity.
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
    settings = settings or QueryFilterSettings()
    left = list(dataset.queries)
    reasons: dict[str, str] = {}
    for find in (_unreadable, _repeated, _too_general, _nearly_repeated, _about_copies, _copied, _speaking, _foreign):
        reasons.update(find(dataset, left, settings))
        left = [i for i in left if i not in reasons]
    trip = RoundTrip()
    if embed_model is not None and settings.round_trip_k is not None:
        checked = [i for i in _written(dataset, left) if _answers(dataset, i)]
        trip = round_trip(dataset, checked, settings.round_trip_k, settings, embed_model)
        searched = "the embedding model or of BM25" if settings.round_trip_keep_hard else "the embedding model"
        reason = f"none of its passages is among the first {settings.round_trip_k} of {searched}"
        reasons.update(dict.fromkeys(trip.lost, reason))
        left = [i for i in left if i not in reasons]
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for query_id, reason in reasons.items():
        texts[reason].append(dataset.queries[query_id])
    dropped = {reason: len(some) for reason, some in texts.items()}
    examples = {reason: some[: settings.examples] for reason, some in texts.items()}
    report = QueryFilterReport(len(dataset.queries), len(left), dropped, examples, trip.notes, len(trip.hard))
    return dataset.subset(left, dataset.corpus), report


def _written(dataset: EmbeddingQAFinetuneDataset, query_ids: Iterable[str]) -> list[str]:
    return [i for i in query_ids if dataset.origin_of(i) not in _NOT_WRITTEN]


def _human_first(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str]) -> list[str]:
    return sorted(query_ids, key=lambda i: dataset.origin_of(i) != HUMAN)


def _answers(dataset: EmbeddingQAFinetuneDataset, query_id: str) -> list[str]:
    return [i for i in dataset.relevant_docs.get(query_id, []) if i in dataset.corpus]


def _unreadable(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], settings: QueryFilterSettings) -> Drops:
    for query_id in query_ids:
        text, origin = dataset.queries[query_id], dataset.origin_of(query_id)
        if origin == HUMAN:
            continue
        if settings.unreadable and not any(map(str.isalnum, text)):
            yield query_id, "no letter or digit"
        elif settings.unreadable and any(unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() for c in text):
            yield query_id, "control characters"
        elif origin == NEIGHBOUR:
            continue  # it is a whole chunk on purpose
        elif settings.max_words is not None and len(text.split()) > settings.max_words:
            yield query_id, f"more than {settings.max_words} words"
        elif settings.max_characters is not None and len(text) > settings.max_characters:
            yield query_id, f"more than {settings.max_characters} characters"


def _repeated(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], settings: QueryFilterSettings) -> Drops:
    """Queries of which an earlier one has the same wording and all of the passages."""
    if not settings.repeated:
        return
    by_wording: defaultdict[str, set[str]] = defaultdict(set)
    for query_id in _human_first(dataset, query_ids):
        answers = _answers(dataset, query_id)
        before = by_wording[normalise(dataset.queries[query_id])]
        if answers and before.issuperset(answers):
            yield query_id, "repeats an earlier query about the same passage"
        before.update(answers)


def _too_general(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], settings: QueryFilterSettings) -> Drops:
    if settings.max_passages_per_wording is None:
        return
    # a set of answers counts once: a query with ten relevant passages is not ten queries
    answers: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for query_id in query_ids:
        answers[normalise(dataset.queries[query_id])].add(tuple(_answers(dataset, query_id)))
    for query_id in query_ids:
        many = len(answers[normalise(dataset.queries[query_id])]) > settings.max_passages_per_wording
        if many and dataset.origin_of(query_id) != HUMAN:
            yield query_id, f"same wording for more than {settings.max_passages_per_wording} passages"


def _nearly_repeated(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], settings: QueryFilterSettings) -> Drops:
    if settings.near_duplicate_queries is None:
        return
    texts, within = {}, {}
    for query_id in _human_first(dataset, query_ids):
        if dataset.origin_of(query_id) != NEIGHBOUR:
            texts[query_id] = text = dataset.queries[query_id]
            about = set(_answers(dataset, query_id))
            if dataset.origin_of(query_id) in _NOT_WRITTEN - {HUMAN}:
                about = {f"passage:{i}" for i in about}  # the chunks of a document rightly share its title
            else:
                about = {f"source:{dataset.source_of(i)}" for i in about}
            within[query_id] = "\0".join([*sorted(about), "", *_distinguishing(text)])
    sketches = Sketches(characters=True)
    groups = near_duplicate_groups(texts, settings.near_duplicate_queries, within=within, sketches=sketches)
    for query_id in query_ids:
        if groups.get(query_id, query_id) != query_id and dataset.origin_of(query_id) != HUMAN:
            yield query_id, "nearly repeats an earlier query about the same document"


def _distinguishing(text: str) -> list[str]:
    """What makes similar queries different: numbers, and single capitals after the first word (type A, type B)."""
    return sorted({token for token in tokens_of(text) if any(map(str.isdigit, token))}) + sorted(
        set(re.findall(r"(?<=\s)[A-Z]\b", text))
    )


def _about_copies(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], settings: QueryFilterSettings) -> Drops:
    if settings.near_duplicate_passages is None:
        return
    relevant = {i for query_id in query_ids for i in _answers(dataset, query_id)}
    texts = {i: text for i, text in dataset.corpus.items() if i in relevant}
    groups = dataset.near_duplicates(texts, settings.near_duplicate_passages)
    copies = {i for i, first in groups.items() if i != first}
    for query_id in query_ids:
        answers = _answers(dataset, query_id)
        if answers and copies.issuperset(answers) and dataset.origin_of(query_id) != HUMAN:
            yield query_id, "about a copy of an earlier passage"


def _copied(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], settings: QueryFilterSettings) -> Drops:
    if settings.max_copied is None:
        return
    for query_id in _written(dataset, query_ids):
        query = tokens_of(dataset.queries[query_id])
        passage = (dataset.training_passages or {}).get(query_id)
        passages = [dataset.corpus[i] for i in _answers(dataset, query_id)] if passage is None else [passage]
        if any(_copied_share(query, text, settings.copy_min_words) > settings.max_copied for text in passages):
            yield query_id, "copied from the passage"


def _copied_share(query: list[str], passage: str, min_words: int) -> float:
    """Share of the query's runs of four words that occur in the passage; 0 for a query of fewer than `min_words`.

    Runs, because single words of the passage belong in a query; a share, because a long quotation within a longer
    query is still copied.
    """
    factor = 2 if 2 * sum(map(is_unspaced, query)) > len(query) else 1  # characters per word without spaces
    run = _RUN * factor
    if len(query) < max(run, min_words * factor):
        return 0.0
    tokens = tokens_of(passage)
    there = {tuple(tokens[i : i + run]) for i in range(len(tokens) - run + 1)}
    runs = [tuple(query[i : i + run]) for i in range(len(query) - run + 1)]
    return sum(r in there for r in runs) / len(runs)


def _speaking(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], settings: QueryFilterSettings) -> Drops:
    if settings.speaks_of_passage:
        for query_id in _written(dataset, query_ids):
            if _SPEAKS.search(" ".join(dataset.queries[query_id].split())):
                yield query_id, "refers to the passage"


def _foreign(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], settings: QueryFilterSettings) -> Drops:
    if not settings.other_language:
        return
    language = cache(lambda passage_id: detect(dataset.corpus[passage_id]))
    for query_id in _written(dataset, query_ids):
        own = detect(dataset.queries[query_id])
        answers = _answers(dataset, query_id) if own else []
        if answers and not any(may_be_same(own, language(i)) for i in answers):
            yield query_id, "not in the language of its passage"
