"""How queries came about: the names in `query_origins`, and what they have in common."""

from __future__ import annotations

HUMAN = "human"
"""Written by a person."""
LLM_JUDGED = "llm_judged"
"""Typed by a user; an LLM graded its passages."""
UNKNOWN = "unknown"
"""Not recorded."""
LLM_WRITTEN = "llm"
"""Written by an LLM; a style may follow, as in "llm/keywords"."""
METADATA = "metadata"
"""From the metadata of a node: what LlamaIndex's `QuestionsAnsweredExtractor` had an LLM write."""
TITLE = "title"
"""The title or heading of a passage, or the question that opens it."""
LEAD = "lead"
"""The first sentence of a passage."""
DEFINITION = "definition"
"""What a passage defines."""
INVERSE_CLOZE = "inverse_cloze"
"""A sentence of a passage."""
NEIGHBOUR = "neighbour"
"""The chunk before a passage."""

NOT_SYNTHETIC = frozenset({HUMAN, LLM_JUDGED, UNKNOWN})
"""Queries that people wrote or typed, or may have written."""
WRITTEN_BY_LLM = frozenset({LLM_WRITTEN, METADATA})
"""What an LLM wrote for the dataset; of the origin the part before a slash counts."""
PARTS_OF_PASSAGES = frozenset({LEAD, DEFINITION, INVERSE_CLOZE, NEIGHBOUR})
"""Words of the documents, which nearly every training brings closer to their passages."""
HEURISTIC = PARTS_OF_PASSAGES | {TITLE}
"""Taken from the documents by a rule."""


def origin_name(recorded: str) -> str:
    """The name of an origin read from a file; earlier versions wrote "people" for `HUMAN`."""
    return HUMAN if recorded == "people" else recorded
