"""How an LLM is asked for questions, and which questions are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from llama_index_lora_embed.config.base import Settings, is_int, is_number


@dataclass(frozen=True)
class LLMSettings(Settings):
    """How an LLM is asked.

    Attributes:
        in_flight: Requests under way at once; None for 32, or 1 where the LLM has no asynchronous methods of its
            own (local models, mostly).
        attempts: Times that a request is made until it has a usable answer.
        timeout: Seconds until a call counts as failed; None waits for ever, as do LLMs that only have synchronous
            methods. Waiting for the LLM's rate limiter does not count.
        backoff: Seconds within which the first repetition comes at random; doubled each time.
        max_backoff: Seconds at most between repetitions.
        on_failure: "continue" counts a request without a usable answer and goes on, "fail" ends the run.
        max_requests: Calls after which a run stops cleanly; None for no bound.
        max_tokens: The same in tokens, as far as the LLM tells; what is under way then still ends. Plain text is asked
            for, because structured output comes without a count.
        show_progress: Show a bar.
    """

    in_flight: int | None = None
    attempts: int = 5
    timeout: float | None = 120.0
    backoff: float = 1.0
    max_backoff: float = 60.0
    on_failure: Literal["continue", "fail"] = "continue"
    max_requests: int | None = None
    max_tokens: int | None = None
    show_progress: bool = True

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        found: list[str] = []
        need = partial(self._need, found)
        need("attempts", is_int(self.attempts, 1), "a whole number of at least 1")
        for name in ("in_flight", "max_requests", "max_tokens"):
            value = getattr(self, name)
            need(name, value is None or is_int(value, 1), "None or a whole number of at least 1")
        for name in ("backoff", "max_backoff"):
            need(name, is_number(getattr(self, name), above=0.0), "a number of seconds above 0")
        need("timeout", self.timeout is None or is_number(self.timeout, above=0.0), "None or seconds above 0")
        need("on_failure", self.on_failure in ("continue", "fail"), "'continue' or 'fail'")
        need("show_progress", isinstance(self.show_progress, bool), "True or False")
        return found


NEAR_DUPLICATE = 0.9
"""Jaccard similarity of word 3-shingles from which passages count as the same: in 120 words two changed words that
stand apart, or a run of ten words added."""


@dataclass(frozen=True)
class QueryFilterSettings(Settings):
    """Which questions are dropped before training. None or False switches a filter off.

    Attributes:
        unreadable: Drop questions with control characters, or with no letter or digit.
        max_words: Longer questions are dropped. 60: half as long again as the sentences that inverse cloze takes.
        max_characters: The same for scripts that write no spaces; 600 are 60 long words.
        repeated: Drop a question that was asked before about the same passage.
        max_passages_per_wording: Wordings asked about more passages than this say too little about each of them;
            all of theirs are dropped. 3, as for titles that nodes share (`TitleQueryGenerator`).
        near_duplicate_questions: Jaccard similarity of character 3-shingles from which a question about the same
            document counts as asked before. 0.85 lets a plural or a comma differ, and keeps "hypertension" from
            "hypotension" in a question of usual length; questions with different numbers are never the same.
        near_duplicate_passages: Similarity from which a passage is a copy of an earlier one; see
            `data.near_duplicates.near_duplicate_groups`.
        max_copied: Share of a question's runs of four words that may stand in its passage. 0.8 leaves room for a
            technical term of many words, and for no more than two or three words around a copied sentence.
        copy_min_words: Shorter questions may consist of the passage's words, as what people type often does.
        speaks_of_passage: Drop questions such as "What does the author say in this passage?", which nobody asks
            who does not have the passage before them.
        other_language: Drop questions in another language than their passage, where both are known.
        round_trip_k: Keep a question only if one of its answers is among so many nearest passages of the corpus.
            10: the depth of the measures here.
        round_trip_max_dropped: If the round trip would drop more than this share of the questions it judges, it is
            not applied: the embedding model is then worse at these texts than the questions are.
        examples: Dropped questions shown in the report for each reason.
    """

    unreadable: bool = True
    max_words: int | None = 60
    max_characters: int | None = 600
    repeated: bool = True
    max_passages_per_wording: int | None = 3
    near_duplicate_questions: float | None = 0.85
    near_duplicate_passages: float | None = NEAR_DUPLICATE
    max_copied: float | None = 0.8
    copy_min_words: int = 8
    speaks_of_passage: bool = True
    other_language: bool = True
    round_trip_k: int | None = 10
    round_trip_max_dropped: float = 0.5
    examples: int = 3

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        found: list[str] = []
        need = partial(self._need, found)
        for name in ("max_words", "max_characters", "max_passages_per_wording", "round_trip_k"):
            value = getattr(self, name)
            need(name, value is None or is_int(value, 1), "None or a whole number of at least 1")
        for name in ("near_duplicate_questions", "near_duplicate_passages", "max_copied"):
            value = getattr(self, name)
            need(name, value is None or (is_number(value, above=0.0) and value <= 1),
                 "None or a number above 0, at most 1")  # fmt: skip
        need("copy_min_words", is_int(self.copy_min_words, 4), "a whole number of at least 4")
        need("examples", is_int(self.examples, 0), "a whole number of at least 0")
        share = self.round_trip_max_dropped
        need("round_trip_max_dropped", is_number(share, above=-1e-12) and share <= 1, "a number from 0 to 1")
        for name in ("unreadable", "repeated", "speaks_of_passage", "other_language"):
            need(name, isinstance(getattr(self, name), bool), "True or False")
        return found
