import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from llama_index_lora_embed.training.efficiency.gradcache import KeptActivations
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from tests.conftest import make_dataset
from tests.helpers.gradients import LOSS_FORMS, batch_of, distance, gradient, mined, model_with_lora


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("form", LOSS_FORMS)
def test_the_gradient_is_that_of_the_plain_loss(tiny_model, form, soft):
    model = model_with_lora(tiny_model)
    batch = batch_of(model, mined(), mini_batch_size=3, soft=soft)
    plain = MaskedInfoNCELoss(model, 0.05, **LOSS_FORMS[form])(*batch)
    cached = MaskedInfoNCELoss(model, 0.05, cached=True, **LOSS_FORMS[form])(*batch)
    assert cached.item() == plain.item()
    expected = gradient(model, plain)
    assert expected.norm() > 0.1
    assert distance(gradient(model, cached), expected) < 1e-6


def test_dropout_drops_the_same_in_both_passes(tiny_model):
    model = model_with_lora(tiny_model, dropout=0.3)
    batch = batch_of(model, mined(), mini_batch_size=3)
    results = []
    for cached in (False, True, True):
        torch.manual_seed(len(results) // 2)
        loss = MaskedInfoNCELoss(model, 0.05, cached=cached)(*batch)
        drawn = torch.rand(3)
        results.append((loss.item(), gradient(model, loss), drawn))
    plain, cached, other = results
    assert cached[0] == plain[0]
    assert distance(cached[1], plain[1]) < 1e-6
    assert cached[2].equal(plain[2]), "what is drawn after a step must not depend on the form"
    assert distance(other[1], plain[1]) > 1e-3, "dropout must matter for this to test anything"


def test_drawing_random_numbers_between_the_passes_changes_nothing(tiny_model):
    model = model_with_lora(tiny_model, dropout=0.3)
    batch = batch_of(model, mined(), mini_batch_size=3)

    def of(draws):
        torch.manual_seed(1)
        loss = MaskedInfoNCELoss(model, 0.05, cached=True)(*batch)
        torch.rand(draws)
        return gradient(model, loss), torch.rand(2)

    (first, after), (second, later) = of(0), of(17)
    assert first.equal(second)
    assert not after.equal(later)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("form", LOSS_FORMS)
def test_under_autocast_the_second_pass_computes_as_the_first(tiny_model, form, inside):
    model = model_with_lora(tiny_model)
    batch = batch_of(model, mined(), mini_batch_size=3)
    found = []
    for cached in (False, True):
        loss_of = MaskedInfoNCELoss(model, 0.05, cached=cached, **LOSS_FORMS[form])
        # a cached cast would add up the gradients of all chunks in bfloat16, which is less exact than GradCache
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            loss = loss_of(*batch)
            if inside:
                found.append((loss.item(), gradient(model, loss)))
        if not inside:
            found.append((loss.item(), gradient(model, loss)))
    exact = gradient(model, MaskedInfoNCELoss(model, 0.05, **LOSS_FORMS[form])(*batch))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    # inside of autocast the plain loss is differentiated in bfloat16, which GradCache is not
    assert distance(found[1][1], found[0][1]) < (0.02 if inside else 1e-5)
    assert distance(found[0][1], exact) > 1e-3, "autocast must matter for this to test anything"


def test_a_plain_loss_under_the_same_autocast_still_has_its_gradient(tiny_model):
    """Autocast keeps the weights that it casts; those of a pass without gradients must not be among them."""
    model = model_with_lora(tiny_model)
    batch = batch_of(model, mined(), mini_batch_size=3)
    plain, cached = MaskedInfoNCELoss(model, 0.05), MaskedInfoNCELoss(model, 0.05, cached=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached(*batch)
        after = plain(*batch)
    assert gradient(model, after).equal(gradient(model, expected))


def test_accumulated_gradients_are_those_of_the_plain_loss(tiny_model):
    model = model_with_lora(tiny_model)
    batches = [batch_of(model, make_dataset(passages=6, seed=seed), mini_batch_size=2) for seed in (1, 2)]

    def accumulated(cached):
        model.zero_grad()
        losses = [MaskedInfoNCELoss(model, 0.05, cached=cached)(*batch) / 2 for batch in batches]
        for loss in losses:  # both first passes before the first second one
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    assert distance(accumulated(True), accumulated(False)) < 1e-6


def saved_at_once(model, loss_of, batch):
    """The most bytes that autograd held at a time for the backward passes of one step."""
    held = {"now": 0, "most": 0}

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            held["now"] += tensor.nbytes
            held["most"] = max(held["most"], held["now"])

        def __del__(self):
            held["now"] -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        loss_of(*batch).backward()
    return held["most"]


def test_memory_grows_with_the_mini_batch_and_not_with_the_batch(tiny_model):
    model = model_with_lora(tiny_model)
    small, large = (batch_of(model, make_dataset(passages=n, questions=1), mini_batch_size=4) for n in (8, 64))
    plain, cached = MaskedInfoNCELoss(model, 0.05), MaskedInfoNCELoss(model, 0.05, cached=True)
    assert saved_at_once(model, plain, large) > 7 * saved_at_once(model, plain, small)
    assert saved_at_once(model, cached, large) < 1.5 * saved_at_once(model, cached, small)
    assert saved_at_once(model, cached, large) < saved_at_once(model, plain, large) / 15


def test_the_largest_chunk_is_encoded_once_and_all_others_twice(tiny_model):
    model = model_with_lora(tiny_model)
    features, label = batch_of(model, mined(), mini_batch_size=3)
    chunks = list(features)
    seen = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]["input_ids"].shape))
    MaskedInfoNCELoss(model, 0.05, cached=True)(chunks, label).backward()
    expected = 2 * [chunk["input_ids"].shape for chunk in chunks]
    expected.remove(max(expected, key=lambda shape: shape.numel()))
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize(("share", "twice"), [(0.0, "all but one"), (0.5, "some"), (1.01, "none")])
def test_as_many_chunks_are_encoded_once_as_the_bytes_allow(tiny_model, share, twice):
    model = model_with_lora(tiny_model)
    features, label = batch_of(model, mined(), mini_batch_size=6)
    chunks = list(features)
    loss = MaskedInfoNCELoss(model, 0.05, cached=True)
    loss.kept = KeptActivations(model, 0)
    expected = gradient(model, loss(chunks, label))  # the first step learns how much they take
    loss.kept.clear()
    tokens = sum(int(chunk["attention_mask"].sum()) for chunk in chunks)
    loss.kept.limit = int(share * tokens * loss.kept.per_token)
    passes = []
    model[0].register_forward_pre_hook(lambda module, inputs: passes.append(1))
    assert torch.equal(gradient(model, loss(chunks, label)), expected), "bit for bit, for exact resume"
    again = len(passes) - len(chunks)
    assert again in {"all but one": [len(chunks) - 1], "some": range(1, len(chunks) - 1), "none": [0]}[twice]
    loss.kept.limit = int(share * tokens * loss.kept.per_token)
    first, second = (loss(chunks, label) for _ in range(2))
    for one in (first, second):
        assert distance(gradient(model, one), expected) < 1e-6, "the other loss has used the memory meanwhile"


