"""How queries are generated: requests to an LLM, and which queries are dropped."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llama_index_lora_embed.config.base import (
    Above0,
    AtLeast0,
    AtLeast1,
    Settings,
    Share,
    ShareAbove0,
)

GeneratorKind = Literal["title", "lead", "definition", "inverse_cloze", "neighbour", "metadata", "query_log", "llm"]

NEAR_DUPLICATE = 0.9
"""Jaccard similarity of word 3-shingles from which passages count as the same: in 120 words two changed words that
stand apart, or a run of ten words added."""


class QueryGeneratorSettings(Settings):
    """A query generator by reference, for configuration files."""

    kind: GeneratorKind
    """Which generator: the classes of `llama_index_lora_embed.data`, "llm" being `LLMQueryGenerator`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""


class LLMSettings(Settings):
    """How requests are sent to an LLM."""

    in_flight: AtLeast1 | None = None
    """Concurrent requests; None for 32, or 1 where the LLM has no asynchronous methods of its own (most local
    models)."""
    attempts: AtLeast1 = 5
    """Attempts at a request until it has a usable answer. What is given up gets as many again at the end of the run,
    and in the next run; where the LLM answered nothing usable that often, one each, up to twice this number."""
    timeout: Above0 | None = 120.0
    """Seconds until a call counts as failed; None never gives up, as do LLMs that only have synchronous methods.
    Waiting for the LLM's rate limiter does not count."""
    backoff: Above0 = 1.0
    """Seconds within which the first retry starts at random; doubled each time."""
    max_backoff: Above0 = 60.0
    """Longest wait between retries, in seconds."""
    on_failure: Literal["continue", "fail"] = "continue"
    """"continue" names requests without a usable answer in the report, "fail" ends the run at the first."""
    max_requests: AtLeast1 | None = None
    """Calls after which a run stops cleanly; None for no limit."""
    max_tokens: AtLeast1 | None = None
    """The same in tokens, as far as the LLM reports them; requests in flight still end. Plain text is requested
    then, because structured output comes without a count."""
    show_progress: bool = True
    """Show a progress bar."""


class QueryFilterSettings(Settings):
    """Which generated queries are dropped before training. None or False switches a filter off."""

    unreadable: bool = True
    """Drop queries with control characters, or without a letter or digit."""
    max_words: AtLeast1 | None = 60
    """Longer queries are dropped. 60: half as long again as the sentences that inverse cloze takes."""
    max_characters: AtLeast1 | None = 600
    """The same for scripts that write no spaces; 600 are 60 long words."""
    repeated: bool = True
    """Drop a query that an earlier one about the same passage repeats."""
    max_passages_per_wording: AtLeast1 | None = 3
    """Wordings used for more passages than this say too little about each of them; all of them are dropped. 3, as
    for titles that nodes share (`TitleQueryGenerator`)."""
    near_duplicate_queries: ShareAbove0 | None = 0.85
    """Jaccard similarity of character 3-shingles from which a query about the same document repeats another. 0.85
    lets a plural or a comma differ, and keeps "hypertension" from "hypotension" in a query of usual length; queries
    with different numbers are never the same."""
    near_duplicate_passages: ShareAbove0 | None = NEAR_DUPLICATE
    """Similarity from which a passage is a copy of an earlier one."""
    max_copied: ShareAbove0 | None = 0.8
    """Share of a query's runs of four words that may stand in its passage. 0.8 leaves room for a technical term of
    many words, and for no more than two or three words around a copied sentence."""
    copy_min_words: Annotated[int, Field(ge=4)] = 8
    """Shorter queries may consist of the passage's words, as what people type often does."""
    speaks_of_passage: bool = True
    """Drop queries such as "What does the author say in this passage?", which make sense only to a reader of the
    passage."""
    other_language: bool = True
    """Drop queries in another language than their passage, where both are known."""
    round_trip_k: AtLeast1 | None = 10
    """Keep a query only if one of its passages is among this many nearest passages of the corpus. 10: the depth of
    the metrics here. Promptagator (arXiv 2209.11755) takes 1, with a retriever that was trained on the queries
    before; the base was not."""
    round_trip_keep_hard: bool = True
    """Keep a query that the embedding model misses if BM25 ranks one of its passages among the first `round_trip_k`.
    Such queries are those to learn from: the embedding model alone would only keep what it can answer already. A pair
    that both searches miss is likely to be wrong."""
    round_trip_max_dropped: Share = 0.5
    """If the round trip would drop more than this share of the queries, it is not applied: the embedding model is
    then worse at these texts than the queries are."""
    examples: AtLeast0 = 3
    """Dropped queries shown in the report for each reason."""
