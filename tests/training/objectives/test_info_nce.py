import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    GISTEmbedLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.training.lora import add_lora
from llama_index_lora_embed.training.objectives.collator import CURATED, IGNORED, NEGATIVE
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss, adapter_disabled
from tests.conftest import make_dataset
from tests.helpers.gradients import batch_of, distance, gradient, model_with_lora


@pytest.fixture
def model(tiny_model):
    return model_with_lora(tiny_model)


def pairs_of(model, dataset):
    pairs = [(dataset.queries[q], dataset.corpus[ids[0]]) for q, ids in dataset.relevant_docs.items()]
    return [model.preprocess([pair[side] for pair in pairs]) for side in (0, 1)]


def test_the_default_loss_is_sentence_transformers_own_where_nothing_is_masked(model):
    dataset = make_dataset(passages=12, questions=1, sources=False)
    ours = MaskedInfoNCELoss(model, 0.05)(*batch_of(model, dataset))
    theirs = MultipleNegativesRankingLoss(model, scale=20)(pairs_of(model, dataset), None)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert distance(gradient(model, ours), gradient(model, theirs)) < 1e-5


def test_hard_negatives_give_sentence_transformers_loss_of_n_tuples(model):
    dataset = make_dataset(passages=9, questions=1, sources=False)
    used = {f"q{n}-0": f"p{n}" for n in range(3)}
    dataset = dataset.model_copy(update={
        "queries": {q: dataset.queries[q] for q in used},
        "relevant_docs": {q: [p] for q, p in used.items()},
        "hard_negatives": {f"q{n}-0": [f"p{n + 3}", f"p{n + 6}"] for n in range(3)},
    })  # fmt: skip
    ours = MaskedInfoNCELoss(model, 0.05)(*batch_of(model, dataset.check()))
    texts = [[dataset.corpus[f"p{n + start}"] for n in range(3)] for start in (0, 3, 6)]
    columns = [model.preprocess(column) for column in ([dataset.queries[q] for q in used], *texts)]
    theirs = MultipleNegativesRankingLoss(model, scale=20)(columns, None)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert distance(gradient(model, ours), gradient(model, theirs)) < 1e-5


def test_a_masked_passage_has_no_part_in_the_loss(model):
    features, labels = batch_of(model, make_dataset(passages=4, sources=False))
    loss = MaskedInfoNCELoss(model, 0.05)
    before = loss(features, labels).item()
    positive = labels.argmax(dim=1)
    for row in range(len(labels)):
        labels[row, (positive[row] + 1) % 4] = IGNORED
    masked = loss(features, labels).item()
    assert 0 < masked < before


def test_a_query_whose_negatives_are_all_masked_has_no_loss_and_no_gradient(model):
    features, labels = batch_of(model, make_dataset(passages=3, questions=1, sources=False))
    alone = labels.clone()
    alone[alone == NEGATIVE] = IGNORED
    loss = MaskedInfoNCELoss(model, 0.05)
    nothing = loss(features, alone)
    assert nothing.item() == 0
    assert gradient(model, nothing).abs().max() == 0
    # and the others' share of the average stays what it was
    one = labels.clone()
    one[0][one[0] == NEGATIVE] = IGNORED
    each = []
    for row in range(3):
        only = alone.clone()
        only[row] = labels[row]
        each.append(loss(features, only).item())
    assert loss(features, one).item() == pytest.approx(each[1] + each[2], rel=1e-5)


