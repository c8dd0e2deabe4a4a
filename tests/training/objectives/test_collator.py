import pytest
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.collator import CURATED, IGNORED, NEGATIVE, GroupCollator
from tests.conftest import WORDS, make_dataset


@pytest.fixture(scope="module")
def model(tiny_model):
    model = SentenceTransformer(tiny_model, device="cpu")
    model.prompts.update(query="", document="")
    return model


def collate(model, dataset, use_all_docs=False, false_negatives=None, **kwargs):
    groups = make_groups(dataset, use_all_docs)
    return GroupCollator(model, dataset, groups, false_negatives, **kwargs)([{"group": i} for i in range(len(groups))])


def texts_of(model, batch, letter):
    chunks = [batch[f"{letter}{n}_input_ids"] for n in range(99) if f"{letter}{n}_input_ids" in batch]
    return [model.tokenizer.decode(row, skip_special_tokens=True) for chunk in chunks for row in chunk]


def test_each_passage_is_encoded_once_with_all_its_queries(model):
    dataset = make_dataset(passages=12, questions=3)
    batch = collate(model, dataset)
    assert batch["label"].shape == (36, 12)
    assert sorted(texts_of(model, batch, "p")) == sorted(dataset.corpus.values())
    assert ((batch["label"] == 1).sum(dim=1) == 1).all()
    assert ((batch["label"] == 1).sum(dim=0) == 3).all()


def test_labels_point_at_the_right_passages_after_sorting_by_length(model):
    dataset = make_dataset(passages=9)
    dataset.corpus = {i: " ".join(text.split()[: 3 + n]) for n, (i, text) in enumerate(dataset.corpus.items())}
    batch = collate(model, dataset)
    queries, passages = texts_of(model, batch, "q"), texts_of(model, batch, "p")
    positives = {dataset.queries[q]: dataset.corpus[ids[0]] for q, ids in dataset.relevant_docs.items()}
    for row, query in enumerate(queries):
        assert positives[query] == passages[int((batch["label"][row] == 1).int().argmax())]


def labels_by_text(model, dataset, **kwargs):
    batch = collate(model, dataset, **kwargs)
    queries, passages = texts_of(model, batch, "q"), texts_of(model, batch, "p")
    return {(q, p): batch["label"][i, j].item() for i, q in enumerate(queries) for j, p in enumerate(passages)}


def test_other_relevant_passages_and_equal_texts_are_no_negatives(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1", "b": "w2", "c": "w3"},
        corpus={"p": "w10 w11", "r": "w12", "twin": "w10  W11", "s": "w13"},
        relevant_docs={"a": ["p", "r"], "b": ["r"], "c": ["twin"]},
    )
    dataset.corpus["twin"] = "w10  w11"
    labels = labels_by_text(model, dataset)
    assert labels["w1", "w12"] == IGNORED  # also relevant to a
    assert labels["w2", "w10 w11"] == NEGATIVE
    batch = collate(model, dataset)
    row = texts_of(model, batch, "q").index("w1")
    assert (batch["label"][row] == NEGATIVE).sum() == 0  # its own, the other relevant one, and the twin


def test_two_cuts_of_one_node_are_not_each_others_negatives(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1", "b": "w2", "c": "w3"},
        corpus={"p": "w10 w11 w12", "r": "w20"},
        relevant_docs={"a": ["p"], "b": ["p"], "c": ["r"]},
        training_passages={"a": "w11 w12", "b": "w10 w11"},
    )
    labels = labels_by_text(model, dataset)
    assert labels["w1", "w10 w11"] == IGNORED
    assert labels["w2", "w11 w12"] == IGNORED
    assert labels["w1", "w20"] == NEGATIVE


