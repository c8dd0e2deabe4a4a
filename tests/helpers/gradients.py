"""One training step of a tiny model, and the comparison of its loss and gradients."""

import pytest
import torch

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.models import base_model
from llama_index_lora_embed.training.lora import add_lora
from llama_index_lora_embed.training.objectives.collator import make_groups
from llama_index_lora_embed.training.objectives.plan import training_plan
from llama_index_lora_embed.training.train import set_length
from tests.conftest import make_dataset


def prepared(path, config=None, objective=None):
    """Model, loss and one batch, with an adapter whose weights are not zero."""
    model = base_model.load_base(base_model.describe_base(str(path)), device="cpu")
    dataset, settings = make_dataset(), TrainingSettings()
    set_length(model, dataset, settings, False)
    torch.manual_seed(0)
    add_lora(model, config, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    groups = make_groups(dataset, False)
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