def test_equal_texts_are_masked_by_node_although_dropout_makes_their_embeddings_differ(tiny_model):
    """A mask by similarity would need a similarity of 1."""
    model = model_with_lora(tiny_model, dropout=0.5)
    dataset = EmbeddingQAFinetuneDataset(
        queries={"a": "w1 w2", "b": "w3 w4", "c": "w5"},
        corpus={"x": "w10 w11 w12", "y": "w10 w11  w12", "z": "w20"},
        relevant_docs={"a": ["x"], "b": ["y"], "c": ["z"]},
    )
    features, labels = batch_of(model, dataset.check())
    twins = model(dict(features[1]))["sentence_embedding"][:2].detach()
    assert float(twins[0] @ twins[1]) < 0.999
    assert sorted(labels[:2, :2].flatten().tolist()) == [IGNORED, IGNORED, 1, 1]
    assert labels[:2, 2].tolist() == [NEGATIVE, NEGATIVE]


def graded():
    dataset = make_dataset(passages=8, questions=1, sources=False)
    dataset.relevant_docs = {q: [f"p{n}", f"p{(n + 1) % 8}"] for n, q in enumerate(dataset.queries)}
    dataset.relevance_scores = {q: {ids[0]: 0.8, ids[1]: 0.2} for q, ids in dataset.relevant_docs.items()}
    return dataset.check()


def test_soft_labels_of_one_passage_are_the_plain_loss(model):
    dataset = make_dataset(passages=8, sources=False)
    dataset.relevance_scores = {q: {ids[0]: 0.3} for q, ids in list(dataset.relevant_docs.items())[:5]}
    loss = MaskedInfoNCELoss(model, 0.05)
    soft, plain = batch_of(model, dataset, soft=True), batch_of(model, dataset)
    assert soft[1].equal(plain[1])
    ones = make_dataset(passages=8, sources=False)
    full = loss(*batch_of(model, ones)).item()
    ones.relevance_scores = {q: {ids[0]: 0.3} for q, ids in ones.relevant_docs.items()}
    assert loss(*batch_of(model, ones, soft=True)).item() == pytest.approx(0.3 * full, rel=1e-5)


