"""Training and validation data of a request, checked row by row: inline rows, or a file of JSON lines.

A row is one of

- a pair: `{"query", "passage"}`, `[query, passage]`, or OpenAI's `{"messages"}` and `{"prompt", "completion"}`;
- a triplet: a pair with `negative` (one text or several) and, as far as wished, `score`, the grade of its passage above
  0 and at most 1; or OpenAI's `{"input", "preferred_output", "non_preferred_output"}`;
- a labelled pair: `{"text1", "text2", "score"}`, or a pair without negatives but with `score` from 0 to 1;
- a node: a text, or `{"text", "id", "metadata", "source_document"}`, or what LlamaIndex's `node.to_json()` wrote.

Pairs and triplets may be mixed; all rows of one source are of one kind otherwise. A file may also be one dataset, as
`EmbeddingQAFinetuneDataset.save_json` writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

from llama_index_lora_embed.core.errors import LoraEmbedError
from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset, LabelledPairs
from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.service.settings import ServiceSettings

Kind = Literal["queries", "pairs", "nodes"]
Rows = Iterable[tuple[str, Any]]
"""(place for messages, row)."""
_QUERY = ("query", "question", "anchor", "prompt")
_PASSAGE = ("passage", "positive", "pos", "document", "answer", "context", "completion")
_NEGATIVE = ("negative", "negatives", "neg", "hard_negatives")
_TEXT1 = ("text1", "sentence1")
_TEXT2 = ("text2", "sentence2")
_SCORE = ("score", "label")
_MOST_PROBLEMS = 100
_FORMS = (
    'a pair {"query", "passage"}, a triplet {"query", "passage", "negative"}, a labelled pair {"text1", "text2", '
    '"score"}, or a node {"text"}'
)


@dataclass(frozen=True)
class JobData:
    """Data of a job.

    Attributes:
        kind: What it is.
        dataset: Queries and passages, or labelled pairs; None for nodes.
        nodes: Nodes, for which queries are generated.
    """

    kind: Kind
    dataset: TrainingData | None = None
    nodes: list[TextNode] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it as the file that `FinetuneConfig` names: JSON of the dataset, or a node in each line.

        Raises:
            OSError: The disk is full or not writable.
        """
        if self.dataset is not None:
            self.dataset.save_json(path)
            return
        with whole_file(path) as file:
            file.writelines(node.to_json() + "\n" for node in self.nodes)


@dataclass(frozen=True)
class _Row:
    place: str
    query: str
    passage: str
    negatives: tuple[str, ...] = ()
    score: float | None = None
    labelled: bool = False
    symmetric: bool = False
    source: str | None = None


class _Problem(ValueError):
    pass


def read_data(
    rows: Rows, settings: ServiceSettings, problems: list[str], query_origin: str | None = None
) -> JobData | None:
    """The data of rows; None if something is wrong with them, which is then in `problems`, a line for each.

    `query_origin` is recorded of queries that say nothing themselves (`data.origins`).
    """
    found: list[_Row] = []
    nodes: list[TextNode] = []
    count, before = 0, len(problems)
    for place, row in rows:
        count += 1
        if count > settings.max_rows:
            problems.append(f"{place}: more than {settings.max_rows} rows")
            break
        if len(problems) - before >= _MOST_PROBLEMS:
            problems.append(f"{place}: not read on after {_MOST_PROBLEMS} problems")
            break
        if _is_dataset(row):
            if data := _dataset(place, row, settings, problems):
                return data
            continue
        try:
            parsed = _row(place, row, settings.max_row_characters)
        except _Problem as error:
            problems.append(f"{place}: {error}")
            continue
        (nodes if isinstance(parsed, TextNode) else found).append(parsed)  # type: ignore[arg-type]
    if len(problems) == before:
        problems += _kind_problems(found, nodes)
    if len(problems) > before:
        return None
    if nodes:
        return JobData("nodes", nodes=nodes)
    if found[0].labelled:
        pairs = LabelledPairs(
            [row.query for row in found],
            [row.passage for row in found],
            [row.score or 0.0 for row in found],
            symmetric=found[0].symmetric,
        )
        return JobData("pairs", pairs)
    dataset = _queries_and_passages(found, problems)
    if dataset is None:
        return None
    return JobData("queries", dataset if query_origin is None else dataset.with_origin(query_origin))


def inline_rows(name: str, rows: Sequence[Any]) -> Rows:
    """Rows of a request's field, with their places: "pairs[3]"."""
    return ((f"{name}[{number}]", row) for number, row in enumerate(rows))


