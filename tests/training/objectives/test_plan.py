import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.config import DISTILLED, ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.training.examples import make_examples, make_groups
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.collator import IGNORED, GroupCollator
from llama_index_lora_embed.training.objectives.frozen_passages import FrozenPassages
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from llama_index_lora_embed.training.objectives.plan import training_plan
from llama_index_lora_embed.training.objectives.samplers import ExampleBatchSampler
from llama_index_lora_embed.training.teacher import Teacher
from tests.conftest import WORDS, make_dataset
from tests.helpers.gradients import model_with_lora


@pytest.fixture
def model(tiny_model):
    model = model_with_lora(tiny_model)
    model.prompts.update(query="query : ", document="passage : ")
    return model


def plan_of(model, dataset, loss=None, *, settings=None, use_all_docs=False, teacher=None, **objective):
    groups = make_groups(dataset, use_all_docs) if isinstance(dataset, EmbeddingQAFinetuneDataset) else []
    settings, objective = settings or TrainingSettings(), ObjectiveSettings(**objective)
    return training_plan(model, dataset, groups, loss, settings, objective, teacher=teacher)


def columns(plan):
    return plan.inputs["train_dataset"].to_dict()


def graded_pairs(**kwargs):
    texts = [" ".join(WORDS[n : n + 4]) for n in range(40)]
    return LabelledPairs(texts[:20], texts[20:], [n % 5 / 4 for n in range(20)], **kwargs)


# queries and passages


def test_by_default_groups_are_trained_with_masked_in_batch_negatives(model):
    dataset = make_dataset()
    groups = make_groups(dataset, False)
    inputs = training_plan(model, dataset, groups, None, TrainingSettings(temperature=0.1)).inputs
    assert isinstance(inputs["data_collator"], GroupCollator)
    assert isinstance(inputs["loss"], MaskedInfoNCELoss)
    assert inputs["loss"].temperature == 0.1
    assert inputs["train_dataset"].to_dict() == {"group": list(range(24))}


def test_on_a_cpu_steps_are_computed_in_chunks_unless_that_is_switched_off(model):
    def cached(**settings):
        return plan_of(model, make_dataset(), **settings).inputs["loss"].cached

    assert cached()
    assert not cached(mini_batch_size=None)
    assert cached(mini_batch_size=5)
    model.to("meta")  # any other device
    assert not cached()
    assert cached(mini_batch_size=5)


def test_with_gradient_checkpointing_auto_uses_no_gradcache(model):
    plan = training_plan(
        model, make_dataset(), make_groups(make_dataset(), False), None, TrainingSettings(), gradient_checkpointing=True
    )
    assert not plan.inputs["loss"].cached


def test_every_setting_of_the_objective_reaches_the_loss_and_the_batches(model):
    plan = plan_of(
        model, make_dataset(), name="soft_labels", mini_batch_size=3, guide=True, guide_margin=0.1, matryoshka_dims=(8,)
    )
    loss, collator = plan.inputs["loss"], plan.inputs["data_collator"]
    assert (loss.cached, loss.guide_margin, loss.dims) == (True, 0.1, (8,))
    assert (collator.soft, collator.mini_batch_size) == (True, 3)


def test_near_duplicates_are_found_and_masked_unless_that_is_switched_off(model):
    dataset = make_dataset(passages=6, questions=1, sources=False)
    dataset.corpus["p4"] = " ".join(WORDS[100:140])
    dataset.corpus["p5"] = " ".join([*WORDS[100:139], "w199"])

    def ignored(**objective):
        collator = plan_of(model, dataset, **objective).inputs["data_collator"]
        return int((collator([{"group": n} for n in range(6)])["label"] == IGNORED).sum())

    assert ignored() == 2
    assert ignored(mask_near_duplicates=False) == 0


def test_with_the_whole_corpus_as_negatives_near_duplicates_without_queries_are_masked_too(model):
    dataset = make_dataset(passages=6, questions=1, sources=False)
    dataset.corpus["p4"] = " ".join(WORDS[100:140])
    dataset.corpus["p6"] = " ".join([*WORDS[100:139], "w199"])
    passages = FrozenPassages(lambda texts: np.eye(len(texts), 32, dtype=np.float32))
    groups = make_groups(dataset, False)
    plan = training_plan(model, dataset, groups, None, TrainingSettings(), ObjectiveSettings(), passages=passages)
    ignored = dict(zip(dataset.queries, plan.inputs["loss"].targets.ignored, strict=True))
    assert list(dataset.corpus).index("p6") in ignored["q4-0"]