def test_queries_of_one_wording_share_their_positives(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1 w2", "b": "W1  w2", "c": "w3"},
        corpus={"p": "w10", "r": "w11", "s": "w12"},
        relevant_docs={"a": ["p"], "b": ["r"], "c": ["s"]},
    )
    dataset.queries["b"] = "w1  w2"
    batch = collate(model, dataset)
    queries, passages = texts_of(model, batch, "q"), texts_of(model, batch, "p")
    for row, query in enumerate(queries):
        negatives = {passages[j] for j in range(3) if batch["label"][row, j] == NEGATIVE}
        assert negatives == ({"w12"} if query == "w1 w2" else {"w10", "w11"})


# Ten chunks of one document with different words; tests make the fourth and the eighth similar.
def one_document(**changes):
    corpus = {f"p{n}": " ".join(WORDS[10 * n : 10 * n + 10]) for n in range(10)} | changes
    return EmbeddingQAFinetuneDataset(
        queries={"a": "w30 w39", "b": "w0"},
        corpus=corpus,
        relevant_docs={"a": ["p3"], "b": ["p0"]},
        source_documents=dict.fromkeys(corpus, "d"),
        hard_negatives={"b": [i for i in corpus if i not in ("p0", "p3")]},  # brings all of them into the batch
    ).check()


def of_query_a(model, dataset, window, near_duplicates=None):
    """Label of each passage for query a."""
    batch = collate(model, dataset, false_negatives=FalseNegatives(dataset, window, near_duplicates))
    row = texts_of(model, batch, "q").index(dataset.queries["a"])
    passages = list(zip(texts_of(model, batch, "p"), batch["label"][row].tolist(), strict=True))
    # the tiny model cuts long texts
    return {i: next(label for cut, label in passages if text.startswith(cut)) for i, text in dataset.corpus.items()}


@pytest.mark.parametrize(
    ("window", "ignored"), [(0, ""), (1, "24"), (2, "1245"), (None, "012456789")], ids=["0", "1", "2", "all"]
)
def test_siblings_within_the_window_are_no_negatives(model, window, ignored):
    labels = of_query_a(model, one_document(), window)
    assert labels == {"p3": 1.0} | {f"p{n}": IGNORED if str(n) in ignored else NEGATIVE for n in range(10) if n != 3}


def test_a_chunk_that_overlaps_a_positive_is_no_negative_at_any_distance(model):
    answer = " ".join(WORDS[30:50])
    dataset = one_document(p3=answer, p7=" ".join(WORDS[35:50]) + " w70 w71 w72")
    assert of_query_a(model, dataset, 0)["p7"] == IGNORED
    dataset.source_documents = {**dataset.source_documents, "p7": "elsewhere"}
    assert of_query_a(model, dataset, 0)["p7"] == NEGATIVE


def test_a_chunk_of_the_same_document_that_contains_the_query_is_no_negative(model):
    dataset = one_document(p7="w70 w30 w39 w71 w72 w73")
    assert of_query_a(model, dataset, 0)["p7"] == IGNORED
    dataset.source_documents = {**dataset.source_documents, "p7": "elsewhere"}
    assert of_query_a(model, dataset, 0)["p7"] == NEGATIVE


def test_a_near_duplicate_of_a_positive_is_no_negative(model):
    dataset = one_document(p7="w30 w31 w32 w33 w34 w35 w36 w37 w38 w170")
    dataset.source_documents = None
    assert of_query_a(model, dataset, 2, {"p3": "p3", "p7": "p3"})["p7"] == IGNORED
    assert of_query_a(model, dataset, 2)["p7"] == NEGATIVE


def test_hard_negatives_join_the_batch_as_n_tuples_without_repeating_the_positive(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1", "b": "w2"},
        corpus={"p": "w10", "r": "w11", "x": "w12", "y": "w13", "unused": "w14"},
        relevant_docs={"a": ["p"], "b": ["r"]},
        hard_negatives={"a": ["x", "y"], "b": ["x"]},
    )
    labels = labels_by_text(model, dataset)
    assert {p for _, p in labels} == {"w10", "w11", "w12", "w13"}
    assert labels["w1", "w12"] == labels["w1", "w13"] == labels["w2", "w12"] == CURATED
    assert labels["w2", "w13"] == NEGATIVE


