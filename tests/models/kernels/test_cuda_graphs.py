"""Training with CUDA graphs, which are emulated on the processor, and causal attention without a mask.

tests/test_gpu.py trains with them on a GPU.
"""

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers.models.bert.modeling_bert import BertLayer

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.models.kernels import cuda_graphs as module
from llama_index_lora_embed.models.kernels.attention import blocked_attention
from llama_index_lora_embed.models.kernels.causal import causal_attention, is_causal, moved_to_start
from llama_index_lora_embed.models.kernels.cuda_graphs import cuda_graphs
from tests.architectures import ARCHITECTURES
from tests.conftest import make_engine
from tests.helpers.cuda_emulation import emulated, noted
from tests.helpers.training import apart, weights

TEXTS = ["storm harbour", "storm harbour signal tower coast light", "coast"]


def load(name, tmp_path):
    return SentenceTransformer(str(ARCHITECTURES[name].make(tmp_path / "model")), device="cpu").eval()


def test_padding_comes_last_and_tokens_keep_their_order():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert moved_to_start(mask).tolist() == [[2, 3, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["qwen3", "qwen3-right", "mistral", "llama"])
def test_a_decoder_gives_the_same_states_without_a_mask(name, tmp_path):
    model = load(name, tmp_path)
    transformer = model.transformers_model
    inputs = {k: v for k, v in model.preprocess(TEXTS).items() if k in {"input_ids", "attention_mask"}}
    mask = inputs["attention_mask"].bool()
    assert not mask.all()
    expected = transformer(**inputs).last_hidden_state
    order = moved_to_start(inputs["attention_mask"])
    with blocked_attention(transformer), causal_attention(transformer.config):
        moved = transformer(input_ids=inputs["input_ids"].gather(1, order)).last_hidden_state
        as_padded = transformer(input_ids=inputs["input_ids"]).last_hidden_state
    found = moved.gather(1, order.argsort(1)[..., None].expand_as(moved))
    assert torch.allclose(found[mask], expected[mask], atol=1e-5)
    left = not mask[0, 0]
    assert torch.allclose(as_padded[mask], expected[mask], atol=1e-5) != left, "tokens after padding see it"
    assert transformer.config._attn_implementation == "sdpa"


def test_which_models_are_causal(tmp_path):
    qwen3, bert = load("qwen3", tmp_path / "a").transformers_model, load("bert", tmp_path / "b").transformers_model
    assert is_causal(qwen3, 512)
    assert not is_causal(bert, 512)
    qwen3.config.sliding_window, qwen3.config.use_sliding_window = 128, True
    assert is_causal(qwen3, 128)
    assert not is_causal(qwen3, 129)
    assert not is_causal(qwen3, None)
    qwen3.config.use_sliding_window = False
    assert is_causal(qwen3, 129)
    qwen3.config.is_causal = False
    assert not is_causal(qwen3, 8)
    del qwen3.config.is_causal
    qwen3.layers[0].self_attn.is_causal = False
    assert not is_causal(qwen3, 8)


def test_a_processor_has_no_graphs(tmp_path):
    model = load("bert", tmp_path)
    with cuda_graphs(model) as replaced:
        assert not replaced
        assert "forward" not in model.transformers_model.__dict__


@pytest.fixture
def recordings(monkeypatch):
    """The processor stands in for a GPU; the recordings that are made."""
    monkeypatch.setattr(module, "cuda", emulated())
    monkeypatch.setattr(module, "_DEVICE", "cpu")
    return noted(monkeypatch)


def trained(model, path, *, graphs=True, accumulation=1, **kwargs):
    """Weights after the last step. What is for processors alone is off, because it needs hooks."""
    settings = {
        "precision": "fp32", "val_fraction": 0, "val_dataset": None, "learning_rate": 1e-3, "epochs": 3,
        "lora_layers": 1.0, "frozen_cache_mb": 0, "fused_attention": False,
        "objective": ObjectiveSettings(mini_batch_size=None),
    }  # fmt: skip
    engine = make_engine(model, path, **{**settings, "cuda_graphs": graphs, **kwargs})
    engine.finetune(gradient_accumulation_steps=accumulation)
    return weights(path)


@pytest.mark.parametrize(
    "name",
    [n if n in {"bert", "qwen3", "mistral"} else pytest.param(n, marks=pytest.mark.extended) for n in ARCHITECTURES],
)
def test_recorded_passes_train_like_others(name, tmp_path, recordings):
    model = ARCHITECTURES[name].make(tmp_path / "base")
    graphs = trained(model, tmp_path / "graphs", trust_remote_code=True)
    made, replays = len(recordings), sum(graph.replays for r in recordings for graph in r.graphs)
    assert apart(graphs, trained(model, tmp_path / "plain", graphs=False, trust_remote_code=True)) < 1e-3
    assert len(recordings) == made, "without graphs nothing is recorded"
    if name == "mistral":  # padded on the left, and its attention reaches back less far than its texts are long
        assert made == 0
    else:
        assert made > 1
        assert replays > 10


@pytest.mark.parametrize("kwargs", [{"accumulation": 2}, {"lora_layers": 0.5}, {"batch_size": 7}])
@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_recorded_passes_with_other_settings(name, kwargs, tmp_path, recordings):
    model = ARCHITECTURES[name].make(tmp_path / "base")
    graphs = trained(model, tmp_path / "graphs", **kwargs)
    assert recordings
    assert apart(graphs, trained(model, tmp_path / "plain", graphs=False, **kwargs)) < 1e-3


def test_windows_are_recorded_too(tmp_path, recordings):
    model = ARCHITECTURES["bert"].make(tmp_path / "base")
    graphs = trained(model, tmp_path / "graphs", window=16)
    assert recordings
    assert apart(graphs, trained(model, tmp_path / "plain", graphs=False, window=16)) < 1e-3


def test_what_differs_in_each_pass_is_not_recorded(tmp_path, recordings):
    model = ARCHITECTURES["bert"].make(tmp_path / "base")
    trained(model, tmp_path / "a", lora_config=LoraConfig(r=4, lora_dropout=0.5, target_modules=["query"]))
    trained(model, tmp_path / "b", base_dropout=True)
    assert not recordings


def test_a_hook_sees_each_pass(tmp_path, recordings):
    model = load("bert", tmp_path).train(False)
    transformer, seen = model.transformers_model, []
    for parameter in transformer.parameters():
        parameter.requires_grad_(True)
    with cuda_graphs(model):
        for _ in range(3):
            model(model.preprocess(TEXTS))["sentence_embedding"].sum().backward()
        assert len(recordings) == 1
        handle = transformer.encoder.layer[1].register_forward_hook(lambda *args: seen.append(args))
        model(model.preprocess(TEXTS))
        handle.remove()
    assert len(seen) == 1


def test_gradients_add_up_and_outlive_the_next_pass(tmp_path, recordings):
    model = load("bert", tmp_path)
    weight = model.transformers_model.encoder.layer[1].output.dense.weight
    plain, summed = [], []

    def add_gradient(texts):
        embedding = model(model.preprocess(texts))["sentence_embedding"][0]
        (embedding @ torch.arange(1.0, len(embedding) + 1)).backward()

    for texts in (TEXTS, TEXTS[::-1], TEXTS):
        model.zero_grad()
        add_gradient(texts)
        plain.append(weight.grad.clone())
    with cuda_graphs(model):
        for _ in range(2):  # once as always, once recorded
            model.zero_grad()
            for texts in (TEXTS, TEXTS[::-1], TEXTS):
                add_gradient(texts)
            summed.append(weight.grad.clone())
    assert recordings
    for total in summed:
        assert torch.allclose(total, sum(plain), atol=1e-4)
    assert min(float(gradient.abs().max()) for gradient in plain) > 0.1


def test_two_passes_before_a_backward_pass_have_memory_of_their_own(tmp_path, recordings):
    model = load("bert", tmp_path)
    weight = model.transformers_model.encoder.layer[1].output.dense.weight

    def gradient():
        model.zero_grad()
        one, other = (model(model.preprocess(texts))["sentence_embedding"] for texts in (TEXTS, TEXTS[::-1]))
        (one[0] @ other[1]).backward()
        return weight.grad.clone()

    expected = gradient()
    with cuda_graphs(model):
        found = [gradient() for _ in range(3)]
    assert len(recordings) == 2
    assert all(torch.allclose(one, expected, atol=1e-6) for one in found)
    assert float(expected.abs().max()) > 1e-3


def test_what_cannot_be_recorded_is_computed_as_always(tmp_path, recordings, monkeypatch, caplog):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module._Recording, "__init__", full)
    model = ARCHITECTURES["bert"].make(tmp_path / "base")
    with caplog.at_level("INFO", module.__name__):
        found = trained(model, tmp_path / "a")
    assert [record.message for record in caplog.records] == ["no CUDA graphs from here on: CUDA out of memory"]
    assert apart(found, trained(model, tmp_path / "b", graphs=False)) < 1e-3


