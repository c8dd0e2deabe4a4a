import json

import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.origins import HUMAN
from llama_index_lora_embed.evaluation import label_queries
from tests.helpers.evaluation import WordCountEmbedding
from tests.helpers.judging import NODES, QUERIES, Judge, judged, models


class Person:
    """Types what was given, then grades by shared words; remembers what was shown."""

    def __init__(self, *typed, limit=None):
        self.typed, self.limit, self.asked = list(typed), limit, 0
        self.shown, self.pairs = [], []

    def show(self, text):
        self.shown.append(text)

    def ask(self, prompt):
        query = next(text for text in reversed(self.shown) if text.startswith("\nQuery")).split(": ", 1)[1]
        passage = next(text for text in reversed(self.shown) if text.startswith("Passage")).split("\n", 1)[1].strip()
        self.pairs.append((query, passage))
        self.asked += 1
        if self.limit is not None and self.asked > self.limit:
            raise EOFError
        return self.typed.pop(0) if self.typed else Judge().grade(query, passage)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels" / "answers.jsonl"


def labelled(person, path, queries=QUERIES[:4], nodes=NODES, pool=None, **kwargs):
    return label_queries(
        queries, nodes, models() if pool is None else pool, path, ask=person.ask, show=person.show, **kwargs
    )


def test_a_person_grades_what_an_llm_would_grade(path, tmp_path):
    person = Person()
    result = labelled(person, path, top_k=10)
    by_llm = judged(Judge(), tmp_path / "journal", queries=QUERIES[:4])
    assert result.grades == by_llm.grades
    assert result.dataset.origins() == {HUMAN: 4}
    assert result.dataset.relevant_docs.keys() == by_llm.dataset.relevant_docs.keys()
    assert result.report.llm is None
    assert person.asked == result.report.pooled == len(path.read_text().splitlines())
    assert "4 queries: 4 with a relevant passage" in person.shown[-1]
    again = judged(Judge(), tmp_path / "journal", queries=QUERIES[:4], human=result)
    assert again.report.agreement.kappa == pytest.approx(1)


def test_queries_for_which_the_person_found_nothing_count_in_the_agreement(path, tmp_path):
    queries = [*QUERIES[:2], "the price of tea"]
    mine = labelled(Person(), path, queries=queries, top_k=10)
    assert (mine.report.answered, mine.report.unanswered) == (2, 1)
    assert sorted(mine.queries.values()) == sorted(queries)
    found = judged(Judge(), tmp_path / "journal", queries=queries, human=mine).report.agreement
    assert (found.pairs, found.same, found.assumed) == (mine.report.pooled, 1, 0)

    class Lenient(Judge):
        def grade(self, query, passage):
            return "3" if query == queries[2] else super().grade(query, passage)

    wrong = len(mine.grades[next(i for i, text in mine.queries.items() if text == queries[2])])
    found = judged(Lenient(), tmp_path / "lenient", queries=queries, human=mine).report.agreement
    assert found.same == pytest.approx(1 - wrong / mine.report.pooled)


def test_grades_of_a_person_count_from_the_threshold_of_the_judge_on(path, tmp_path):
    mine = labelled(Person(), path, top_k=10)
    for threshold in (1, 3):
        again = judged(Judge(), tmp_path / "journal", queries=QUERIES[:4], human=mine, threshold=threshold)
        assert again.report.agreement.same == 1


def test_it_continues_where_it_stopped(path):
    stopped = labelled(Person(limit=13), path)
    assert len(path.read_text().splitlines()) == 13
    assert stopped.report.unfinished == 4 - len(stopped.dataset.queries)
    rest = Person()
    complete = labelled(rest, path)
    assert rest.asked == complete.report.pooled - 13
    assert complete.report.unfinished == 0
    nobody = Person()
    assert labelled(nobody, path).grades == complete.grades
    assert nobody.asked == 0
    more = Person()
    wider = labelled(more, path, pool={**models(), "third": WordCountEmbedding(dimensions=5)})
    assert more.asked == wider.report.pooled - complete.report.pooled, "only the new passages"


def test_quitting_at_once_leaves_an_empty_dataset(path):
    result = labelled(Person("q"), path)
    assert (result.report.unfinished, result.report.answered) == (4, 0)
    assert not result.dataset.queries
    assert not path.exists()


def test_undo_skip_and_wrong_keys(path):
    person = Person("u", "7", "x", "3", "u", " S ", "Q")
    labelled(person, path)
    assert "There is nothing to undo." in person.shown
    assert sum(text.startswith("Not understood") for text in person.shown) == 2
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == ["3", "u", "s"]
    first, *others = person.pairs
    assert others[:5] == [first, first, first, others[3], first], "the undone passage is asked for again"
    after = Person("u")
    result = labelled(after, path)
    assert after.pairs[1] == first, "an answer of an earlier session can be undone"
    assert result.report.ungraded == 0
    skipping = Person(*("u" for _ in range(result.report.pooled)), *("s" for _ in range(result.report.pooled)))
    path.unlink()
    nothing = labelled(skipping, path)
    assert nothing.report.ungraded == nothing.report.pooled
    assert nothing.report.unanswered == 4


def test_the_order_is_random_but_the_same_for_the_same_seed(path, tmp_path):
    runs = [Person(), Person(), Person()]
    for number, (person, seed) in enumerate(zip(runs, (0, 0, 1), strict=True)):
        labelled(person, tmp_path / f"{number}.jsonl", seed=seed)
    assert runs[0].pairs == runs[1].pairs != runs[2].pairs
    grades = [Judge().grade(*pair) for pair in runs[0].pairs]
    assert grades != sorted(grades, reverse=True)


def test_control_characters_do_not_reach_the_terminal(path):
    nodes = [TextNode(text="\x1b[2J red w1 \x07 w2", id_="a"), TextNode(text="green w1", id_="b")]
    person = Person()
    result = labelled(person, path, queries=["w1 \x1b[31m w2"], nodes=nodes)
    assert result.report.answered == 1
    assert not any("\x1b" in text or "\x07" in text for text in person.shown)
    assert labelled(Person(limit=0), path, queries=["w1 \x1b[31m w2"], nodes=nodes).grades == result.grades


@pytest.mark.parametrize("content", ["# Notes\n", '{"queries": {}}', "[1]\n", '{"query": 1}\n'])
def test_another_file_is_refused_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DatasetError, match="not a file of answers"):
        labelled(Person(), path)
    assert path.read_text() == content


def test_a_torn_last_line_costs_only_itself(path):
    labelled(Person(limit=5), path)
    path.write_bytes(path.read_bytes()[:-10])
    rest = Person()
    complete = labelled(rest, path)
    assert rest.asked == complete.report.pooled - 4
