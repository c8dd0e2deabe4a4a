import random
import subprocess
import sys

import pytest
from llama_index.core.llms import CompletionResponse
from llama_index.core.schema import ImageNode, TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, compare_retrieval, evaluate_retrieval
from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, LLMError
from llama_index_lora_embed.data.origins import LLM_JUDGED
from tests.helpers.evaluation import WordCountEmbedding
from tests.helpers.judging import DATASET, NODES, QUERIES, Judge, judged, models, passage_of, query_of
from tests.helpers.llms import FAST, journalled


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "journal.jsonl")


def test_queries_without_labels_become_a_graded_dataset(journal):
    result = judged(Judge(), journal)
    dataset, report = result.dataset.check(), result.report
    assert sorted(dataset.queries.values()) == sorted(QUERIES)
    assert dataset.corpus == DATASET.corpus
    assert dataset.origins() == {LLM_JUDGED: len(QUERIES)}
    for query_id, text in dataset.queries.items():
        expected = {i: int(Judge().grade(text, DATASET.corpus[i])) for i in result.grades[query_id]}
        assert result.grades[query_id] == expected
        assert {i: dataset.score(query_id, i) for i in dataset.relevant_docs[query_id]} == {
            i: grade / 3 for i, grade in expected.items() if grade >= 2
        }
        assert set(dataset.judged_irrelevant[query_id]) == {i for i, grade in expected.items() if grade < 2}
    assert report.pooled == sum(report.grades.values()) == report.llm.requests
    assert f"{len(QUERIES)} queries: {len(QUERIES)} with a relevant passage" in str(report)
    assert "from base, tuned, BM25" in str(report)


def test_two_models_are_compared_on_it_and_a_third_is_told_what_was_not_judged(journal):
    pool = models()
    dataset = judged(Judge(), journal, pool=pool).dataset
    comparison = compare_retrieval(pool["base"], pool["tuned"], dataset)
    assert comparison.metrics["judged@10"].tuned == comparison.metrics["judged@10"].base == 1
    assert comparison.notes == []
    assert comparison.tuned.metrics["condensed_ndcg@10"] >= comparison.tuned.metrics["ndcg@10"]
    other = evaluate_retrieval(WordCountEmbedding(dimensions=5), dataset)
    assert other.metrics["judged@10"] < 1
    assert other.metrics["condensed_ndcg@10"] > other.metrics["ndcg@10"]
    share = f"{1 - other.metrics['judged@10']:.1%}"
    assert other.notes == [
        f"{share} of the first 10 passages of all rankings are unjudged: they count as wrong, except in bpref and "
        "condensed nDCG@10."
    ]


def test_its_file_is_read_by_llama_index_finetuning(journal, tmp_path):
    finetuning = pytest.importorskip("llama_index.finetuning")
    dataset = judged(Judge(), journal).dataset
    dataset.save_json(tmp_path / "judged.json")
    theirs = finetuning.EmbeddingQAFinetuneDataset.from_json(str(tmp_path / "judged.json"))
    assert (theirs.queries, theirs.relevant_docs) == (dataset.queries, dataset.relevant_docs)
    assert EmbeddingQAFinetuneDataset.from_json(tmp_path / "judged.json") == dataset


def test_each_request_shows_one_passage_and_each_pair_is_requested_once(journal):
    llm = Judge()
    result = judged(llm, journal, top_k=3)
    pairs = [(query_of(prompt), passage_of(prompt)) for prompt in llm.prompts]
    assert len(pairs) == len(set(pairs)) == result.report.pooled
    assert all(sum(text in prompt for text in DATASET.corpus.values()) == 1 for prompt in llm.prompts)