def test_a_pass_that_reads_a_number_is_not_recorded(tmp_path, recordings, monkeypatch, caplog):
    own = BertLayer.forward

    def reading(self, hidden_states, *args, **kwargs):
        assert float(hidden_states.sum()) < 1e9
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(BertLayer, "forward", reading)
    with caplog.at_level("INFO", module.__name__):
        trained(ARCHITECTURES["bert"].make(tmp_path / "base"), tmp_path / "a")
    assert not recordings
    assert len(caplog.records) == 1, "it is not tried again"
    assert "aten._local_scalar_dense.default cannot be recorded" in caplog.text


def test_other_parameters_are_recorded_anew(tmp_path, recordings):
    model = load("bert", tmp_path)
    layer = model.transformers_model.encoder.layer[1].output.dense

    def step():
        model.zero_grad()
        model(model.preprocess(TEXTS))["sentence_embedding"][0, :5].sum().backward()

    step()
    expected = layer.weight.grad.clone()
    with cuda_graphs(model):
        for _ in range(3):
            step()
        assert len(recordings) == 1
        layer.bias.requires_grad_(False)
        layer.weight.data = layer.weight.data.clone()  # elsewhere in memory
        step()
        assert len(recordings) == 2
        assert layer.bias.grad is None
        assert torch.allclose(layer.weight.grad, expected, atol=1e-6)
        model.requires_grad_(False)
        assert not model(model.preprocess(TEXTS))["sentence_embedding"].requires_grad
    assert float(expected.abs().max()) > 1e-3


