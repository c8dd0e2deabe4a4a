"""What is wrong with the engine's arguments is found when it is made, all of it, and before anything is loaded."""

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import losses

from llama_index_lora_embed import EmbeddingAdapterFinetuneEngine, LabelledPairs
from llama_index_lora_embed.config import MiningSettings, ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, ModelNotFoundError, OutputDirectoryError
from llama_index_lora_embed.engines.validation import BINARY_PAIR_METRICS, PAIR_METRICS
from llama_index_lora_embed.evaluation.metrics import NAMES, query_metrics
from llama_index_lora_embed.evaluation.pairs import pair_metrics
from tests.conftest import make_dataset, make_engine, shown
from tests.helpers.evaluation import WordCountEmbedding
from tests.helpers.labelled_pairs import TRAIN as PAIRS
from tests.helpers.labelled_pairs import VAL as VAL_PAIRS
from tests.helpers.teachers import save_cross_encoder

VAL = make_dataset(passages=10, seed=7, prefix="v")
GRADED = LabelledPairs(VAL_PAIRS.texts1, VAL_PAIRS.texts2, [n % 5 / 4 for n in range(len(VAL_PAIRS))])
OF_PAIRS = {"dataset": PAIRS, "val_dataset": VAL_PAIRS}


def engine(path, model_id="no/model-is-needed", **kwargs):
    return make_engine(model_id, path, **{"val_dataset": VAL, "batch_size": 32, "device": None, **kwargs})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seed": 2**32}, "seed=4294967296"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": "cuda:one"}, "device='cuda:one'"),
        ({"query_prompt": 5}, "query_prompt=5"),
        ({"passage_prompt": b"x"}, "passage_prompt=b'x'"),
        ({"revision": 7}, "revision=7"),
        ({"cache_folder": 3}, "cache_folder=3"),
        ({"pooling": "CLS"}, "pooling='CLS'"),
        ({"quantized": True, "device": "cpu"}, "quantized=True with device='cpu'"),
        ({"quantized": True, "device": "mps"}, "quantized=True with device='mps'"),
        ({"allow_changes": ["lerning_rate"]}, "allow_changes with 'lerning_rate'"),
        # what an adapter is judged by
        ({"best_metric": ""}, "best_metric=''"),
        ({"best_metric": "ndgc@10"}, r"best_metric='ndgc@10': expected one of hit@1, .*ndcg@10"),
        ({"best_metric": "roc_auc"}, "best_metric='roc_auc'"),
        ({"best_metric": "roc_auc", "val_dataset": None}, "best_metric='roc_auc'"),
        ({**OF_PAIRS, "best_metric": "ndcg@10"}, "best_metric='ndcg@10': expected one of roc_auc"),
        ({"best_metric": "roc_auc", "val_dataset": GRADED}, "expected one of spearman, pearson"),
        ({"best_metric": "hit@1", "val_dataset": None, "val_fraction": 0}, "best_metric='hit@1' without validation"),
        ({"early_stopping_patience": 3, "val_dataset": None, "val_fraction": 0}, "early_stopping_patience=3 without"),
        # the objective and the kind of data
        ({**OF_PAIRS, "objective": "in_batch"}, "labelled pairs with name='in_batch'"),
        ({**OF_PAIRS, "objective": "triplet"}, "labelled pairs with name='triplet'"),
        ({**OF_PAIRS, "objective": ObjectiveSettings(guide=True)}, "labelled pairs with guide=True"),
        ({**OF_PAIRS, "mining": MiningSettings()}, "mining with labelled pairs"),
        ({"objective": "triplet", "loss": losses.CoSENTLoss}, "a loss together with"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"batch_size": 1, "objective": "soft_labels"}, "batch_size=1"),
        ({**OF_PAIRS, "batch_size": 1}, "batch_size=1: expected at least 2, because pairs are compared"),
        # a loss of the user's own
        ({"loss": 5}, "loss of type int"),
        ({"loss": torch.nn.MSELoss()}, r"loss of type MSELoss without \.model"),
        ({"loss": dict}, "loss=dict"),
        ({"loss": lambda: None}, "cannot be called with the model alone"),
        ({"loss": losses.MatryoshkaLoss}, "loss=MatryoshkaLoss, which cannot be called with the model alone"),
    ],
    ids=lambda value: shown(value)[:50],
)
def test_a_wrong_argument_is_named_when_the_engine_is_made(tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=said) as caught:
        engine(tmp_path / "run", **wrong)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "right",
    [
        {"seed": 2**32 - 1},
        {"device": "cuda:3"},
        {"device": torch.device("cpu")},
        {"cache_folder": Path("/cache")},
        {"best_metric": "hit@1"},
        {"best_metric": "roc_auc", "val_dataset": VAL_PAIRS},
        {**OF_PAIRS, "best_metric": "pearson"},
        {**OF_PAIRS, "batch_size": 1, "objective": "cosine"},
        {"batch_size": 1, "objective": "triplet"},
        {"batch_size": 1, "loss": losses.TripletLoss},
        {"objective": "cosent"},
        {"loss": partial(losses.MatryoshkaLoss, loss=None, matryoshka_dims=[8])},
        {"allow_changes": ("epochs", "mining", "round")},
        {"early_stopping_patience": 3, "val_dataset": None},
    ],
    ids=shown,
)
def test_valid_arguments_are_accepted(tmp_path, right):
    made = engine(tmp_path / "run", **right)
    taken = {**dict(made.config.base), **dict(made.config.training), **dict(made.config.output)}
    taken |= {"objective": made.config.objective.name, "loss": made._run.loss}
    for name in right.keys() - {"dataset", "val_dataset"}:
        assert str(taken[name]) == str(right[name]), name