def test_the_pool_has_the_best_of_each_model_and_of_bm25(journal):
    nodes = [TextNode(text=f"w{i} w{i + 1}", id_=f"n{i}") for i in range(60)]
    nodes.append(TextNode(text="a long passage about many other things and one zebra", id_="rare"))
    pool = models()
    found = judged(Judge(), journal, queries={"q": "zebra w1 w2"}, nodes=nodes, pool=pool, top_k=4, threshold=1)
    corpus = EmbeddingQAFinetuneDataset(
        queries={"q": "zebra w1 w2"}, corpus={n.node_id: n.text for n in nodes}, relevant_docs={"q": ["rare"]}
    )
    best = {i for model in pool.values() for i in evaluate_retrieval(model, corpus).rankings["q"][:4]}
    assert best < found.grades["q"].keys()
    assert {"rare", "n1"} <= found.grades["q"].keys(), "BM25 finds them by their words"
    assert len(found.grades["q"]) <= 3 * 4


def test_no_answer_is_paid_for_twice_and_another_model_adds_only_new_passages(journal):
    llm = Judge()
    first = judged(llm, journal)
    calls = llm.calls
    again = judged(llm, journal)
    assert llm.calls == calls
    assert again.report.llm.from_journal == calls
    assert again.dataset == first.dataset
    more = judged(llm, journal, pool={**models(), "third": WordCountEmbedding(dimensions=5)})
    assert llm.calls == more.report.pooled > calls