def file_rows(path: Path, name: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Rows of a file of JSON lines; a line that is none goes to `problems`.

    Args:
        path: Of the file.
        name: What messages call it.
        problems: Where lines that are no JSON are named.
    """
    try:
        whole = json.loads(path.read_bytes())  # one JSON value: a dataset, or a list of rows
    except (ValueError, RecursionError):
        pass
    else:
        yield from inline_rows(name, whole) if isinstance(whole, list) else [(name, whole)]
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{name}, line {number}", json.loads(line)
            except (ValueError, RecursionError):
                problems.append(f"{name}, line {number}: no JSON in UTF-8: {line[:40].decode(errors='replace')!r}")
                if len(problems) > _MOST_PROBLEMS:
                    return


def _row(place: str, row: Any, longest: int) -> _Row | TextNode:
    """A row as a pair, a triplet, a labelled pair or a node."""
    if isinstance(row, str):
        return _node({"text": row}, longest)
    if isinstance(row, (list, tuple)):
        return _from_list(place, row, longest)
    if not isinstance(row, Mapping):
        raise _Problem(f"{row!r:.60}; expected {_FORMS}")
    if "messages" in row:
        query, passage = _last_of(row["messages"], "user"), _last_of(row["messages"], "assistant")
        return _Row(place, _text(query, "user message", longest), _text(passage, "assistant message", longest))
    if "preferred_output" in row:
        prompt = row.get("input")
        query = _last_of(prompt.get("messages") if isinstance(prompt, Mapping) else None, "user")
        passage = _last_of(row["preferred_output"], "assistant")
        negative = _last_of(row.get("non_preferred_output"), "assistant")
        return _Row(
            place,
            _text(query, "user message", longest),
            _text(passage, "preferred_output", longest),
            (_text(negative, "non_preferred_output", longest),),
        )
    query, text1 = _first(row, _QUERY), _first(row, _TEXT1)
    if query is None and text1 is None:
        if "text" in row:
            return _node(row, longest)
        raise _Problem(f"the fields {', '.join(map(repr, list(row)[:10])) or 'of an empty object'}; expected {_FORMS}")
    score = _score(_first(row, _SCORE))
    if text1 is not None:
        if score is None:
            raise _Problem("text1 without a score; expected a number from 0 to 1")
        texts = _text(text1, "text1", longest), _text(_first(row, _TEXT2), "text2", longest)
        return _Row(place, *texts, score=score, labelled=True, symmetric=True)
    negatives = _first(row, _NEGATIVE)
    several = negatives if isinstance(negatives, (list, tuple)) else [] if negatives is None else [negatives]
    labelled = score is not None and negatives is None
    if score == 0 and not labelled:
        raise _Problem("score=0 in a triplet; expected a grade above 0, because its passage is relevant")
    source = row.get("source_document")
    return _Row(
        place,
        _text(query, "query", longest),
        _text(_first(row, _PASSAGE), "passage", longest),
        tuple(_text(negative, "negative", longest) for negative in several),
        score=score,
        labelled=labelled,
        source=None if source is None else _text(source, "source_document", 1000),
    )


def _from_list(place: str, row: Sequence[Any], longest: int) -> _Row:
    """[query, passage], [query, passage, score], [query, passage, negative] or [query, passage, negative, score]."""
    if not 2 <= len(row) <= 4:
        raise _Problem(f"a list of {len(row)}; expected [query, passage], with a negative, a score or both after them")
    named = dict(zip(("query", "passage"), row, strict=False))
    rest = list(row[2:])
    if rest and not isinstance(rest[0], (int, float)):
        named["negative"] = rest.pop(0)
    if rest:
        named["score"] = rest.pop(0)
    if rest:
        raise _Problem("two numbers at the end of a list; expected one score")
    parsed = _row(place, named, longest)
    assert isinstance(parsed, _Row)
    return parsed


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _text(value: Any, name: str, longest: int) -> str:
    if value is None:
        raise _Problem(f"no {name}; expected {_FORMS}")
    if not isinstance(value, str):
        raise _Problem(f"{name}={value!r:.60}; expected text")
    if not value.strip():
        raise _Problem(f"an empty {name}")
    if len(value) > longest:
        raise _Problem(f"{name} of {len(value)} characters; expected at most {longest}")
    if value != value.encode(errors="ignore").decode():
        raise _Problem(f"{name} with half a character (a lone surrogate), which is not UTF-8")
    return value


def _score(value: Any) -> float | None:
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not 0 <= value <= 1
    ):
        raise _Problem(f"score={value!r:.60}; expected a number from 0 to 1")
    return float(value)


def _last_of(messages: Any, role: str) -> Any:
    """The content of the last message of a role; None if there is none."""
    if not isinstance(messages, (list, tuple)):
        return None
    contents = [m.get("content") for m in messages if isinstance(m, Mapping) and m.get("role") == role]
    return contents[-1] if contents else None


def _node(row: Mapping[str, Any], longest: int) -> TextNode:
    """A node of a row's own fields, or of those that decide what is embedded where LlamaIndex wrote it."""
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise _Problem("metadata that is no object")
    values: dict[str, Any] = {"text": _text(row["text"], "text", longest), "metadata": dict(metadata)}
    node_id = row.get("id", row.get("id_"))
    if node_id is not None:
        values["id_"] = _text(node_id, "id", 1000)
    for name in ("excluded_embed_metadata_keys", "metadata_template", "metadata_separator", "text_template"):
        if row.get(name) is not None:
            values[name] = row[name]
    try:
        node = TextNode(**values)
        node.get_content()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _Problem(f"a node that LlamaIndex refuses ({type(error).__name__})") from None
    source = row.get("source_document") or _source_in(row.get("relationships"))
    if source is not None:
        related = RelatedNodeInfo(node_id=_text(source, "source_document", 1000))
        node.relationships[NodeRelationship.SOURCE] = related
    return node


def _source_in(relationships: Any) -> Any:
    """The id of the source document in LlamaIndex's JSON of a node."""
    source = relationships.get(NodeRelationship.SOURCE.value) if isinstance(relationships, Mapping) else None
    return source.get("node_id") if isinstance(source, Mapping) else None


def _kind_problems(rows: list[_Row], nodes: list[TextNode]) -> list[str]:
    if not rows and not nodes:
        return ["no training data; expected at least one row"]
    if rows and nodes:
        return [f"{len(nodes)} nodes among {len(rows)} pairs; expected rows of one kind"]
    kinds = {(row.labelled, row.symmetric) for row in rows}
    if len(kinds) > 1:
        odd = next(row for row in rows if (row.labelled, row.symmetric) != (rows[0].labelled, rows[0].symmetric))
        return [f"{odd.place} is of another kind than {rows[0].place}; expected a score in all pairs or in none"]
    ids = [node.node_id for node in nodes]
    if len(set(ids)) < len(ids):
        return [f"{len(ids) - len(set(ids))} nodes repeat the id of another; expected each id once"]
    return []


def _queries_and_passages(rows: list[_Row], problems: list[str]) -> EmbeddingQAFinetuneDataset | None:
    """A dataset with each query and each passage once."""
    queries: dict[str, str] = {}  # text to id
    corpus: dict[str, str] = {}
    relevant: dict[str, dict[str, str]] = {}  # query id to passage id to place
    negatives: dict[str, dict[str, str]] = {}
    grades: dict[str, dict[str, float]] = {}
    sources: dict[str, str] = {}
    for row in rows:
        query = queries.setdefault(row.query, f"q{len(queries)}")
        passage = corpus.setdefault(row.passage, f"p{len(corpus)}")
        relevant.setdefault(query, {})[passage] = row.place
        if row.score is not None:
            grades.setdefault(query, {})[passage] = row.score
        if row.source is not None:
            sources[passage] = row.source
        for text in row.negatives:
            negatives.setdefault(query, {})[corpus.setdefault(text, f"p{len(corpus)}")] = row.place
    for query, passages in negatives.items():
        problems += [
            f"{place}: its negative is the passage of {relevant[query][passage]}, for the same query"
            for passage, place in passages.items()
            if passage in relevant[query]
        ]
    if problems:
        return None
    return EmbeddingQAFinetuneDataset(
        queries={i: text for text, i in queries.items()},
        corpus={i: text for text, i in corpus.items()},
        relevant_docs={query: list(passages) for query, passages in relevant.items()},
        hard_negatives={query: list(passages) for query, passages in negatives.items()} or None,
        relevance_scores=grades or None,
        source_documents=sources or None,
    )


def _is_dataset(row: Any) -> bool:
    return isinstance(row, Mapping) and {"queries", "corpus", "relevant_docs"} <= row.keys()


def _dataset(place: str, row: Mapping[str, Any], settings: ServiceSettings, problems: list[str]) -> JobData | None:
    """A whole dataset as `EmbeddingQAFinetuneDataset` and llama-index-finetuning write it."""
    try:
        dataset = EmbeddingQAFinetuneDataset.coerce(row).check("dataset")
        texts = [*dataset.queries.values(), *dataset.corpus.values(), *(dataset.training_passages or {}).values()]
        if len(texts) > settings.max_rows:
            raise _Problem(f"{len(texts)} queries and passages; expected at most {settings.max_rows}")
        for text in texts:
            _text(text, "text", settings.max_row_characters)
    except (LoraEmbedError, _Problem) as error:
        problems += [f"{place}: {line}" for line in getattr(error, "problems", None) or [str(error)]]
        return None
    return JobData("queries", dataset)
