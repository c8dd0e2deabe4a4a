"""A teacher in the engine: mined negatives, its scores, a real training, resuming, and what is no teacher."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine, run_finetune
from llama_index_lora_embed.config import FinetuneConfig, MiningSettings, ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError, ModelNotFoundError
from llama_index_lora_embed.training.negatives import mine_hard_negatives
from llama_index_lora_embed.training.teacher import scores_file
from tests.conftest import make_dataset, make_engine
from tests.helpers.labelled_pairs import make_pairs
from tests.helpers.llms import FakeLLM
from tests.helpers.teachers import save_cross_encoder, shared_words
from tests.helpers.training import stop_at, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "run")


def losses_of(out):
    entries = [json.loads(line) for line in Path(f"{out}.run", "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def margins(embed_model, dataset, teacher):
    """The student's margins and the teacher's between each query's passage and its mined negatives."""
    of_student, of_teacher = [], []
    for query_id, query in dataset.queries.items():
        texts = [dataset.corpus[i] for i in (dataset.relevant_docs[query_id][0], *dataset.hard_negatives[query_id])]
        scores = teacher([(query, text) for text in texts])
        vector = np.asarray(embed_model.get_query_embedding(query))
        cosines = np.asarray(embed_model.get_text_embedding_batch(texts)) @ vector
        of_student += list(cosines[0] - cosines[1:])
        of_teacher += [scores[0] - score for score in scores[1:]]
    return of_student, of_teacher


@pytest.mark.slow
@pytest.mark.parametrize("objective", [None, "margin_mse"])
def test_a_students_margins_follow_its_teachers_on_the_training_data(tiny_model, cross_encoder, out, objective):
    dataset = make_dataset()
    model = CrossEncoder(cross_encoder, device="cpu")

    def teacher(pairs):
        return model.predict(pairs, activation_fn=torch.nn.Identity())

    mined, _ = mine_hard_negatives(
        dataset, SentenceTransformer(tiny_model, device="cpu"), MiningSettings.for_teacher(show_progress_bar=False)
    )
    settings = {"epochs": 30, "val_fraction": 0, "val_dataset": None}
    result = make_engine(tiny_model, out, dataset, teacher=cross_encoder, objective=objective, **settings).finetune()
    losses = losses_of(out)
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    before = np.corrcoef(*margins(LoraEmbedding(base_model=tiny_model, device="cpu"), mined, teacher))[0, 1]
    after = np.corrcoef(*margins(LoraEmbedding(result.adapter_path, device="cpu"), mined, teacher))[0, 1]
    assert before < 0.4
    assert after > 0.85


def test_a_teacher_mines_scores_and_distils_and_the_manifest_says_so(tiny_model, cross_encoder, out):
    engine = make_engine(tiny_model, out, teacher=cross_encoder, epochs=1)
    assert engine.config.objective.name == "distillation"
    assert engine.config.mining == MiningSettings.for_teacher(show_progress_bar=False)
    result = engine.finetune()
    assert result.mined[0].mean_negatives == 3
    manifest = json.loads(Path(out, "finetune.json").read_text())
    assert manifest["settings"]["teacher"]["name"] == Path(cross_encoder).name
    assert len(manifest["settings"]["teacher"]["scores"]) == 64
    assert manifest["settings"]["objective"]["name"] == "distillation"
    assert scores_file(out).exists()


def test_what_the_user_says_of_objective_and_mining_holds(tiny_model, out):
    mining = MiningSettings(num_negatives=1, show_progress_bar=False)
    objective = ObjectiveSettings(name="margin_mse", contrastive_weight=0.2)
    config = make_engine(tiny_model, out, teacher=shared_words, objective=objective, mining=mining).config
    assert (config.objective, config.mining, config.teacher) == (objective, mining, None)
    config = make_engine(tiny_model, out, teacher=shared_words, objective=ObjectiveSettings(sibling_window=0)).config
    assert (config.objective.name, config.objective.sibling_window) == ("distillation", 0)


def test_heuristic_queries_of_nodes_are_labelled_by_a_teacher_without_an_llm(tiny_model, cross_encoder, nodes, out):
    settings = {"show_progress_bar": False, "device": "cpu", "filters": None, "val_fraction": 0.3}
    engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, teacher=cross_encoder, **settings)
    assert engine.dataset.query_origins
    assert engine.config.teacher == cross_encoder
    assert engine.finetune().steps > 0


@pytest.mark.slow
def test_a_cross_encoder_a_path_object_and_a_configuration_give_the_same_scores(tiny_model, cross_encoder, tmp_path):
    settings = {"epochs": 1, "precision": "fp32"}
    by_path = make_engine(tiny_model, tmp_path / "path", teacher=Path(cross_encoder), **settings).finetune()
    model = CrossEncoder(cross_encoder, device="cpu")
    by_object = make_engine(tiny_model, tmp_path / "object", teacher=model, **settings).finetune()
    config = make_engine(tiny_model, tmp_path / "config", **settings).config.replace(teacher=cross_encoder)
    data = {"dataset": make_dataset(), "val_dataset": make_dataset(passages=10, seed=7, prefix="v")}
    config = FinetuneConfig.validated(json.loads(config.model_dump_json(exclude_unset=True)))
    by_config = run_finetune(config, **data)
    given = run_finetune(config.replace(teacher="./nowhere"), **data, teacher=model)
    assert by_path.fingerprint == by_object.fingerprint == by_config.fingerprint == given.fingerprint


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly_and_asks_its_teacher_nothing(tiny_model, tmp_path, monkeypatch):
    asked = []

    def teacher(pairs):
        asked.append(len(pairs))
        return shared_words(pairs)

    calm = make_engine(tiny_model, tmp_path / "calm", teacher=teacher).finetune()
    (pairs,) = asked
    run = tmp_path / "run"
    stop_at(monkeypatch, 5, make_engine(tiny_model, run, teacher=teacher).finetune)
    assert asked == [pairs, pairs]
    result = make_engine(tiny_model, run, teacher=teacher, resume_from_checkpoint=True).finetune()
    assert asked == [pairs, pairs], "the scores were on disk"
    assert result.fingerprint == calm.fingerprint
    assert result.history == calm.history