def test_a_recorded_pass_is_differentiated_once(tmp_path, recordings):
    model = load("bert", tmp_path)
    with cuda_graphs(model):
        for _ in range(2):
            embeddings = model(model.preprocess(TEXTS))["sentence_embedding"]
            embeddings.sum().backward(retain_graph=True)
        assert len(recordings) == 1
        with pytest.raises(RuntimeError, match="differentiated once"):
            embeddings.sum().backward()


def test_a_pass_without_memory_takes_that_of_the_recordings(tmp_path, recordings, monkeypatch, caplog):
    model = load("bert", tmp_path)
    with cuda_graphs(model), caplog.at_level("INFO", module.__name__):
        for _ in range(2):
            model(model.preprocess(TEXTS))["sentence_embedding"].sum().backward()
        forward = model.transformers_model.forward
        own, calls = forward.original, []

        def full_at_first(*args, **kwargs):
            calls.append(None)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return own(*args, **kwargs)

        forward.original = full_at_first
        longer = [" ".join(TEXTS * 3)]
        assert model(model.preprocess(longer))["sentence_embedding"].requires_grad
        assert len(calls) == 2
        assert not forward.slots
    assert "too little memory" in caplog.text


def test_little_memory_is_left_to_other_passes(tmp_path, recordings, monkeypatch):
    taken = iter(range(0, 10**12, 10**9))
    monkeypatch.setattr(module.cuda, "memory_allocated", lambda: next(taken))  # 1 GB more at each call
    monkeypatch.setattr(module.cuda, "mem_get_info", lambda: (2 * 10**9, 10**10))
    trained(ARCHITECTURES["bert"].make(tmp_path / "base"), tmp_path / "a")
    assert not recordings
