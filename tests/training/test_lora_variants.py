"""Every kind of LoRA in peft's LoraConfig is trained, saved, loaded and merged with equal results, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.evaluation.retrieval import evaluate_retrieval
from llama_index_lora_embed.models.base_model import describe_base, load_base
from llama_index_lora_embed.models.lora_adapter import load_adapter
from llama_index_lora_embed.models.opened_adapter import open_adapter
from llama_index_lora_embed.training.lora import add_lora, train_further
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.architectures import ARCHITECTURES
from tests.conftest import WORDS, make_dataset, make_engine
from tests.helpers.datasets import asked_differently

VAL = asked_differently(make_dataset())
TEXTS = [" ".join(WORDS[start : start + count]) for start, count in ((0, 1), (7, 12), (30, 3), (50, 60))]
VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "ranks": {"rank_pattern": {"query": 2, "intermediate.dense": 8}, "alpha_pattern": {"query": 32}},
    "one layer": {"target_modules": ["query", "value"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["intermediate.dense", "attention.output.dense"]},
    "all linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*layer\.1\.attention\.self\.(query|key)"},
    "dropout": {"lora_dropout": 0.2},
    "its biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "whole modules": {"modules_to_save": ["embeddings.LayerNorm"]},
    "lora bias": {"lora_bias": True},
    "read back": {"inference_mode": True},
}  # fmt: skip


def config(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **kwargs})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = str(ARCHITECTURES[name].make(tmp_path_factory.mktemp(name)))
        return made[name]

    return folder


def engine(base, path, lora_config, **kwargs):
    settings = {
        "epochs": 3,
        "learning_rate": 1e-2,
        "precision": "fp32",  # evaluations too, so that they can be compared digit by digit
        "val_dataset": VAL,
        **kwargs,
    }
    return make_engine(base, path, lora_config=lora_config, **settings)


def load(base):
    return load_base(describe_base(base), device="cpu")


def check_written(base, path, result):
    """On the original base, the directory gives the embeddings that were evaluated during training."""
    plain = SentenceTransformer(str(path), device="cpu").encode_document(TEXTS)
    for merge in (True, False):
        embed_model = LoraEmbedding(path, base_model=base, device="cpu", merge=merge)
        assert np.abs(np.array(embed_model.get_text_embedding_batch(TEXTS)) - plain).max() < 1e-5
        if result is not None:
            assert evaluate_retrieval(embed_model, VAL).metrics == pytest.approx(result.tuned_metrics, abs=1e-9)
    assert not any(
        "lora" in name for name, _ in LoraEmbedding(path, device="cpu").backend.own_model().named_parameters()
    )


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    """Directory and result of a run on the BERT, by the variant's name; trained once."""
    made = {}

    def run(name):
        if name not in made:
            path = tmp_path_factory.mktemp("variant") / "run"
            made[name] = path, engine(bases("bert"), path, config(**VARIANTS[name])).finetune()
        return made[name]

    return run


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_written_as_it_was_evaluated(bases, trained, name):
    base = bases("bert")
    before = describe_base(base).weights_sha256
    path, result = trained(name)
    assert result.best_step > 0, "it must have learnt something"
    check_written(base, path, result)
    assert describe_base(base).weights_sha256 == before
    untrained = LoraEmbedding(base_model=base, device="cpu")
    tuned = LoraEmbedding(path, device="cpu")
    difference = np.array(untrained.get_text_embedding_batch(TEXTS)) - tuned.get_text_embedding_batch(TEXTS)
    assert np.abs(difference).max() > 1e-3
    assert result.base_metrics == pytest.approx(evaluate_retrieval(untrained, VAL).metrics, abs=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_step_0_of_a_variant_is_the_base(bases, name):
    model, base = load(bases("bert")), load(bases("bert"))
    add_lora(model, config(**VARIANTS[name]), TrainingSettings())
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert np.abs(model.encode(TEXTS) - base.encode(TEXTS)).max() < 1e-6
    model.disable_adapters()
    assert np.array_equal(model.encode(TEXTS), base.encode(TEXTS)), "the base's own weights are as they were"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "rslora", "lora bias", "whole modules"])