@pytest.mark.parametrize(("negatives", "columns"), [("corpus", 6), ("answered", 3), ("auto", 3)])
def test_passages_that_no_query_asks_for_are_negatives_where_that_is_chosen(model, negatives, columns):
    whole = make_dataset(passages=6, questions=1, sources=False)
    dataset = whole.subset(["q3-0", "q5-0"], whole.corpus)
    dataset.hard_negatives = {"q3-0": ["p4"]}
    asked = []

    def choose(texts, vectors, targets):
        asked.append((texts, vectors.shape, [targets.columns[at][0] for row in targets.relevant for at in row]))
        return "answered"

    passages = FrozenPassages(lambda texts: np.eye(len(texts), 32, dtype=np.float32), None, choose)
    settings, groups = TrainingSettings(negatives=negatives), make_groups(dataset, False)
    plan = training_plan(model, dataset, groups, None, settings, ObjectiveSettings(), passages=passages)
    loss = plan.inputs["loss"]
    assert (len(loss.vectors), len(loss.targets.columns)) == (columns, columns)
    relevant = [loss.targets.columns[at][0] for row in loss.targets.relevant for at in row]
    assert relevant == ["p3", "p5"]
    # the vectors are those of the columns that are left
    kept = [list(whole.corpus).index(i) for i, _ in loss.targets.columns]
    assert loss.vectors.argmax(dim=1).tolist() == kept
    assert plan.negatives == ("answered" if negatives == "auto" else negatives)
    texts = [whole.queries["q3-0"], whole.queries["q5-0"]]
    assert asked == ([(texts, (6, 32), ["p3", "p5"])] if negatives == "auto" else [])


def test_where_all_passages_are_asked_for_there_is_nothing_to_choose(model):
    dataset = make_dataset(passages=6, questions=1, sources=False)

    def choose(*_):
        raise AssertionError("nothing to choose")

    passages = FrozenPassages(lambda texts: np.eye(len(texts), 32, dtype=np.float32), None, choose)
    groups = make_groups(dataset, False)
    plan = training_plan(model, dataset, groups, None, TrainingSettings(), ObjectiveSettings(), passages=passages)
    assert (plan.negatives, len(plan.inputs["loss"].vectors)) == ("corpus", 6)


def test_a_dataset_of_siblings_alone_is_refused(model):
    dataset = make_dataset(passages=3)
    dataset.source_documents = dict.fromkeys(dataset.corpus, "d")
    with pytest.raises(DatasetError, match="sibling_window=0"):
        plan_of(model, dataset)
    plan_of(model, dataset, sibling_window=0)
    dataset.hard_negatives = {"q0-0": ["p1"]}
    plan_of(model, dataset)


def test_dimensions_that_the_model_does_not_have_are_refused(model):
    with pytest.raises(ConfigError, match="at most 32"):
        plan_of(model, make_dataset(), matryoshka_dims=(16, 64))


# examples


def test_triplets_have_the_first_hard_negative_or_else_a_passage_that_is_no_positive(model):
    dataset = make_dataset(passages=6)
    dataset.hard_negatives = {"q0-0": ["p4", "p5"], "q1-0": ["p5"]}
    plan = plan_of(model, dataset, name="triplet")
    rows = columns(plan)
    assert list(rows) == ["anchor", "positive", "negative_1"]
    negative = dict(zip(rows["anchor"], rows["negative_1"], strict=True))
    assert negative[dataset.queries["q0-0"]] == dataset.corpus["p4"]
    assert negative[dataset.queries["q1-0"]] == dataset.corpus["p5"]
    for number in range(6):
        siblings = {dataset.corpus[f"p{number // 2 * 2}"], dataset.corpus[f"p{number // 2 * 2 + 1}"]}
        assert negative[dataset.queries[f"q{number}-1"]] not in siblings
    assert plan.arguments["prompts"] == {"anchor": "query : ", "positive": "passage : ", "negative_1": "passage : "}
    loss = plan.inputs["loss"](model)
    assert isinstance(loss, losses.TripletLoss)
    assert loss.triplet_margin == 0.1
    vectors = torch.eye(3)[:2], torch.eye(3)[:2], torch.eye(3)[[2, 0]]
    assert loss.compute_loss_from_embeddings(list(vectors), None).item() == 0
    assert loss.compute_loss_from_embeddings([*vectors[:2], vectors[1]], None).item() == pytest.approx(0.1)