def test_a_hard_negative_is_never_masked(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1", "b": "w2", "c": "w3"},
        corpus={"p": "w10", "next": "w11", "r": "w12", "copy": "W10"},
        relevant_docs={"a": ["p"], "b": ["r"], "c": ["r"]},
        source_documents={"p": "d", "next": "d", "r": "e", "copy": "f"},
        hard_negatives={"a": ["copy", "next"], "b": ["next"]},
    )
    batch = collate(model, dataset)
    row = texts_of(model, batch, "q").index("w1")
    assert sorted(batch["label"][row].tolist()) == [CURATED, CURATED, NEGATIVE, 1]
    dataset.hard_negatives = {"b": ["next", "copy"]}
    batch = collate(model, dataset)
    row = texts_of(model, batch, "q").index("w1")
    assert sorted(batch["label"][row].tolist()) == [IGNORED, IGNORED, NEGATIVE, 1]


def test_soft_labels_make_all_passages_of_a_query_its_targets_by_their_grade(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1", "b": "w2", "c": "w3"},
        corpus={"p": "w10", "r": "w11", "s": "w12", "twin": "w11 ."},
        relevant_docs={"a": ["p", "r"], "b": ["r"], "c": ["s"]},
        relevance_scores={"a": {"p": 0.5, "r": 0.25}},
        hard_negatives={"c": ["twin"]},
    ).check()
    for all_docs in (False, True):
        labels = labels_by_text(model, dataset, soft=True, use_all_docs=all_docs)
        assert [labels["w1", p] for p in ("w10", "w11", "w12")] == [0.5, 0.25, NEGATIVE]
        assert [labels["w2", p] for p in ("w10", "w11", "w12")] == [NEGATIVE, 1.0, NEGATIVE]
        assert collate(model, dataset, soft=True, use_all_docs=all_docs)["label"].shape == (3, 4)
    assert labels_by_text(model, dataset)["w1", "w11"] == IGNORED


def test_another_cut_of_the_same_node_is_no_soft_target(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1", "b": "w2", "c": "w3"},
        corpus={"p": "w10 w11 w12", "r": "w20"},
        relevant_docs={"a": ["p"], "b": ["p"], "c": ["r"]},
        training_passages={"a": "w11 w12", "b": "w10 w11"},
    )
    labels = labels_by_text(model, dataset, soft=True)
    assert labels["w1", "w11 w12"] == labels["w2", "w10 w11"] == 1
    assert labels["w1", "w10 w11"] == labels["w2", "w11 w12"] == IGNORED


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_texts_of_one_label_without_losing_any(model, world):
    dataset = make_dataset(passages=9)
    whole = collate(model, dataset, mini_batch_size=2)
    shares = [collate(model, dataset, mini_batch_size=2, rank=rank, world=world) for rank in range(world)]
    assert all(share["label"].equal(whole["label"]) for share in shares)
    for letter in "qp":
        texts = texts_of(model, whole, letter)
        for rank, share in enumerate(shares):
            assert texts_of(model, share, letter) == texts[rank::world]
            assert all(v.shape[0] <= 2 for key, v in share.items() if key.endswith("input_ids"))


def test_fewer_passages_than_processes_are_refused(model):
    with pytest.raises(ConfigError, match="3 processes"):
        collate(model, make_dataset(passages=2), world=3)


def test_prompts_are_in_the_batch(tiny_model):
    model = SentenceTransformer(tiny_model, device="cpu", prompts={"query": "query : ", "document": "passage : "})
    batch = collate(model, make_dataset(passages=2))
    assert all(text.startswith("query :") for text in texts_of(model, batch, "q"))
    assert all(text.startswith("passage :") for text in texts_of(model, batch, "p"))