@pytest.mark.slow
def test_a_run_does_not_resume_with_other_scores(tiny_model, cross_encoder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop_at(monkeypatch, 5, make_engine(tiny_model, run, teacher=cross_encoder).finetune)
    other = save_cross_encoder(tmp_path / "other", tiny_model, seed=4)
    with pytest.raises(ConfigError, match=r"allow_changes=\['teacher_scores'\]"):
        make_engine(tiny_model, run, teacher=other, resume_from_checkpoint=True).finetune()
    allowed = {"resume_from_checkpoint": True, "allow_changes": ["teacher_scores"]}
    make_engine(tiny_model, run, teacher=other, **allowed).finetune()
    assert weights(run)


@pytest.mark.slow
def test_a_teacher_may_move_between_a_run_and_its_resumption(tiny_model, cross_encoder, tmp_path, monkeypatch):
    run, moved = tmp_path / "run", tmp_path / "moved"
    stop_at(monkeypatch, 5, make_engine(tiny_model, run, teacher=cross_encoder).finetune)
    shutil.copytree(cross_encoder, moved)
    monkeypatch.setattr(CrossEncoder, "predict", None)  # whoever computes now fails
    make_engine(tiny_model, run, teacher=moved, resume_from_checkpoint=True).finetune()
    assert weights(run)


@pytest.mark.slow
def test_each_round_of_mining_is_scored(tiny_model, out):
    asked = []

    def teacher(pairs):
        asked.append(pairs)
        return shared_words(pairs)

    mining = MiningSettings.for_teacher(rounds=2, show_progress_bar=False)
    make_engine(tiny_model, out, teacher=teacher, mining=mining, epochs=2).finetune()
    assert len(asked) == 2
    assert not set(asked[0]) & set(asked[1]), "the second round asks for what is new"


# what is no teacher


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (5, "teacher of type int"),
        (dict, "teacher of type type"),
        (torch.nn.Linear(2, 1), "teacher of type Linear"),
        (lambda: [], "cannot be called with a list alone"),
        (lambda query, passage: 0.0, "cannot be called with a list alone"),
        ("./nowhere", "nowhere"),
    ],
    ids=["number", "class", "module", "no argument", "two arguments", "no folder"],
)
def test_what_is_no_teacher_is_refused_at_once(tiny_model, out, teacher, said):
    with pytest.raises((ConfigError, ModelNotFoundError), match=said):
        make_engine(tiny_model, out, teacher=teacher)


def test_embedding_models_and_classifiers_are_no_teachers(tiny_model, adapter, out, tmp_path):
    classes = save_cross_encoder(tmp_path / "classes", tiny_model, labels=3)
    for teacher, said in (
        (tiny_model, "an embedding model"), (SentenceTransformer(tiny_model), "teacher of type SentenceTransformer"),
        (LoraEmbedding(adapter), "teacher of type LoraEmbedding"), (classes, "3 scores"),
        (CrossEncoder(classes, device="cpu"), "3 scores"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            make_engine(tiny_model, out, teacher=teacher)


def test_a_teacher_is_checked_before_an_llm_is_paid(tiny_model, nodes, out):
    llm = FakeLLM()
    with pytest.raises(ConfigError, match="an embedding model"):
        LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, teacher=tiny_model, llm=llm)
    assert llm.calls == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "triplet"}, "a teacher with objective 'triplet'"),
        ({"loss": torch.nn.Identity}, "a teacher with a loss"),
        ({"dataset": make_pairs(), "val_dataset": None}, "a teacher with labelled pairs"),
        ({"objective": ObjectiveSettings(guide=True)}, "guide=True with name='distillation'"),
        ({"teacher": None, "objective": "margin_mse"}, "objective 'margin_mse' without a teacher"),
        ({"teacher": None, "objective": ObjectiveSettings(contrastive_weight=0.2)}, "contrastive_weight=0.2"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"tune": "query", "objective": None}, 'teacher of type function with tune="query"'),
    ],
    ids=["objective", "loss", "pairs", "guide", "none", "weight", "batch", "tune"],
)
def test_a_teacher_with_what_does_not_go_with_it_is_refused(tiny_model, out, settings, said):
    with pytest.raises(ConfigError, match=said):
        make_engine(tiny_model, out, **{"teacher": shared_words, **settings})


@pytest.mark.parametrize(
    "answer", [lambda pairs: [float("nan")] * len(pairs), lambda pairs: [0.0], lambda pairs: np.zeros((len(pairs), 2))],
    ids=["nan", "count", "outputs"],
)  # fmt: skip
def test_scores_that_cannot_be_used_end_the_run_before_training(tiny_model, out, answer):
    with pytest.raises(ConfigError, match="expected a finite number for each of"):
        make_engine(tiny_model, out, teacher=answer).finetune()
    assert not Path(out).exists()
    assert not Path(f"{out}.run").exists()