def test_a_query_without_any_negative_is_named(model):
    with pytest.raises(DatasetError) as caught:
        plan_of(model, make_dataset(passages=2), name="triplet")
    assert caught.value.problems == ["q0-0", "q0-1", "q1-0", "q1-1"]


def test_queries_with_too_few_hard_negatives_get_passages_that_are_no_false_negatives():
    dataset = make_dataset(passages=6)
    dataset.hard_negatives = {"q0-0": ["p4", "p5"], "q1-0": ["p5"]}
    near = {"p2": "p2", "p4": "p2"}
    rows = make_examples(dataset, make_groups(dataset, False), FalseNegatives(dataset, 2, near))
    found = {row.query_id: [i for i, _ in row.negatives] for row in rows}
    assert found["q0-0"] == ["p4", "p5"]
    assert found["q1-0"][0] == "p5"
    assert {len(ids) for ids in found.values()} == {2}
    for query_id, ids in found.items():
        number = int(query_id[1]) // 2 * 2
        assert not {f"p{number}", f"p{number + 1}"} & set(ids)
    assert not {"p4"} & set(found["q2-0"] + found["q2-1"])


@pytest.mark.parametrize("name", ["cosent", "cosine"])
def test_queries_become_pairs_labelled_with_their_grade_or_0(model, name):
    dataset = make_dataset(passages=8, questions=1)
    dataset.relevance_scores = {"q0-0": {"p0": 0.5}}
    dataset.hard_negatives = {"q0-0": ["p4", "p5"]}
    plan = plan_of(model, dataset.check(), name=name)
    rows = columns(plan)
    assert list(rows) == ["anchor", "positive", "label"]
    of_first = [(p, s) for a, p, s in zip(*rows.values(), strict=True) if a == dataset.queries["q0-0"]]
    assert of_first == [(dataset.corpus["p0"], 0.5), (dataset.corpus["p4"], 0), (dataset.corpus["p5"], 0)]
    assert sorted(rows["label"]) == [0.0] * 9 + [0.5] + [1.0] * 7
    loss = plan.inputs["loss"](model)
    assert isinstance(loss, losses.CoSENTLoss if name == "cosent" else losses.CosineSimilarityLoss)
    assert name == "cosine" or loss.scale == 20


def test_every_negative_gets_the_passage_prompt_however_many_there_are(model):
    dataset = make_dataset(passages=130, questions=1, sources=False)
    dataset.hard_negatives = {"q0-0": [f"p{n}" for n in range(10, 120)]}
    plan = plan_of(model, dataset, losses.MultipleNegativesRankingLoss)
    prompts = plan.arguments["prompts"]
    assert prompts["anchor"] == "query : "
    assert {name for name, prompt in prompts.items() if prompt == "passage : "} == columns(plan).keys() - {"anchor"}
    assert "negative_110" in prompts


def test_a_plan_says_whether_its_steps_can_be_computed_in_chunks(model):
    dataset = make_dataset()
    assert plan_of(model, dataset).gradcache
    assert plan_of(model, dataset, name="soft_labels").gradcache
    assert not plan_of(model, dataset, name="triplet").gradcache
    assert not plan_of(model, dataset, losses.MultipleNegativesRankingLoss).gradcache
    assert not plan_of(model, graded_pairs()).gradcache
    arguments = (model, dataset, make_groups(dataset, False), None, TrainingSettings())
    assert not training_plan(*arguments, gradient_checkpointing=True).gradcache


# labelled pairs


@pytest.mark.parametrize("symmetric", [True, False])
def test_labelled_pairs_are_ranked_by_their_labels_with_the_prompts_of_serving(model, symmetric):
    pairs = graded_pairs(symmetric=symmetric)
    plan = plan_of(model, pairs)
    assert columns(plan) == {"text1": pairs.texts1, "text2": pairs.texts2, "label": pairs.scores}
    assert isinstance(plan.inputs["loss"](model), losses.CoSENTLoss)
    first = "passage : " if symmetric else "query : "
    assert plan.arguments["prompts"] == {"text1": first, "text2": "passage : "}
    assert isinstance(plan_of(model, pairs, name="cosine").inputs["loss"](model), losses.CosineSimilarityLoss)


