import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Normalize
from sentence_transformers.util import mine_hard_negatives as upstream_miner

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.training.negatives import false_negatives
from llama_index_lora_embed.training.negatives.mining import mine_hard_negatives
from tests.conftest import make_dataset

QUESTION = "w0 w1 w2 w3 w4"
SETTINGS = MiningSettings(show_progress_bar=False)
NO_MARGIN = SETTINGS.replace(relative_margin=None)


def bag_of_words(weights=None):
    """Cosine similarity = shared words / 10 between QUESTION and a text of `sharing`, by construction."""
    vocabulary = [f"w{i}" for i in range(40)] + [f"f{i}" for i in range(400)]
    return SentenceTransformer(modules=[BoW(vocabulary, word_weights=weights or {}), Normalize()], device="cpu")


@pytest.fixture
def model():
    return bag_of_words()


@pytest.fixture(scope="module")
def bert(tiny_model):
    return SentenceTransformer(tiny_model, device="cpu")


def sharing(words, number, length=20):
    """A text of `length` different words, `words` of them the question's, the others its own."""
    fillers = [f"f{(number * 20 + i) % 400}" for i in range(length - words)]
    return " ".join([*fillers, *QUESTION.split()[:words]])


def dataset_of(passages, **fields):
    fields = {"queries": {"q": QUESTION}, "relevant_docs": {"q": ["p"]}, **fields}
    return EmbeddingQAFinetuneDataset(corpus={"p": sharing(5, 0), **passages}, **fields)


def mine(dataset, model, settings=SETTINGS, near_duplicates=None, **arguments):
    return mine_hard_negatives(dataset, model, settings, near_duplicates=near_duplicates or {}, **arguments)


LADDER = {"d": sharing(1, 4), "a": sharing(4, 1), "c": sharing(2, 3), "b": sharing(3, 2)}


def test_negatives_come_most_similar_first(model):
    dataset = dataset_of(LADDER)
    mined, report = mine(dataset, model)
    assert mined.hard_negatives == {"q": ["a", "b", "c"]}
    assert dataset.hard_negatives is None, "the dataset that was passed is left alone"
    assert (report.queries, report.with_negatives, report.with_fewer, report.mean_negatives) == (1, 1, 0, 3)
    assert not report.excluded
    mined.corpus["a"] = "changed"
    assert dataset.corpus["a"] != "changed"


def test_without_an_exclusion_the_ranking_is_sentence_transformers_own(bert):
    dataset = make_dataset(passages=40, questions=1, sources=False)
    mined, _ = mine(dataset, bert, SETTINGS.replace(relative_margin=0.02, max_score=0.9, range_min=1))
    pairs = [(dataset.queries[q], dataset.corpus[ids[0]]) for q, ids in dataset.relevant_docs.items()]
    theirs = upstream_miner(
        Dataset.from_dict({"query": [q for q, _ in pairs], "answer": [p for _, p in pairs]}),
        bert,
        corpus=list(dataset.corpus.values()),
        relative_margin=0.02,
        max_score=0.9,
        range_min=1,
        range_max=100,
        num_negatives=3,
        output_format="labeled-list",
        verbose=False,
    )
    expected = {row["query"]: row["answer"][1:] for row in theirs}
    assert expected
    ours = {dataset.queries[q]: [dataset.corpus[i] for i in ids] for q, ids in mined.hard_negatives.items()}
    assert ours == expected


def test_an_answer_to_a_query_of_the_same_wording_is_no_negative(model):
    other = {"queries": {"q": QUESTION, "other": QUESTION.upper().replace(" ", "  ")}}
    apart = dataset_of(LADDER, queries={"q": QUESTION, "other": "w9"}, relevant_docs={"q": ["p"], "other": ["a"]})
    assert mine(apart, model)[0].hard_negatives["q"] == ["a", "b", "c"]
    mined, report = mine(dataset_of(LADDER, relevant_docs={"q": ["p"], "other": ["a"]}, **other), model)
    assert mined.hard_negatives["q"] == ["b", "c", "d"]
    assert report.excluded[false_negatives.WORDING] >= 1


def test_copies_and_siblings_of_a_positive_are_excluded(model):
    passages = {"twin": sharing(5, 0).upper().replace(" ", "\n"), "between": sharing(0, 5), **LADDER}
    documents = {"p": "x", "between": "x", "a": "x", "b": "x", "twin": "y", "c": "y", "d": "y"}
    passages = {i: passages[i] for i in documents if i != "p"}
    mined, report = mine(dataset_of(passages, source_documents=documents), model, NO_MARGIN)
    assert mined.hard_negatives == {"q": ["b", "c", "d"]}
    assert report.excluded == {false_negatives.DUPLICATE: 1, false_negatives.SIBLING: 1}
    mined, _ = mine(dataset_of(passages, source_documents=documents), model, SETTINGS.replace(sibling_window=None))
    assert mined.hard_negatives == {"q": ["c", "d"]}


