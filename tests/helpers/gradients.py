"""One training step of a tiny model, and the comparison of its loss and gradients."""

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.models import base_model
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.lora import add_lora
from llama_index_lora_embed.training.objectives.collator import GroupCollator
from llama_index_lora_embed.training.objectives.plan import training_plan
from llama_index_lora_embed.training.train import set_length
from tests.conftest import make_dataset


def prepared(path, config=None, objective=None):
    """Model, loss and one batch, with an adapter whose weights are not zero."""
    model = base_model.load_base(base_model.describe_base(str(path)), device="cpu")
    dataset, settings = make_dataset(), TrainingSettings()
    groups = make_groups(dataset, False)
    set_length(model, dataset, groups, settings)
    torch.manual_seed(0)
    add_lora(model, config, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    plan = training_plan(model, dataset, groups, None, settings, objective)
    batch = plan.inputs["data_collator"]([{"group": i} for i in range(12)])
    model.eval()
    return model, plan.inputs["loss"], batch


def chunks(batch):
    names = [name.removesuffix("input_ids") for name in batch if name.endswith("input_ids")]
    return [{key[len(name) :]: value for key, value in batch.items() if key.startswith(name)} for name in names]


def gradients(model, loss, batch):
    model.zero_grad()
    value = loss(chunks(batch), batch["label"])
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours[0] == pytest.approx(theirs[0], abs=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        assert float((ours[1][name] - gradient).abs().max()) <= tolerance * max(scale, 1e-3), name
    assert max(float(g.abs().max()) for g in theirs[1].values()) > 1e-3


def model_with_lora(folder, dropout=0.0):
    """The tiny model with a LoRA whose weights are not zero, as the trainer prepares it for a step."""
    model = SentenceTransformer(folder, device="cpu")
    model.prompts.update(query="", document="")
    torch.manual_seed(5)
    add_lora(model, LoraConfig(r=4, lora_dropout=dropout), TrainingSettings())
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout.train()
    return model


def batch_of(model, dataset, **kwargs):
    """(features, labels) of one batch with all groups of a dataset, as the trainer passes them to a loss."""
    groups = make_groups(dataset, use_all_docs=kwargs.pop("use_all_docs", False))
    batch = GroupCollator(model, dataset, groups, **kwargs)([{"group": i} for i in range(len(groups))])
    names = [key.removesuffix("_input_ids") for key in batch if key.endswith("_input_ids")]
    features = [{key[len(n) + 1 :]: v for key, v in batch.items() if key.startswith(f"{n}_")} for n in names]
    return features, batch["label"]


def gradient(model, loss):
    """The gradient of all trained weights as one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def distance(one, other):
    """Norm of the difference, relative to the second vector's norm."""
    return float((one - other).norm() / other.norm())


LOSS_FORMS = {
    "plain": {},
    "guide": {"guide_margin": 0.05},
    "matryoshka": {"dims": (8, 16)},
    "all": {"guide_margin": 0.05, "dims": (8,)},
}


def mined(passages=16):
    """A dataset with a hard negative for some queries."""
    dataset = make_dataset(passages=passages)
    dataset.hard_negatives = {f"q{n}-0": [f"p{(n + 5) % passages}"] for n in range(0, passages, 3)}
    return dataset.check()