@pytest.mark.parametrize(
    "objective", [{"name": "in_batch"}, {"name": "soft_labels"}, {"name": "triplet"}, {"guide": True},
                  {"name": "distillation"}, {"name": "margin_mse"}, {"mini_batch_size": 4}],
)  # fmt: skip
def test_labelled_pairs_with_an_objective_for_queries_are_refused(objective):
    (problem,) = ObjectiveSettings(**objective).misfits(pairs=True, own_loss=False)
    assert "'cosent', 'cosine'" in problem


# the user's own loss


def test_examples_for_the_users_own_loss_never_share_a_batch_with_false_negatives(model):
    dataset = make_dataset(passages=20)
    dataset.hard_negatives = {"q0-0": ["p4", "p5"]}
    plan = plan_of(model, dataset, losses.MultipleNegativesRankingLoss)
    rows = columns(plan)
    assert list(rows) == ["anchor", "positive", "negative_1", "negative_2"]
    sampler = plan.arguments["batch_sampler"](plan.inputs["train_dataset"], batch_size=4, drop_last=False, seed=1)
    assert isinstance(sampler, ExampleBatchSampler)
    id_of = {text: i for i, text in dataset.corpus.items()}
    for batch in sampler:
        documents = [dataset.source_of(id_of[rows["positive"][i]]) for i in batch]
        assert len(set(documents)) == len(documents)
    loose = plan_of(model, dataset, losses.MultipleNegativesRankingLoss, sibling_window=0)
    sampler = loose.arguments["batch_sampler"](plan.inputs["train_dataset"], batch_size=4, drop_last=False, seed=1)
    assert any(len({dataset.source_of(id_of[rows["positive"][i]]) for i in batch}) < len(batch) for batch in sampler)


def test_a_loss_and_an_objective_together_are_refused():
    (problem,) = ObjectiveSettings(name="triplet").misfits(pairs=False, own_loss=True)
    assert "a loss together with" in problem


def test_what_makes_no_loss_is_refused(model):
    with pytest.raises(ConfigError, match="which makes a str from the model"):
        plan_of(model, make_dataset(), lambda model: "loss").inputs["loss"](model)


# all objectives in the trainer


def trained(model, plan, folder, **arguments):
    """The trainer after two epochs with a plan, and the losses that it logged."""
    trainer = SentenceTransformerTrainer(
        model=model,
        **plan.inputs,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=6, num_train_epochs=2, learning_rate=5e-3, seed=1,
            logging_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False, save_strategy="no",
            disable_tqdm=True, **plan.arguments, **arguments,
        ),
    )  # fmt: skip
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CASES = [
    {},
    {"mini_batch_size": 2, "guide": True, "matryoshka_dims": (8, 16)},
    {"name": "soft_labels", "mini_batch_size": 2},
    {"name": "triplet"},
    {"name": "cosent"},
    {"name": "cosine"},
    {"name": "distillation"},
    {"name": "margin_mse", "contrastive_weight": 0.1, "mini_batch_size": 2, "matryoshka_dims": (8, 16)},
    {"loss": losses.MultipleNegativesRankingLoss},
    {"loss": losses.CachedMultipleNegativesRankingLoss},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_objective_trains_the_adapter_in_as_many_steps_as_announced(model, cross_encoder, tmp_path, case):
    case = dict(case)
    if case.get("name") in DISTILLED:
        case["teacher"] = Teacher(cross_encoder, tmp_path / "scores.jsonl")
    dataset = make_dataset(passages=12)
    before = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    plan = plan_of(model, dataset, case.pop("loss", None), **case)
    trainer, values = trained(model, plan, tmp_path)
    after = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert (before - after).abs().max() > 1e-4
    assert len(values) == trainer.state.max_steps == trainer.state.global_step
    assert values[0] > 0
    assert all(0 <= value < 100 for value in values)


def test_labelled_pairs_train_the_adapter(model, tmp_path):
    trainer, values = trained(model, plan_of(model, graded_pairs()), tmp_path)
    assert trainer.state.global_step == len(values) == 8
    assert values[0] > 0


def test_the_trainer_tokenizes_texts_with_the_prompts_of_serving(model, tmp_path):
    plan = plan_of(model, make_dataset(), name="triplet")
    trainer = SentenceTransformerTrainer(
        model=model,
        **plan.inputs,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False, **plan.arguments
        ),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    for column, prompt in (("anchor", "query :"), ("positive", "passage :"), ("negative_1", "passage :")):
        texts = model.tokenizer.batch_decode(batch[f"{column}_input_ids"], skip_special_tokens=True)
        assert all(text.startswith(prompt) for text in texts)