def test_a_step_leaves_nothing_in_memory_for_an_evaluation(tiny_model):
    model = model_with_lora(tiny_model)
    features, label = batch_of(model, mined(), mini_batch_size=6)
    loss = MaskedInfoNCELoss(model, 0.05, cached=True)
    loss.kept = KeptActivations(model, 1 << 30)
    for _ in range(2):  # the second keeps all chunks
        step = loss(list(features), label)
        assert loss.kept.activations.bytes
        step.backward()
        assert not loss.kept.activations.bytes
        assert not loss.kept.activations._memory._blocks


def test_without_gradients_it_is_the_plain_value(tiny_model):
    model = model_with_lora(tiny_model)
    batch = batch_of(model, mined(), mini_batch_size=3)
    with torch.no_grad():
        value = MaskedInfoNCELoss(model, 0.05, cached=True)(*batch)
    assert not value.requires_grad
    assert value.item() == MaskedInfoNCELoss(model, 0.05)(*batch).item()


PROCESS = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
    from tests.helpers.gradients import LOSS_FORMS, batch_of, gradient, mined, model_with_lora

    rank, port, folder, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for unused in (False, True):
        # each step twice: buckets are rebuilt after the first
        model = model_with_lora(folder)
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
        batch = batch_of(model, mined(), mini_batch_size=3, rank=rank, world=2)
        for form, arguments in LOSS_FORMS.items():
            for cached in (False, True):
                loss_of = MaskedInfoNCELoss(model, 0.05, cached=cached, **arguments)
                loss_of.model = wrapped
                for step in (1, 2):
                    loss = loss_of(*batch)
                    found[form, cached, unused, step] = (loss.item(), gradient(model, loss))
                # two batches accumulated: only the last backward pass may reduce
                model.zero_grad()
                with wrapped.no_sync():
                    (loss_of(*batch) / 2).backward()
                (loss_of(*batch) / 2).backward()
                total = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
                found[form, cached, unused, 3] = (loss.item(), total)
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(tiny_model, tmp_path):
    """Two times eight groups, in unequal numbers of chunks, under DDP, in all forms."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "process.py"
    script.write_text(textwrap.dedent(PROCESS))
    root = Path(__file__).parents[3]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(port), tiny_model, str(tmp_path)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    model = model_with_lora(tiny_model)
    batch = batch_of(model, mined(), mini_batch_size=3)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == len(LOSS_FORMS) * 2 * 2 * 3
        for (form, cached, _, _), (value, of_both) in found.items():
            loss = MaskedInfoNCELoss(model, 0.05, cached=cached, **LOSS_FORMS[form])(*batch)
            assert value == pytest.approx(loss.item(), rel=1e-6)
            assert distance(of_both, gradient(model, loss)) < 1e-6, (form, cached)