@pytest.mark.parametrize("architecture", ["modernbert", "qwen3", "gemma3"])
@pytest.mark.filterwarnings("ignore")  # not evaluated; and what peft says of biases
def test_variants_on_fused_projections_and_decoders(bases, tmp_path, architecture, name):
    base = bases(architecture)
    kwargs = dict(VARIANTS[name])
    if name == "whole modules":
        kwargs["modules_to_save"] = ["final_norm" if architecture == "modernbert" else "norm"]
    engine(base, tmp_path / "run", config(**kwargs), val_dataset=None, val_fraction=0).finetune()
    check_written(base, tmp_path / "run", None)


class PullThePlug(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", [pytest.param("all biases", marks=pytest.mark.extended), "dora", "whole modules"])
def test_a_stopped_run_of_a_variant_ends_like_an_uninterrupted_one(bases, tmp_path, monkeypatch, name):
    lora_config = config(**VARIANTS[name])
    saving = {"save_checkpoints": True, "checkpoint_save_steps": 3}
    whole = engine(bases("bert"), tmp_path / "whole", lora_config, **saving).finetune()
    init = LoraTrainer.__init__

    def with_plug(self, **kwargs):
        init(self, **kwargs)
        self.add_callback(PullThePlug())

    monkeypatch.setattr(LoraTrainer, "__init__", with_plug)
    with pytest.raises(KeyboardInterrupt):
        engine(bases("bert"), tmp_path / "again", lora_config, **saving).finetune()
    monkeypatch.undo()
    again = engine(bases("bert"), tmp_path / "again", lora_config, resume_from_checkpoint=True, **saving).finetune()
    assert again.tuned_metrics == whole.tuned_metrics
    assert again.base_metrics == whole.base_metrics
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["dora", "its biases", "all biases", "whole modules", "lora bias"])
def test_what_was_trained_is_trained_further(bases, trained, name):
    path, _ = trained(name)
    fresh = load(bases("bert"))
    add_lora(fresh, config(**VARIANTS[name]), TrainingSettings())
    again, _ = load_adapter(open_adapter(str(path)), device="cpu", merge=False)
    train_further(again)
    trainable, expected = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (again, fresh))
    assert trainable == expected


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"init_lora_weights": False}, "step 0"),
        ({"init_lora_weights": "pissa"}, "use True, with use_rslora=True or use_dora=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "'gaussian' or 'orthogonal'"),
        ({"init_lora_weights": "olora"}, "'gaussian' or 'orthogonal'"),
        ({"init_lora_weights": "eva"}, "'gaussian' or 'orthogonal'"),
        ({"init_lora_weights": "corda"}, "'gaussian' or 'orthogonal'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'gaussian' or 'orthogonal'"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "another base"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"target_parameters": ["weight"]}, "merged"),
        ({"alora_invocation_tokens": [1]}, "merged"),
        ({"trainable_token_indices": [1]}, "modules_to_save"),
        ({"modules_to_save": ["nowhere"]}, "'nowhere'"),
        ({"target_modules": ["nowhere"]}, "attention.self.query"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even"),
        ({"lora_bias": True, "target_modules": ["word_embeddings"]}, "lora_bias"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_trained_is_refused_before_training(bases, tmp_path, kwargs, said):
    with pytest.raises(ConfigError) as caught:
        engine(bases("bert"), tmp_path / "run", config(**kwargs)).finetune()
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_methods_than_lora_are_refused(bases, tmp_path):
    other = AdaLoraConfig(target_modules=["query"], total_step=10)
    with pytest.raises(ConfigError, match="AdaLoraConfig"):
        engine(bases("bert"), tmp_path / "run", other).finetune()
