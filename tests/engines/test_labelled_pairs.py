"""The engine on labelled pairs: two texts, and whether they belong together."""

import json
import random
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from llama_index_lora_embed import LabelledPairs, LoraEmbedding
from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.evaluation import evaluate_pairs
from tests.architectures import qwen3
from tests.conftest import make_dataset, make_engine
from tests.helpers.labelled_pairs import TRAIN, VAL, make_pairs

EXAMPLE = Path(__file__).parents[2] / "examples" / "qwen3_pairs.py"


def engine(model, path, data=TRAIN, **kwargs):
    settings = {
        "val_dataset": VAL,
        "epochs": 5,
        "learning_rate": 3e-3,
        "evaluation_steps": 0,
        "precision": "fp32",  # evaluations too, so that they can be compared digit by digit
    }
    return make_engine(model, path, data, **{**settings, **kwargs})


@pytest.mark.parametrize("objective", ["cosent", "cosine", None])
def test_roc_auc_is_reported_each_epoch_and_the_best_is_kept(tiny_model, tmp_path, objective):
    result = engine(tiny_model, tmp_path / "run", objective=objective).finetune()
    aucs = {entry["step"]: entry["metrics"]["roc_auc"] for entry in result.history}
    assert list(aucs) == [0, 13, 26, 39, 52, 65]
    assert result.tuned_metrics["roc_auc"] == max(aucs.values()) == aucs[result.best_step]
    assert result.tuned_metrics["roc_auc"] > result.base_metrics["roc_auc"]
    served = evaluate_pairs(LoraEmbedding(tmp_path / "run", device="cpu"), VAL)
    assert served.metrics["roc_auc"] == pytest.approx(result.tuned_metrics["roc_auc"], abs=1e-6)
    assert served.metrics["roc_auc"] == pytest.approx(roc_auc_score(VAL.scores, served.similarities), abs=1e-9)
    assert "60 labelled pairs" in result.summary
    manifest = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert manifest["dataset"]["pairs"] == len(TRAIN)
    assert manifest["metrics"]["tuned"]["roc_auc"] == result.tuned_metrics["roc_auc"]
    assert f"Trained on {len(TRAIN)} labelled pairs" in (tmp_path / "run" / "README.md").read_text()


def test_graded_pairs_are_selected_by_spearman(tiny_model, tmp_path):
    rng = random.Random(0)
    graded = LabelledPairs(TRAIN.texts1, TRAIN.texts2, [s * 0.8 + rng.uniform(0, 0.2) for s in TRAIN.scores])
    val = LabelledPairs(VAL.texts1, VAL.texts2, [s * 0.8 + rng.uniform(0, 0.2) for s in VAL.scores])
    result = engine(tiny_model, tmp_path / "run", data=graded, val_dataset=val).finetune()
    values = [entry["metrics"]["spearman"] for entry in result.history]
    assert result.tuned_metrics["spearman"] == max(values)
    assert "roc_auc" not in result.tuned_metrics


def test_pairs_are_held_out_where_none_are_given(tiny_model, tmp_path):
    made = engine(tiny_model, tmp_path / "run", val_dataset=None, val_fraction=0.25)
    assert len(made.val_dataset) + len(made.dataset) == len(TRAIN)
    assert not made.val_dataset.shared_texts(made.dataset)
    assert "none of their texts was trained on" in made.finetune().summary


def with_random_negatives(questions=100):
    """Each question with its own passage, and with the passage of another question."""
    rng = random.Random(0)
    rows = []
    for i in range(questions):
        other = rng.choice([j for j in range(questions) if j != i])
        rows += [(f"question {i}", f"passage {i}", 1), (f"question {i}", f"passage {other}", 0)]
    return LabelledPairs.from_rows(rows)


def test_negatives_on_both_sides_are_counted_in_the_verdict(tiny_model, tmp_path):
    made = engine(tiny_model, tmp_path / "run", data=with_random_negatives(), val_dataset=None, epochs=1)
    shared = len(made.val_dataset.shared_texts(made.dataset))
    assert shared
    summary = made.finetune().summary
    assert f"{shared} of 20 validation pairs have a text that was trained on in another pair." in summary
    assert "The pairs were held out of the training set." in summary


def test_pairs_that_are_trained_on_are_dropped_from_validation(tiny_model, tmp_path):
    known = [text.upper() for text in TRAIN.texts2[:4]]
    both = LabelledPairs(known + VAL.texts1, TRAIN.texts1[:4] + VAL.texts2, TRAIN.scores[:4] + VAL.scores)
    with pytest.warns(UserWarning, match="4 of 64 validation pairs are training pairs, too, and were dropped"):
        made = engine(tiny_model, tmp_path / "run", val_dataset=both)
    assert (made.dataset, made.val_dataset) == (TRAIN, VAL)
    with pytest.raises(DatasetError, match="4 of 64 validation pairs with texts") as caught:
        engine(tiny_model, tmp_path / "run", val_dataset=both, on_overlap="raise")
    assert len(caught.value.problems) == 4
    assert engine(tiny_model, tmp_path / "run", val_dataset=VAL, on_overlap="raise").val_dataset == VAL