def test_a_near_duplicate_of_a_positive_is_no_negative(model):
    assert mine(dataset_of(LADDER), model)[0].hard_negatives == {"q": ["a", "b", "c"]}
    mined, report = mine(dataset_of(LADDER), model, near_duplicates={"a": "p", "p": "p"})
    assert mined.hard_negatives == {"q": ["b", "c", "d"]}
    assert report.excluded == {false_negatives.NEAR_DUPLICATE: 1}
    later_first, _ = mine(dataset_of(LADDER), model, near_duplicates={"a": "d", "p": "d", "d": "d"})
    assert later_first.hard_negatives == {"q": ["b", "c"]}


def test_near_duplicates_are_found_if_none_are_given(model):
    words = sharing(5, 0, length=60).split()
    near = " ".join([*words[:-1], "f399"])
    dataset = dataset_of({"near": near, **LADDER})
    dataset.corpus["p"] = " ".join(words)
    mined, report = mine_hard_negatives(dataset, model, NO_MARGIN)
    assert "near" not in mined.hard_negatives["q"]
    assert report.excluded == {false_negatives.NEAR_DUPLICATE: 1}


def test_the_relative_margin_excludes_what_is_nearly_as_similar_as_the_positive(model):
    dataset = dataset_of({"closer": sharing(5, 7, length=18), "equal": sharing(5, 8), **LADDER})
    assert mine(dataset, model, NO_MARGIN)[0].hard_negatives == {"q": ["closer", "equal", "a"]}
    mined, report = mine(dataset, model)
    assert mined.hard_negatives == {"q": ["a", "b", "c"]}
    assert report.excluded == {false_negatives.MARGIN: 2}
    assert mine(dataset, model, SETTINGS.replace(relative_margin=0.25))[0].hard_negatives == {"q": ["b", "c", "d"]}


def test_the_absolute_margin_is_subtracted_from_the_positive(model):
    # 0.5 is the positive's similarity, 0.4 that of a, 0.3 that of b
    settings = NO_MARGIN.replace(absolute_margin=0.15)
    assert mine(dataset_of(LADDER), model, settings)[0].hard_negatives == {"q": ["b", "c", "d"]}


def test_the_margin_is_that_of_the_least_similar_positive(model):
    dataset = dataset_of({"far": sharing(3, 9), **LADDER}, relevant_docs={"q": ["p", "far"]})
    mined, report = mine(dataset, model, SETTINGS.replace(audit=1))
    assert mined.hard_negatives == {"q": ["c", "d"]}
    assert report.audit[0].positive_id == "far"


def test_max_score_and_range_min_exclude_the_most_similar(model):
    mined, report = mine(dataset_of(LADDER), model, SETTINGS.replace(max_score=0.35))
    assert (mined.hard_negatives, report.excluded) == ({"q": ["b", "c", "d"]}, {false_negatives.MAX_SCORE: 1})
    mined, report = mine(dataset_of(LADDER), model, SETTINGS.replace(range_min=2))
    assert (mined.hard_negatives, report.excluded) == ({"q": ["c", "d"]}, {false_negatives.RANGE_MIN: 2})
    assert report.with_fewer == 1


def test_nodes_that_share_a_text_give_one_negative(model):
    mined, report = mine(dataset_of({"a2": LADDER["a"], "a3": LADDER["a"].upper(), **LADDER}), model)
    assert mined.hard_negatives == {"q": ["a2", "b", "c"]}
    assert report.excluded == {false_negatives.REPEATED: 1}


def test_hard_negatives_of_the_dataset_stay_first_and_count(model):
    dataset = dataset_of(LADDER, hard_negatives={"q": ["d"]})
    assert mine(dataset, model)[0].hard_negatives == {"q": ["d", "a", "b"]}
    assert dataset.hard_negatives == {"q": ["d"]}
    assert mine(dataset_of(LADDER, hard_negatives={"q": ["b"]}), model)[0].hard_negatives == {"q": ["b", "a", "c"]}
    full = dataset_of(LADDER, hard_negatives={"q": ["d", "c", "b", "a"]})
    mined, report = mine(full, model)
    assert mined.hard_negatives == full.hard_negatives
    assert (report.mean_negatives, report.audit) == (4, ())