def test_soft_labels_are_the_cross_entropy_against_the_grades(model):
    dataset = graded()
    features, labels = batch_of(model, dataset, soft=True)
    vectors = torch.nn.functional.normalize(torch.cat([model(dict(f))["sentence_embedding"] for f in features]), dim=-1)
    scores = vectors[:8] @ vectors[8:].T / 0.05
    expected = torch.nn.functional.cross_entropy(scores, labels / labels.sum(dim=1, keepdim=True)) * 0.8
    assert MaskedInfoNCELoss(model, 0.05)(features, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert ((labels > 0).sum(dim=1) == 2).all()


def test_the_first_dimensions_are_trained_as_sentence_transformers_matryoshka_loss_does(model):
    dataset = make_dataset(passages=8, questions=1, sources=False)
    ours = MaskedInfoNCELoss(model, 0.05, dims=(8, 16))(*batch_of(model, dataset))
    inner = MultipleNegativesRankingLoss(model, scale=20)
    theirs = MatryoshkaLoss(model, inner, [32, 16, 8])(pairs_of(model, dataset), None)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert distance(gradient(model, ours), gradient(model, theirs)) < 1e-5


def test_the_full_dimension_alone_is_the_plain_loss(model):
    batch = batch_of(model, make_dataset(passages=6))
    plain = MaskedInfoNCELoss(model, 0.05)(*batch).item()
    assert MaskedInfoNCELoss(model, 0.05, dims=(32,))(*batch).item() == plain
    assert MaskedInfoNCELoss(model, 0.05, dims=(16, 32))(*batch).item() > plain


def test_a_guide_that_masks_nothing_changes_nothing(model):
    batch = batch_of(model, make_dataset(passages=8))
    plain, loose = MaskedInfoNCELoss(model, 0.05), MaskedInfoNCELoss(model, 0.05, guide_margin=-2.0)
    assert loose(*batch).item() == plain(*batch).item()
    assert gradient(model, loose(*batch)).equal(gradient(model, plain(*batch)))


def test_the_guide_is_gist_with_the_untuned_base(model, tiny_model):
    dataset = make_dataset(passages=12, questions=1, sources=False)
    base = SentenceTransformer(tiny_model, device="cpu").eval()
    gist = GISTEmbedLoss(model, base, temperature=0.05, contrast_anchors=False, contrast_positives=False)
    theirs = gist(pairs_of(model, dataset), None)
    batch = batch_of(model, dataset)
    ours = MaskedInfoNCELoss(model, 0.05, guide_margin=0.0)(*batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ours.item() < MaskedInfoNCELoss(model, 0.05)(*batch).item(), "something must have been masked"
    assert distance(gradient(model, ours), gradient(model, theirs)) < 1e-5


def test_the_guide_does_not_mask_hard_negatives(model):
    features, labels = batch_of(model, make_dataset(passages=6, questions=1, sources=False))
    strict = MaskedInfoNCELoss(model, 0.05, guide_margin=2.0)
    assert strict(features, labels).item() == 0, "everything is too close for this guide"
    curated = labels.clone()
    curated[curated == NEGATIVE] = CURATED
    assert strict(features, curated).item() == MaskedInfoNCELoss(model, 0.05)(features, labels).item()


def test_the_guide_compares_with_the_least_similar_of_several_positives(model):
    features, labels = batch_of(model, graded(), soft=True)
    guided = MaskedInfoNCELoss(model, 0.05, guide_margin=0.0)
    kept = guided._mask_by_guide(features, labels, 0.0)
    assert ((kept > 0) == (labels > 0)).all()
    with torch.no_grad(), adapter_disabled(model):
        vectors = torch.cat([model(dict(f))["sentence_embedding"] for f in features])
    similar = vectors[:8] @ vectors[8:].T
    for row in range(8):
        lowest = similar[row][labels[row] > 0].min()
        assert ((kept[row] == IGNORED) == ((labels[row] == NEGATIVE) & (similar[row] > lowest))).all()


def test_a_disabled_adapter_gives_the_base_and_is_trained_as_before_afterwards(tiny_model):
    model = model_with_lora(tiny_model, dropout=0.5)
    base = SentenceTransformer(tiny_model, device="cpu").eval()
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    text = model.preprocess(["w1 w2 w3"])
    with adapter_disabled(model), torch.no_grad():
        assert model(dict(text))["sentence_embedding"].equal(base(dict(text))["sentence_embedding"])
    assert not model(dict(text))["sentence_embedding"].equal(base(dict(text))["sentence_embedding"])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert {name: module.training for name, module in model.named_modules()} == training


def test_modules_to_save_are_enabled_again_after_the_guide(tiny_model):
    model = SentenceTransformer(tiny_model, device="cpu")
    add_lora(model, LoraConfig(r=4, target_modules=["query"], modules_to_save=["LayerNorm"]), TrainingSettings())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    text = model.preprocess(["w1 w2 w3"])
    before = model(dict(text))["sentence_embedding"].detach()
    with adapter_disabled(model), torch.no_grad():
        assert not model(dict(text))["sentence_embedding"].equal(before)
    assert model(dict(text))["sentence_embedding"].equal(before)


def test_the_loss_of_a_query_is_weighted_by_its_grade(tiny_model):
    model = SentenceTransformer(tiny_model, device="cpu").eval()
    model.prompts.update(query="", document="")

    def loss_of(scores):
        dataset = EmbeddingQAFinetuneDataset(
            queries={"a": "w1 w2", "b": "w3 w4"},
            corpus={"x": "w1 w5 w6", "y": "w3 w7 w8"},
            relevant_docs={"a": ["x"], "b": ["y"]},
            relevance_scores=scores,
        ).check()
        return MaskedInfoNCELoss(model, 0.05)(*batch_of(model, dataset)).item()

    plain, half, one = loss_of(None), loss_of({"a": {"x": 0.5}, "b": {"y": 0.5}}), loss_of({"a": {"x": 1.0}})
    assert half == pytest.approx(plain / 2, rel=1e-5)
    assert one == pytest.approx(plain, rel=1e-6)
