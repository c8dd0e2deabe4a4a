"""What only a GPU can show: `pytest tests/test_gpu.py` on a machine with CUDA; skipped elsewhere.

The 4-bit test needs the extra `quantized` as well, and the one over NCCL two GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from llama_index_lora_embed import LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.core.errors import DeviceMemoryError
from tests.architectures import ARCHITECTURES, qwen3
from tests.conftest import make_dataset, make_engine
from tests.helpers.cuda_emulation import noted
from tests.helpers.training import apart, signal_in, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
ROOT = Path(__file__).parent.parent
VAL = make_dataset(passages=10, seed=7, prefix="v")


def engine(model, path, data=None, **kwargs):
    return make_engine(model, path, data, **{"device": None, **kwargs})


@pytest.fixture
def little_memory():
    """A share of the GPU's memory that holds the model and a few texts, but no full batch."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2.5e9 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def long_texts():
    """Passages of about 500 tokens for MiniLM, so that a step of 32 takes gigabytes."""
    data = make_dataset(passages=64)
    data.corpus = {i: " ".join([text] * 40) for i, text in data.corpus.items()}
    return data


def test_what_is_trained_in_bf16_on_a_gpu_embeds_the_same_on_the_processor(tiny_model, tmp_path):
    result = engine(tiny_model, tmp_path / "run", device="cuda:0").finetune()
    assert result.precision == "bf16"
    assert result.best_step > 0
    texts = list(make_dataset().corpus.values())
    on_gpu, on_cpu = (
        np.array(LoraEmbedding(tmp_path / "run", device=device).get_text_embedding_batch(texts))
        for device in ("cuda", "cpu")
    )
    assert np.abs(on_gpu - on_cpu).max() < 1e-4
    served = evaluate_retrieval(LoraEmbedding(tmp_path / "run", device="cuda"), VAL)
    assert served.metrics["ndcg@10"] == pytest.approx(result.tuned_metrics["ndcg@10"], abs=1e-3)


def test_a_stopped_run_resumes_on_a_gpu(tiny_model, tmp_path, monkeypatch):
    import signal

    from llama_index_lora_embed.training.trainer import LoraTrainer

    signal_in(monkeypatch, LoraTrainer, "training_step", signal.SIGINT, 7)
    with pytest.raises(KeyboardInterrupt):
        engine(tiny_model, tmp_path / "run").finetune()
    monkeypatch.undo()
    resumed = engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune()
    calm = engine(tiny_model, tmp_path / "calm").finetune()
    assert [entry["step"] for entry in resumed.history] == [entry["step"] for entry in calm.history]
    assert resumed.tuned_metrics["ndcg@10"] == pytest.approx(calm.tuned_metrics["ndcg@10"], abs=0.02)


def test_too_little_memory_is_explained_and_gradcache_fits(minilm, tmp_path, little_memory):
    settings = {"data": long_texts(), "batch_size": 64, "epochs": 1, "precision": "fp32", "max_seq_length": 512}
    with pytest.raises(DeviceMemoryError, match=r"batch_size=64.*mini_batch_size=8.*batch_size='auto'"):
        engine(minilm, tmp_path / "a", **settings).finetune()
    torch.cuda.empty_cache()
    engine(minilm, tmp_path / "b", **settings, objective=ObjectiveSettings(mini_batch_size=4)).finetune()


def test_batch_size_auto_finds_what_fits(minilm, tmp_path, little_memory, caplog):
    settings = {"data": long_texts(), "batch_size": "auto", "epochs": 1, "precision": "fp32", "max_seq_length": 512}
    with caplog.at_level("INFO", "llama_index_lora_embed"):
        engine(minilm, tmp_path / "run", **settings).finetune()
    assert "batch_size='auto' uses StepSize(batch_size=32" in caplog.text


@pytest.fixture
def recordings(monkeypatch):
    """The CUDA graphs that are recorded."""
    return noted(monkeypatch)


