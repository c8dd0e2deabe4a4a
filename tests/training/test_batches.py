import pytest
import torch
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.errors import DatasetError
from llama_index_lora_embed.training.batches import (
    IGNORED,
    NEGATIVE,
    GroupBatchSampler,
    GroupCollator,
    make_groups,
)
from llama_index_lora_embed.training.loss import MaskedInfoNCELoss
from tests.conftest import make_dataset


@pytest.fixture(scope="module")
def model(tiny_model):
    model = SentenceTransformer(tiny_model, device="cpu")
    model.prompts.update(query="", document="")
    return model


def collate(model, dataset, use_all_docs=False):
    groups = make_groups(dataset, use_all_docs)
    return GroupCollator(model, dataset, groups)([{"group": i} for i in range(len(groups))])


def texts_of(model, batch, letter):
    chunks = [batch[f"{letter}{n}_input_ids"] for n in range(99) if f"{letter}{n}_input_ids" in batch]
    return [model.tokenizer.decode(row, skip_special_tokens=True) for chunk in chunks for row in chunk]


def test_each_passage_is_encoded_once_with_all_its_questions(model):
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
    questions, passages = texts_of(model, batch, "q"), texts_of(model, batch, "p")
    answers = {dataset.queries[q]: dataset.corpus[ids[0]] for q, ids in dataset.relevant_docs.items()}
    for row, question in enumerate(questions):
        assert answers[question] == passages[int((batch["label"][row] == 1).int().argmax())]


def labels_by_text(model, dataset, **kwargs):
    batch = collate(model, dataset, **kwargs)
    questions, passages = texts_of(model, batch, "q"), texts_of(model, batch, "p")
    return {(q, p): int(batch["label"][i, j]) for i, q in enumerate(questions) for j, p in enumerate(passages)}


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


def test_questions_of_one_wording_share_their_answers(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1 w2", "b": "W1  w2", "c": "w3"},
        corpus={"p": "w10", "r": "w11", "s": "w12"},
        relevant_docs={"a": ["p"], "b": ["r"], "c": ["s"]},
    )
    dataset.queries["b"] = "w1  w2"
    batch = collate(model, dataset)
    questions, passages = texts_of(model, batch, "q"), texts_of(model, batch, "p")
    for row, question in enumerate(questions):
        negatives = {passages[j] for j in range(3) if batch["label"][row, j] == NEGATIVE}
        assert negatives == ({"w12"} if question == "w1 w2" else {"w10", "w11"})


def test_an_overlapping_chunk_that_holds_the_question_is_no_negative(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1 w2", "b": "w3"},
        corpus={"p": "w1 w2 w10", "next": "w1 w2 w11", "elsewhere": "w1 w2 w12"},
        relevant_docs={"a": ["p"], "b": ["next"], "c": ["elsewhere"]},
        source_documents={"p": "d", "next": "d", "elsewhere": "e"},
    )
    dataset.queries["c"] = "w4"
    labels = labels_by_text(model, dataset)
    assert labels["w1 w2", "w1 w2 w11"] == IGNORED
    assert labels["w1 w2", "w1 w2 w12"] == NEGATIVE
    assert labels["w3", "w1 w2 w10"] == NEGATIVE


def test_hard_negatives_join_the_batch_as_n_tuples_without_repeating_the_positive(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1", "b": "w2"},
        corpus={"p": "w10", "r": "w11", "x": "w12", "y": "w13", "unused": "w14"},
        relevant_docs={"a": ["p"], "b": ["r"]},
        hard_negatives={"a": ["x", "y"], "b": ["x"]},
    )
    labels = labels_by_text(model, dataset)
    assert {p for _, p in labels} == {"w10", "w11", "w12", "w13"}
    assert labels["w1", "w12"] == labels["w1", "w13"] == labels["w2", "w12"] == NEGATIVE


def test_a_curated_negative_is_never_masked(model):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1", "b": "w2"},
        corpus={"p": "w10", "r": "w11", "copy": "W10"},
        relevant_docs={"a": ["p"], "b": ["r"]},
        hard_negatives={"a": ["copy"]},
    )
    batch = collate(model, dataset)
    row = texts_of(model, batch, "q").index("w1")
    assert sorted(batch["label"][row].tolist()) == [NEGATIVE, NEGATIVE, 1]


def test_use_all_docs_trains_every_relevant_passage():
    dataset = make_dataset(passages=4, questions=1)
    dataset.relevant_docs["q0-0"] = ["p0", "p1"]
    assert len(make_groups(dataset, use_all_docs=True)[1].query_ids) == 2
    assert len(make_groups(dataset, use_all_docs=False)[1].query_ids) == 1


def test_one_passage_alone_cannot_be_trained_on():
    with pytest.raises(DatasetError, match="one passage"):
        make_groups(make_dataset(passages=1), False)


@pytest.mark.parametrize(("count", "size"), [(1, 8), (7, 8), (8, 8), (9, 8), (33, 8), (100, 32), (5, 2)])
def test_an_epoch_holds_every_group_once_and_no_batch_of_one(count, size):
    sampler = GroupBatchSampler(range(count), batch_size=size, drop_last=False, seed=3)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == len(sampler)
    assert all(len(batch) <= max(size, 3) for batch in batches)
    assert count == 1 or all(len(batch) > 1 for batch in batches)


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = GroupBatchSampler(range(50), batch_size=8, drop_last=False, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def features(model, batch):
    names = [key.removesuffix("_input_ids") for key in batch if key.endswith("_input_ids")]
    return [{key[len(n) + 1 :]: value for key, value in batch.items() if key.startswith(n + "_")} for n in names]


def test_the_loss_is_sentence_transformers_own_where_nothing_is_masked(model):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    dataset = make_dataset(passages=6, questions=1)
    batch = collate(model, dataset)
    ours = MaskedInfoNCELoss(model, temperature=0.05)(features(model, batch), batch["label"])
    pairs = [(dataset.queries[q], dataset.corpus[ids[0]]) for q, ids in dataset.relevant_docs.items()]
    columns = [model.preprocess([pair[side] for pair in pairs]) for side in (0, 1)]
    theirs = MultipleNegativesRankingLoss(model, scale=20)(columns, None)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_a_masked_passage_has_no_part_in_the_loss(model):
    dataset = make_dataset(passages=3, questions=1)
    batch = collate(model, dataset)
    masked = batch["label"].clone()
    masked[masked == NEGATIVE] = IGNORED
    loss = MaskedInfoNCELoss(model, temperature=0.05)
    assert loss(features(model, batch), masked).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(features(model, batch), batch["label"]).item() > 0.01


def test_prompts_are_in_the_batch(tiny_model):
    model = SentenceTransformer(tiny_model, device="cpu", prompts={"query": "query : ", "document": "passage : "})
    batch = collate(model, make_dataset(passages=2))
    assert all(text.startswith("query :") for text in texts_of(model, batch, "q"))
    assert all(text.startswith("passage :") for text in texts_of(model, batch, "p"))
