import math

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import pairwise_cos_sim

from llama_index_lora_embed.config import ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.objectives.collator import CURATED, IGNORED
from llama_index_lora_embed.training.objectives.distillation import (
    ListwiseDistillationLoss,
    MarginDistillationLoss,
    _at,
)
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from llama_index_lora_embed.training.objectives.plan import training_plan
from llama_index_lora_embed.training.teacher import Teacher
from tests.conftest import make_dataset
from tests.helpers.gradients import chunks, distance, gradient, model_with_lora
from tests.helpers.teachers import shared_words


@pytest.fixture
def model(tiny_model):
    return model_with_lora(tiny_model)


@pytest.fixture
def plan_of(model, tmp_path):
    def make(dataset, teacher=shared_words, *, use_all_docs=False, **objective):
        source = Teacher(teacher, tmp_path / "scores.jsonl")
        groups = make_groups(dataset, use_all_docs)
        settings = ObjectiveSettings(**{"name": "distillation", **objective})
        return training_plan(model, dataset, groups, None, TrainingSettings(), settings, teacher=source)

    return make


def mined(passages=8, negatives=3):
    """One query for each passage, with its hard negatives."""
    dataset = make_dataset(passages=passages, questions=1, sources=False)
    dataset.hard_negatives = {
        f"q{n}-0": [f"p{(n + step) % passages}" for step in range(1, negatives + 1)] for n in range(passages)
    }
    return dataset.check()


def batch_of(plan, count):
    batch = plan.inputs["data_collator"]([{"group": i} for i in range(count)])
    return chunks(batch), batch["label"]


def columns_of(model, dataset):
    """Token tensors of the query, the passage and the hard negatives, and the same texts as pairs with the query."""
    texts = [[q, dataset.corpus[dataset.relevant_docs[i][0]], *(dataset.corpus[n] for n in dataset.hard_negatives[i])]
             for i, q in dataset.queries.items()]  # fmt: skip
    return [model.preprocess(list(column)) for column in zip(*texts, strict=True)], texts


def scaled(scores):
    low, high = np.percentile(scores, [1, 99])
    return torch.tensor(np.clip((np.asarray(scores) - low) / (high - low), 0, 1))


def test_the_logits_of_a_cross_encoder_are_scaled_and_stand_where_they_belong(plan_of, cross_encoder):
    dataset = mined()
    plan = plan_of(dataset, cross_encoder)
    _, (labels, scores) = batch_of(plan, 8)
    assert ((labels > 0) | (labels == CURATED)).equal(~scores.isnan())
    assert (~scores.isnan()).sum() == 8 * 4
    model = CrossEncoder(cross_encoder, device="cpu")
    pairs = [(text[0], other) for text in columns_of(model_of(plan), dataset)[1] for other in text[1:]]
    expected = scaled(model.predict(pairs, activation_fn=torch.nn.Identity()))
    assert sorted(scores[~scores.isnan()].tolist()) == pytest.approx(sorted(expected.tolist()), abs=1e-4)
    of_passages = sorted(scores[labels > 0].tolist())
    assert of_passages == pytest.approx(sorted(expected.view(8, 4)[:, 0].tolist()), abs=1e-4)


def model_of(plan):
    return plan.inputs["loss"].model