KILLED = """
import sys
from llama_index_lora_embed.config import LLMSettings
from tests.helpers.judging import Judge, judged
settings = LLMSettings(in_flight=1, show_progress=False)
judged(Judge(log=sys.argv[2], dies_after=40), sys.argv[1], settings=settings)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_half_way_is_continued_and_pays_nothing_twice(journal, tmp_path):
    log = tmp_path / "log"
    run = subprocess.run([sys.executable, "-c", KILLED, journal, str(log)], capture_output=True, text=True)
    assert run.returncode == 9, run.stderr
    assert len(journalled(journal)) == 40
    result = judged(Judge(log=str(log)), journal)
    assert result.report.llm.from_journal == 40
    paid = log.read_text().splitlines()
    assert len(paid) == len(set(paid)) == result.report.pooled


def test_a_limit_cuts_off_queries_that_the_next_run_finishes(journal):
    llm = Judge()
    part = judged(llm, journal, settings=FAST.model_copy(update={"max_requests": 100, "in_flight": 1}))
    assert llm.calls == 100
    assert 0 < part.report.unfinished < len(QUERIES)
    assert part.report.answered + part.report.unfinished == len(QUERIES)
    assert "stopped: max_requests=100" in str(part.report)
    complete = judged(llm, journal)
    assert (complete.report.unfinished, llm.calls) == (0, complete.report.pooled)


def test_queries_that_nobody_can_answer_are_counted_and_left_out(journal):
    result = judged(Judge(), journal, queries=[*QUERIES[:3], "the price of tea", "zebra zebra"])
    assert (result.report.answered, result.report.unanswered) == (3, 2)
    assert sorted(result.dataset.queries.values()) == sorted(QUERIES[:3])
    assert len(result.grades) == 5
    with pytest.raises(DatasetError, match="none of them with a passage of grade 2 or higher") as caught:
        judged(Judge(), journal, queries=["the price of tea"])
    assert any("1 without a relevant passage" in problem for problem in caught.value.problems)


def test_a_judge_that_always_refuses_ends_the_run(journal):
    class Refuses(Judge):
        def grade(self, query, passage):
            return "I'm sorry, but I can't help with that."

    llm = Refuses()
    with pytest.raises(LLMError, match="no usable answer"):
        judged(llm, journal, settings=FAST.model_copy(update={"attempts": 2, "in_flight": 1}))
    assert llm.calls == 16


def test_nonsense_is_requested_again_and_passages_without_a_grade_are_unjudged(journal):
    class Erratic(Judge):
        """Grades outside the scale at first; for some passages nothing else."""

        def grade(self, query, passage):
            lost = DATASET.corpus["p3"] == passage
            return "Grade: 9" if lost or self.prompts.count(self.prompts[-1]) == 1 else super().grade(query, passage)

    llm = Erratic()
    settings = LLMSettings(attempts=3, backoff=0.001, max_backoff=0.01, show_progress=False)
    result = judged(llm, journal, settings=settings)
    ungraded = result.report.ungraded
    assert ungraded > 0
    assert llm.calls == 2 * (result.report.pooled - ungraded) + (3 + 1) * ungraded, "once more at the end of the run"
    assert all("p3" not in found for found in result.grades.values())
    listed = (result.dataset.relevant_docs, result.dataset.judged_irrelevant)
    assert not any("p3" in ids for field in listed for ids in field.values()), "it is neither"
    judged(llm, journal, settings=settings)
    assert llm.calls == 2 * (result.report.pooled - ungraded) + (3 + 3) * ungraded, "unusable answers were paid for too"


def test_an_answer_that_is_no_text_counts_as_unusable(journal):
    class Odd(Judge):
        async def acomplete(self, prompt, formatted=False, **kwargs):
            response = await super().acomplete(prompt, formatted, **kwargs)
            first = self.prompts.count(prompt) == 1
            return CompletionResponse.model_construct(text=["3"]) if first else response

    assert judged(Odd(), journal).report.ungraded == 0


def test_duplicate_and_empty_queries_are_counted(journal):
    llm = Judge()
    result = judged(llm, journal, queries=[*QUERIES, "", "  ", None, QUERIES[0].upper(), f" {QUERIES[1]}  "])
    assert result.report.distinct == result.report.queries == len(QUERIES)
    assert result.report.skipped["query that is empty or cannot be read"] == 3
    assert result.report.skipped["query with another one's wording"] == 2
    assert "2 x query with another one's wording" in str(result.report)


def test_the_ids_of_a_mapping_are_kept(journal):
    result = judged(Judge(), journal, queries={"first": QUERIES[0], "second": QUERIES[1]})
    assert result.dataset.queries == {"first": QUERIES[0], "second": QUERIES[1]}


def test_a_log_of_100_000_lines_is_sampled_and_the_report_says_so(journal, tmp_path):
    rng = random.Random(0)
    log = tmp_path / "log.csv"
    log.write_text("typed,clicked\n" + "".join(f"w{rng.randrange(200)} number {i // 2},x\n" for i in range(100_000)))
    kwargs = {"queries": log, "column": "typed", "top_k": 1, "threshold": 1}
    few = judged(Judge(), journal, max_queries=5, **kwargs)
    more = judged(Judge(), journal, max_queries=20, **kwargs)
    other = judged(Judge(), journal, max_queries=20, seed=1, **kwargs)
    assert more.report.queries == 20
    assert 50_000 < more.report.distinct < 100_000
    assert f"20 queries (a sample of {more.report.distinct})" in str(more.report)
    assert few.grades.keys() < more.grades.keys() != other.grades.keys()


def test_mixed_languages_are_judged_as_they_are(journal):
    texts = ["Die Maschine wird mit Wasser gereinigt.", "机器每周清洗一次。", "تنظف الآلة كل أسبوع", "The pump is new."]
    nodes = [TextNode(text=text, id_=f"n{i}") for i, text in enumerate(texts)]
    queries = ["wie wird die Maschine gereinigt", "机器多久清洗", "متى تنظف الآلة", "is the pump new?"]
    llm = Judge()
    result = judged(llm, journal, queries=queries, nodes=nodes, threshold=1, top_k=1)
    assert {query_of(prompt) for prompt in llm.prompts} == set(queries)
    assert {passage_of(prompt) for prompt in llm.prompts} == set(texts)
    pooled = {result.dataset.queries.get(q, q): found for q, found in result.grades.items()}
    assert any("n1" in found for found in pooled.values()), "BM25 reads scripts without spaces"


def test_passages_with_the_same_text_share_an_answer(journal):
    llm = Judge()
    nodes = [*NODES, TextNode(text=DATASET.corpus["p0"], id_="twin"), ImageNode(id_="picture"), TextNode(text=" ")]
    query = DATASET.queries["q0-0"]
    result = judged(llm, journal, queries={"q": query}, nodes=nodes)
    assert {"p0", "twin"} <= set(result.dataset.relevant_docs["q"])
    assert len([prompt for prompt in llm.prompts if DATASET.corpus["p0"] in prompt]) == 1
    assert result.report.skipped["node without text"] == 2


def test_agreement_with_human_labels_is_reported(journal):
    first = judged(Judge(), journal)
    again = judged(Judge(), journal, human=first.dataset)
    assert again.report.agreement.kappa == pytest.approx(1)
    assert again.report.agreement.pairs == again.report.pooled
    assert again.report.agreement.graded is (first.dataset.relevance_scores != {})
    binary = judged(Judge(), journal, human=DATASET).report.agreement
    assert not binary.graded
    assert binary.same > 0.9
    assert binary.assumed == binary.pairs - len(QUERIES)
    assert "human labels agree" in str(again.report)


def test_human_labels_may_be_of_a_query_that_nothing_answers(journal):
    irrelevant = {"q": list(DATASET.corpus), "q0-0": [i for i in DATASET.corpus if i != "p0"]}
    human = EmbeddingQAFinetuneDataset(
        queries={"q": "the price of tea", "q0-0": DATASET.queries["q0-0"]},
        corpus=DATASET.corpus,
        relevant_docs={"q0-0": ["p0"]},
        judged_irrelevant=irrelevant,
    )
    result = judged(Judge(), journal, queries=list(human.queries.values()), human=human)
    assert result.report.unanswered == 1
    assert (result.report.agreement.pairs, result.report.agreement.assumed) == (result.report.pooled, 0)
    assert human.problems() == ["query 'q' has no relevant passage"], "neither to train nor to evaluate on"
    unjudged = human.model_copy(update={"judged_irrelevant": {"q0-0": irrelevant["q0-0"]}})
    with pytest.raises(DatasetError, match="human dataset"):
        judged(Judge(), journal, human=unjudged)


def test_human_labels_for_other_texts_are_refused_before_anything_is_paid(journal):
    llm = Judge()
    other = EmbeddingQAFinetuneDataset(queries={"q": "x"}, corpus={"p": "y"}, relevant_docs={"q": ["p"]})
    with pytest.raises(DatasetError, match="none of which is about a pooled passage"):
        judged(llm, journal, human=other)
    assert llm.calls == 0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"queries": []}, DatasetError, "0 queries, none of them with text"),
        ({"queries": ["", " "]}, DatasetError, "2 queries, none of them with text"),
        ({"queries": "no/such/log.csv"}, DatasetError, "does not exist"),
        ({"queries": "no/such/log.txt"}, DatasetError, "cannot be read"),
        ({"queries": [{"clicked": "a"}]}, ConfigError, "one for the query"),
        ({"queries": 7}, ConfigError, "a source of type int"),
        ({"queries": {1: "a query", "1": "another"}}, DatasetError, "2 queries that share their ids"),
        ({"nodes": []}, DatasetError, "0 node"),
        ({"nodes": [TextNode(text=" ")]}, DatasetError, "none of them with text"),
        ({"nodes": ["text"]}, ConfigError, "expected a LlamaIndex node"),
        ({"pool": ["all-MiniLM-L6-v2"]}, ConfigError, "an embedding model of type str"),
        ({"pool": "all-MiniLM-L6-v2"}, ConfigError, "models of type str"),
        ({"pool": WordCountEmbedding()}, ConfigError, "models of type WordCountEmbedding"),
        ({"top_k": 0, "threshold": 4, "max_queries": 0}, ConfigError, "3 unusable argument"),
        ({"human": "no/such.json"}, DatasetError, "cannot be read"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_paid(journal, changes, error, words):
    llm = Judge()
    with pytest.raises(error, match=words):
        judged(llm, journal, **changes)
    assert llm.calls == 0


def test_no_models_and_no_llm_are_refused(journal):
    with pytest.raises(ConfigError, match="at least one embedding model"):
        judged(Judge(), journal, pool=[])
    with pytest.raises(ConfigError, match="a LlamaIndex LLM"):
        judged("gpt-4", journal)