def trained(model, path, **kwargs):
    """Weights after the last step."""
    arguments = {
        name: kwargs.pop(name) for name in ("gradient_accumulation_steps", "gradient_checkpointing") if name in kwargs
    }
    made = engine(model, path, precision="fp32", val_fraction=0, val_dataset=None, learning_rate=1e-3, **kwargs)
    made.finetune(logging_steps=1, **arguments)
    return weights(path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorded_passes_train_like_others(name, tmp_path, recordings):
    model = ARCHITECTURES[name].make(tmp_path / "base")
    kwargs = {"trust_remote_code": True, "epochs": 6}
    graphs = trained(model, tmp_path / "graphs", **kwargs)
    recorded = len(recordings)
    plain = trained(model, tmp_path / "plain", cuda_graphs=False, fused_decoder=False, **kwargs)
    assert len(recordings) == recorded
    assert apart(graphs, plain) < 0.02
    assert name not in {"bert", "roberta", "qwen3", "qwen3-right", "llama", "mistral"} or recorded > 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gradient_accumulation_steps": 2},
        {"objective": ObjectiveSettings(mini_batch_size=3)},
        {"lora_layers": 0.5},
        {"batch_size": 7},
        {"batch_size": 128, "data": make_dataset(passages=128)},  # two chunks of one shape
    ],
)
def test_recorded_passes_in_chunks_and_accumulated(kwargs, minilm, tmp_path, recordings):
    graphs = trained(minilm, tmp_path / "graphs", **kwargs)
    assert recordings
    assert apart(graphs, trained(minilm, tmp_path / "plain", cuda_graphs=False, **kwargs)) < 0.02


def test_a_decoder_computes_its_layers_again(tmp_path, recordings):
    model = qwen3(tmp_path / "base")
    found = trained(model, tmp_path / "a", gradient_checkpointing=True)
    assert not recordings
    assert apart(found, trained(model, tmp_path / "b", cuda_graphs=False, fused_decoder=False)) < 0.02


def test_after_a_broken_recording_everything_goes_on(tiny_model, tmp_path, monkeypatch, caplog):
    from transformers.models.bert.modeling_bert import BertLayer

    own = BertLayer.forward

    def reading(self, hidden_states, *args, **kwargs):
        if torch.cuda.is_current_stream_capturing():  # not before, so that the recording has begun
            hidden_states.sum().item()
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(BertLayer, "forward", reading)
    stream = torch.cuda.current_stream()
    with caplog.at_level("INFO", "llama_index_lora_embed"):
        broken = trained(tiny_model, tmp_path / "a")
    assert "no CUDA graphs from here on" in caplog.text
    assert torch.cuda.current_stream() == stream
    monkeypatch.undo()
    held = torch.cuda.memory_reserved()
    torch.empty(1 << 28, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held + (1 << 21)
    assert apart(broken, trained(tiny_model, tmp_path / "b")) < 0.02


def test_what_differs_in_each_pass_is_not_recorded(tiny_model, tmp_path, recordings):
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["query"])
    engine(tiny_model, tmp_path / "a", lora_config=config).finetune()
    engine(tiny_model, tmp_path / "b", base_dropout=True).finetune()
    assert not recordings
    result = engine(tiny_model, tmp_path / "c").finetune()
    assert recordings
    assert result.best_step > 0


def test_a_base_in_4_bits_is_trained_and_served_in_full_precision(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = qwen3(tmp_path / "qwen3")
    result = engine(model, tmp_path / "run", quantized=True).finetune()
    served = evaluate_retrieval(LoraEmbedding(tmp_path / "run", device="cuda"), VAL)
    assert served.metrics["ndcg@10"] == pytest.approx(result.tuned_metrics["ndcg@10"], abs=1e-3)
    base = evaluate_retrieval(LoraEmbedding(base_model=str(model), device="cuda"), VAL)
    assert base.metrics["ndcg@10"] == pytest.approx(result.base_metrics["ndcg@10"], abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_gpus_train_together_over_nccl(tiny_model, tmp_path):
    orders = tmp_path / "orders.json"
    arguments = {"batch_size": 16, "device": None}
    orders.write_text(json.dumps({"model": tiny_model, "path": str(tmp_path / "run"), "arguments": arguments}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.helpers.distributed_training", str(orders)],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    said = [json.loads((tmp_path / f"run.said-{rank}").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