def test_the_listwise_loss_is_sentence_transformers_own_on_scaled_scores(model, plan_of):
    dataset = mined()
    plan = plan_of(dataset, contrastive_weight=0.0)
    ours = plan.inputs["loss"](*batch_of(plan, 8))
    features, texts = columns_of(model, dataset)
    labels = scaled([score for row in texts for score in shared_words([(row[0], t) for t in row[1:]])]).view(8, 4)
    theirs = (
        losses.DistillKLDivLoss(
            model, similarity_fct=pairwise_cos_sim, student_temperature=0.05, teacher_temperature=0.3
        )(features, labels.float())
        / 0.05**2
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert ours.item() > 0.1
    assert distance(gradient(model, ours), gradient(model, theirs)) < 1e-4


def test_the_margin_loss_is_sentence_transformers_own_in_units_of_the_spreads(model, plan_of):
    dataset = mined()
    plan = plan_of(dataset, name="margin_mse")
    loss = plan.inputs["loss"]
    assert isinstance(loss, MarginDistillationLoss)
    ours = loss(*batch_of(plan, 8))
    features, texts = columns_of(model, dataset)
    scores = scaled([score for row in texts for score in shared_words([(row[0], t) for t in row[1:]])]).view(8, 4)
    margins = scores[:, :1] - scores[:, 1:]
    assert loss.spreads[1] == pytest.approx(margins.square().mean().sqrt().item(), rel=1e-5)
    theirs = losses.MarginMSELoss(model, similarity_fct=lambda a, b: pairwise_cos_sim(a, b) / loss.spreads[0])(
        features, (margins / loss.spreads[1]).float()
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert distance(gradient(model, ours), gradient(model, theirs)) < 1e-4


def test_the_students_spread_is_that_of_its_margins_before_training(model, plan_of):
    dataset = mined()
    spread = plan_of(dataset, name="margin_mse").inputs["loss"].spreads[0]
    features, _ = columns_of(model, dataset)
    vectors = [model(column)["sentence_embedding"] for column in features]
    margins = [pairwise_cos_sim(vectors[0], vectors[1]) - pairwise_cos_sim(vectors[0], other) for other in vectors[2:]]
    assert spread == pytest.approx(torch.stack(margins).square().mean().sqrt().item(), rel=1e-4)


def test_a_student_with_its_teachers_distribution_has_nothing_to_learn(model, plan_of):
    _, (labels, scores) = batch_of(plan_of(mined()), 8)
    loss = ListwiseDistillationLoss(model, 0.05, teacher_temperature=0.05, contrastive_weight=0.0)
    torch.manual_seed(0)
    similarities = torch.rand(labels.shape)
    own = similarities.masked_fill(scores.isnan(), math.nan) + 0.3
    assert loss.distance(similarities, labels > 0, own).item() == pytest.approx(0, abs=1e-5)
    assert loss.distance(-similarities, labels > 0, own).item() > 1


def test_a_student_with_its_teachers_margins_has_little_to_learn_whatever_their_ranges(model, plan_of):
    def student(pairs):
        queries, passages = zip(*pairs, strict=True)
        return 30 * pairwise_cos_sim(model.encode_query(list(queries)), model.encode_document(list(passages))) - 7

    plan = plan_of(mined(), student, name="margin_mse")
    assert plan.inputs["loss"](*batch_of(plan, 8)).item() < 0.01, "the first and the last percent are cut off"
    other = plan_of(mined(), name="margin_mse")
    assert other.inputs["loss"](*batch_of(other, 8)).item() > 0.1


def test_a_little_contrastive_loss_is_added_without_negatives_that_the_teacher_takes_for_answers(
    model, plan_of, cross_encoder
):
    plan = plan_of(mined(), cross_encoder)
    features, labels = batch_of(plan, 8)
    alone = ListwiseDistillationLoss(model, 0.05, teacher_temperature=0.3, contrastive_weight=0.0)(features, labels)
    (label, scores) = labels
    answers = (label == CURATED) & (scores > 0.6 * _at(label > 0, scores))
    assert 0 < answers.sum() < (label == CURATED).sum()
    contrastive = MaskedInfoNCELoss(model, 0.05)(features, label.masked_fill(answers, IGNORED))
    assert plan.inputs["loss"](features, labels).item() == pytest.approx(
        alone.item() + 0.1 * contrastive.item(), rel=1e-5
    )
    half = plan_of(mined(), cross_encoder, contrastive_weight=0.5).inputs["loss"](features, labels)
    assert half.item() == pytest.approx(alone.item() + 0.5 * contrastive.item(), rel=1e-5)


@pytest.mark.parametrize("objective", [
    {"name": "distillation"}, {"name": "margin_mse"}, {"name": "distillation", "matryoshka_dims": (8,)},
], ids=str)  # fmt: skip
def test_steps_in_chunks_have_the_gradient_of_whole_ones(model, plan_of, objective):
    whole = plan_of(mined(), mini_batch_size=None, **objective)
    expected = gradient(model, whole.inputs["loss"](*batch_of(whole, 8)))
    chunked = plan_of(mined(), mini_batch_size=3, **objective)
    features, labels = batch_of(chunked, 8)
    assert len(features) > 4
    assert chunked.inputs["loss"].cached
    assert distance(gradient(model, chunked.inputs["loss"](features, labels)), expected) < 1e-4


def test_queries_without_enough_hard_negatives_are_given_others_that_are_no_false_negatives(plan_of):
    dataset = make_dataset(passages=12)
    dataset.hard_negatives = {"q0-0": ["p4", "p5", "p6", "p7", "p8"]}
    plan = plan_of(dataset)
    _, (_, scores) = batch_of(plan, 12)
    counts = (~scores.isnan()).sum(dim=1).tolist()
    assert sorted(counts) == [4] * 23 + [6]
    passages = plan.inputs["data_collator"].dataset.hard_negatives
    assert passages["q0-0"] == ["p4", "p5", "p6", "p7", "p8"]
    for query_id, negatives in passages.items():
        sibling = int(query_id[1:].split("-")[0]) // 2 * 2
        assert not {f"p{sibling}", f"p{sibling + 1}"} & set(negatives)


def test_all_passages_of_a_query_are_compared_where_it_is_trained_with_all(plan_of):
    dataset = mined()
    dataset.relevant_docs["q0-0"] = ["p0", "p5"]
    _, (_, scores) = batch_of(plan_of(dataset.check(), use_all_docs=True), 8)
    (twice,) = torch.nonzero((~scores.isnan()).sum(dim=1) == 5).T.tolist()
    assert len(twice) == 2, "a row for each of the two passages, with both and the three negatives"
    assert scores[twice[0]].nan_to_num(-1).equal(scores[twice[1]].nan_to_num(-1))


def test_a_text_that_is_trained_against_is_scored_as_it_is(plan_of):
    seen = []

    def teacher(pairs):
        seen.extend(pairs)
        return shared_words(pairs)

    dataset = mined()
    dataset.training_passages = {"q0-0": "w1 w2 w3"}
    plan_of(dataset.check(), teacher)
    assert (dataset.queries["q0-0"], "w1 w2 w3") in seen
    assert (dataset.queries["q7-0"], dataset.corpus["p0"]) in seen


def test_the_digest_is_that_of_the_scores(plan_of):
    dataset = mined()
    digest = plan_of(dataset).teacher_scores
    assert digest == plan_of(mined()).teacher_scores
    assert digest != plan_of(dataset, lambda pairs: [2 * score for score in shared_words(pairs)]).teacher_scores
    assert digest != plan_of(mined(negatives=4)).teacher_scores


@pytest.mark.parametrize("constant", [
    lambda pairs: [0.5] * len(pairs),
    lambda pairs: [len(query) for query, _ in pairs],
], ids=["everywhere", "for a query"])  # fmt: skip
def test_a_teacher_that_does_not_tell_passages_apart_is_refused(plan_of, constant):
    with pytest.raises(ConfigError, match="gives all passages of a query the same score"):
        plan_of(mined(), constant)


def test_a_query_for_which_no_passage_can_be_a_negative_is_named(plan_of):
    with pytest.raises(DatasetError) as caught:
        plan_of(make_dataset(passages=2))
    assert len(caught.value.problems) == 4