def test_validation_pairs_of_one_label_after_the_drop_are_replaced(tiny_model, tmp_path):
    positives = VAL.subset(i for i in range(len(VAL)) if VAL.scores[i] == 1)
    both = LabelledPairs(
        TRAIN.texts1[:4] + positives.texts1, TRAIN.texts2[:4] + positives.texts2, [1, 0, 1, 0, *positives.scores]
    )
    for val, said in ((both, "4 of 34 .* the others have one label: none was used"), (TRAIN, "100 of 100 .* not used")):
        with pytest.warns(UserWarning, match=f"{said}. Others are evaluated on instead. The pairs were held out"):
            made = engine(tiny_model, tmp_path / "run", val_dataset=val)
        assert len(made.dataset) + len(made.val_dataset) == len(TRAIN)


def test_the_metric_has_to_fit_what_is_held_out_instead(tiny_model, tmp_path):
    graded = LabelledPairs([*TRAIN.texts1, "w1"], [*TRAIN.texts2, "w2"], [*TRAIN.scores, 0.5])
    with pytest.raises(ConfigError, match="best_metric='roc_auc': expected one of spearman"):
        engine(tiny_model, tmp_path / "run", data=graded, val_dataset=TRAIN, best_metric="roc_auc")


def test_pairs_can_be_validated_on_queries_and_queries_on_pairs(tiny_model, tmp_path):
    by_questions = engine(
        tiny_model, tmp_path / "a", val_dataset=make_dataset(passages=10, seed=7), epochs=1
    ).finetune()
    assert "ndcg@10" in by_questions.base_metrics
    by_pairs = engine(tiny_model, tmp_path / "b", data=make_dataset(), epochs=1).finetune()
    assert "roc_auc" in by_pairs.base_metrics


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": "in_batch"}, "in_batch"),
        ({"objective": "triplet"}, "triplet"),
        ({"objective": "cosin"}, "cosin"),
        ({"objective": ObjectiveSettings(mini_batch_size=2)}, "mini_batch_size"),
        ({"use_all_docs": True}, "use_all_docs"),
        ({"best_metric": "ndcg@10"}, "best_metric='ndcg@10'"),
    ],
)
def test_settings_that_cannot_be_combined_with_pairs_are_refused(tiny_model, tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=said):
        engine(tiny_model, tmp_path / "run", **wrong).finetune()
    assert not (tmp_path / "run").exists()


def test_query_and_passage_have_their_own_prompts(tiny_model, tmp_path):
    prompts = {"query_prompt": "query: ", "passage_prompt": "passage: "}
    pairs = LabelledPairs(TRAIN.texts1, TRAIN.texts2, TRAIN.scores, symmetric=False)
    val = LabelledPairs(VAL.texts1, VAL.texts2, VAL.scores, symmetric=False)
    result = engine(tiny_model, tmp_path / "run", data=pairs, val_dataset=val, **prompts).finetune()
    model = LoraEmbedding(tmp_path / "run", device="cpu")
    queries = np.array([model.get_query_embedding(t) for t in val.texts1])
    passages = np.array(model.get_text_embedding_batch(val.texts2))
    by_hand = roc_auc_score(val.scores, (queries * passages).sum(axis=1))
    assert result.tuned_metrics["roc_auc"] == pytest.approx(by_hand, abs=1e-6)
    symmetric = engine(tiny_model, tmp_path / "other", **prompts).finetune()
    assert symmetric.fingerprint != result.fingerprint


@pytest.mark.slow
def test_pairs_resume_bit_by_bit(tiny_model, tmp_path, monkeypatch):
    from tests.helpers.training import stop_at

    calm = engine(tiny_model, tmp_path / "calm").finetune()
    stop_at(monkeypatch, 8, engine(tiny_model, tmp_path / "run").finetune)
    resumed = engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune()
    assert resumed.fingerprint == calm.fingerprint
    assert resumed.history == calm.history


@pytest.mark.parametrize("data", [make_pairs(topics=40), with_random_negatives(40)], ids=["plain", "random negatives"])
def test_the_example_of_two_sentences_runs_on_a_qwen3(tmp_path, monkeypatch, capsys, data):
    model = qwen3(tmp_path / "qwen3")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "\n".join(
            json.dumps({"sentence1": a, "sentence2": b, "label": int(s)})
            for a, b, s in zip(data.texts1, data.texts2, data.scores, strict=True)
        )
    )
    arguments = ["--model", str(model), "--pairs", str(pairs), "--output", str(tmp_path / "run"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["qwen3_pairs.py", *arguments, "--epochs", "4", "--learning-rate", "3e-3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "label  before  after" in printed
    assert len(re.findall(r"step +\d+: ROC-AUC", printed)) == 5
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "k_proj", "v_proj"}
    pooling = json.loads((tmp_path / "run" / "finetune.json").read_text())["pooling"][0]
    assert "lasttoken" in json.dumps(pooling)
    assert "cls" not in json.dumps(pooling).replace('"cls": false', "").replace("pooling_mode_cls_token", "")


def test_the_examples_own_pairs_are_whole():
    pairs = LabelledPairs.from_file(EXAMPLE.with_name("sentence_pairs.jsonl")).check("pairs")
    assert (len(pairs), pairs.positives, pairs.binary) == (56, 28, True)
    train, held_out = pairs.split(0.3, seed=0)
    assert train.positives
    assert held_out.positives