def test_problems_of_all_kinds_come_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        engine(
            tmp_path / "run", seed=-1, best_metric="x", allow_changes=["y"], batch_size=1, query_prompt=1,
            teacher="./no-teacher", objective="cosent", model_id="./no-model", device="z",
        )  # fmt: skip
    text = "\n".join(caught.value.problems)
    for said in ("seed=-1", "best_metric='x'", "'y'", "query_prompt=1", "./no-teacher", "./no-model", "device='z'"):
        assert said in text
    assert "batch_size=1" in text
    assert "a teacher with objective 'cosent'" in text


def test_the_metric_names_are_those_that_evaluations_report():
    assert tuple(query_metrics(["p"], {"p"})) == NAMES
    similarities = np.array([0.1, 0.9, 0.5])
    assert tuple(pair_metrics(similarities, np.array([0.0, 1.0, 1.0]))) == (*BINARY_PAIR_METRICS, *PAIR_METRICS)
    assert tuple(pair_metrics(similarities, np.array([0.0, 0.3, 1.0]))) == PAIR_METRICS


def test_a_missing_teacher_is_reported_at_once(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no-such-teacher"):
        engine(tmp_path / "run", teacher="./no-such-teacher")


def test_a_file_in_the_place_of_the_run_directory_is_found_at_once(tmp_path):
    (tmp_path / "run.run").write_text("mine")
    with pytest.raises(OutputDirectoryError, match="which is a file"):
        engine(tmp_path / "run")


def test_settings_without_effect_are_named_where_nothing_can_be_held_out(tmp_path):
    one_document = make_dataset(passages=2)
    with pytest.warns(UserWarning, match=r"Nothing is held out.*Without effect: early_stopping_patience\.$"):
        engine(tmp_path / "run", dataset=one_document, val_dataset=None, early_stopping_patience=2)
    with pytest.warns(UserWarning, match="Nothing is held out") as caught:
        engine(tmp_path / "run", dataset=one_document, val_dataset=None)
    assert "Without effect" not in str(caught[0].message)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_a_missing_device_is_reported_before_the_model_is_looked_for_and_without_torch_until_then(tmp_path):
    with pytest.raises(ConfigError, match="machine without one"):
        engine(tmp_path / "run", quantized=True)
    data = {"queries": {"q": "a"}, "corpus": {"p": "c", "s": "d"}, "relevant_docs": {"q": ["p"]}}
    code = f"""
import sys
sys.modules["llama_index.finetuning"] = None  # it imports torch by itself
from llama_index_lora_embed import LoraFinetuneEngine
from llama_index_lora_embed.core.errors import ConfigError
settings = dict(quantized=True), dict(device="cuda:1")
run = {str(tmp_path / "run")!r}
engines = [LoraFinetuneEngine({data!r}, "no/such-model", run, val_fraction=0, **each) for each in settings]
assert "torch" not in sys.modules
for engine in engines:
    try:
        engine.finetune()
    except ConfigError as error:
        print(repr(str(error)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    errors = done.stdout.splitlines()
    assert len(errors) == 2, done.stderr
    for error, named in zip(errors, ("quantized=True", "cuda:1"), strict=True):
        assert "got a device that does not exist" in error
        assert named in error
    assert not list(tmp_path.iterdir())


def test_relative_paths_are_resolved_when_the_engine_is_made(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    save_cross_encoder("teacher", tiny_model)
    made = engine("run", model_id="model", cache_folder="cache", teacher="teacher")
    assert made.config.base.model_id == str(tmp_path / "model")
    assert made.config.teacher == str(tmp_path / "teacher")
    assert made.config.base.cache_folder == str(tmp_path / "cache")
    assert engine("run", model_id="an/id").config.base.model_id == "an/id"


def test_another_working_directory_finds_the_same_base(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(tiny_model).parent)
    made = engine(tmp_path / "run", model_id=Path(tiny_model).name, epochs=1, device="cpu", show_progress_bar=False)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.finetune()
    assert os.path.exists(tmp_path / "run" / "finetune.json")


def test_hugging_face_datasets_are_training_and_validation_data(tmp_path):
    triplets = {name: [f"{name} {i}" for i in range(40)] for name in ("anchor", "positive", "negative")}
    train = datasets.Dataset.from_dict(triplets)
    val = datasets.Dataset.from_dict({"query": ["q"], "passage": ["p"]}).to_iterable_dataset()
    made = engine(tmp_path / "run", dataset=train, val_dataset=val)
    assert len(made.dataset.queries) == 40
    assert list(made.val_dataset.queries.values()) == ["q"]
    adapter = EmbeddingAdapterFinetuneEngine(train, WordCountEmbedding(), model_output_path=str(tmp_path / "adapter"))
    assert len(adapter.corpus_dataset.queries) == 40
    pairs = datasets.Dataset.from_dict({"sentence1": PAIRS.texts1, "sentence2": PAIRS.texts2, "score": PAIRS.scores})
    assert engine(tmp_path / "pairs", dataset=pairs, val_dataset=VAL_PAIRS, best_metric="roc_auc").dataset == PAIRS
    with pytest.raises(DatasetError, match="splits 'train'"):
        engine(tmp_path / "run", dataset=datasets.DatasetDict(train=train))