def test_no_positive_ever_becomes_a_negative(bert):
    dataset = make_dataset(passages=24, questions=4)
    texts = list(dataset.corpus.values())
    dataset.corpus.update({f"copy{i}": text for i, text in enumerate(texts[:8])})
    dataset.queries["q1-0"] = dataset.queries["q0-0"]
    mined, _ = mine(dataset, bert, NO_MARGIN.replace(num_negatives=10))
    for query_id, ids in mined.hard_negatives.items():
        alike = [q for q, text in dataset.queries.items() if text == dataset.queries[query_id]]
        answers = {dataset.corpus[i] for q in alike for i in dataset.relevant_docs[q]}
        assert not answers & {dataset.corpus[i] for i in ids}
        assert len(ids) == len(set(ids)) == 10
    assert list(mined.hard_negatives) == list(dataset.queries)


def test_a_positive_far_down_the_ranking_still_gets_negatives(model):
    closer = {f"closer{i}": sharing(4, i, length=10) for i in range(1, 20)}
    dataset = dataset_of({**closer, "b": LADDER["d"]})
    dataset.corpus["p"] = sharing(2, 0)
    settings = SETTINGS.replace(num_negatives=1)
    mined, report = mine(dataset, model, settings)
    assert mined.hard_negatives == {"q": ["b"]}
    assert report.excluded == {false_negatives.MARGIN: 19}
    nothing, report = mine(dataset, model, settings.replace(range_max=10))
    assert nothing.hard_negatives == {}
    assert (report.with_negatives, report.with_fewer) == (0, 1)


def test_slices_and_a_second_run_change_nothing(bert):
    dataset = make_dataset(passages=50)
    mined, report = mine(dataset, bert)
    assert report.with_negatives > 40
    for changed in ({}, {"memory_mb": 0.001}):
        again, other = mine(dataset, bert, SETTINGS.replace(**changed))
        assert again.hard_negatives == mined.hard_negatives, changed
        assert other.excluded == report.excluded


def test_one_slice_or_many_encode_every_text_once(model):
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(len(output["sentence_embedding"])))
    dataset = make_dataset(passages=30)
    mine(dataset, model, SETTINGS.replace(memory_mb=0.001))
    assert sum(seen) == len(dataset.queries) + len(dataset.corpus)


def test_the_model_ranks_with_its_prompts(model):
    with_prompt = bag_of_words()
    with_prompt.prompts["query"] = "w5 w6 w7 w8 w9 w10 "
    wanted = " ".join(["w5 w6 w7 w8 w9 w10", *(f"f{i}" for i in range(200, 214))])
    dataset = dataset_of({"prompted": wanted, **LADDER})
    assert "prompted" not in mine(dataset, model)[0].hard_negatives["q"]
    assert mine(dataset, with_prompt, NO_MARGIN)[0].hard_negatives["q"][0] == "prompted"


def test_the_report_shows_the_closest_negatives_and_the_counts(model):
    dataset = dataset_of(
        LADDER, queries={"q": QUESTION, "r": "w0"}, relevant_docs={"q": ["p"], "r": ["d"]}, hard_negatives={"r": ["a"]}
    )
    _, report = mine(dataset, model, SETTINGS.replace(num_negatives=2, audit=2))
    assert (report.queries, report.with_negatives, report.with_fewer, report.mean_negatives) == (2, 2, 1, 1.5)
    assert [(one.query_id, one.positive_id, one.negative_id) for one in report.audit] == [
        ("q", "p", "a"),
        ("q", "p", "b"),
    ]
    assert report.audit[0].positive_score == pytest.approx(0.5)
    assert report.audit[0].negative_score == pytest.approx(0.4)
    text = str(report)
    assert "2 of 2 queries, 1.50 per query" in text
    assert LADDER["a"] in text
    assert false_negatives.MARGIN in text


def test_a_corpus_of_one_text_is_refused(model):
    with pytest.raises(DatasetError, match="at least two"):
        mine(dataset_of({"p2": sharing(5, 0).upper()}), model)


def test_a_dataset_with_problems_is_refused(model):
    with pytest.raises(DatasetError, match="0 queries"):
        mine(dataset_of(LADDER, queries={}, relevant_docs={}), model)
    with pytest.raises(DatasetError, match="not in corpus"):
        mine(dataset_of(LADDER, relevant_docs={"q": ["nowhere"]}), model)


def test_with_too_few_candidates_all_of_them_are_used(model):
    mined, report = mine(dataset_of({"a": LADDER["a"]}), model, SETTINGS.replace(num_negatives=5))
    assert mined.hard_negatives == {"q": ["a"]}
    assert report.with_fewer == 1


def test_importing_the_module_imports_no_torch():
    code = "import sys, llama_index_lora_embed.training.negatives.mining; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_model_and_its_weights_are_left_alone(bert):
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    mine(make_dataset(passages=8), bert)
    assert all(torch.equal(value, before[name]) for name, value in bert.state_dict().items())
