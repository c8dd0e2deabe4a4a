import pytest
import torch

from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.samplers import ExampleBatchSampler, ExampleTraits, GroupBatchSampler
from tests.conftest import make_dataset


@pytest.mark.parametrize(("count", "size"), [(1, 8), (7, 8), (8, 8), (9, 8), (33, 8), (100, 32), (5, 2)])
def test_an_epoch_holds_every_group_once_and_no_batch_of_one(count, size):
    sampler = GroupBatchSampler(range(count), batch_size=size, drop_last=False, seed=3)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == len(sampler)
    assert all(len(batch) <= max(size, 3) for batch in batches)
    assert count == 1 or all(len(batch) > 1 for batch in batches)


def test_the_order_of_groups_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = GroupBatchSampler(range(50), batch_size=8, drop_last=False, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_no_batch_has_fewer_groups_than_there_are_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    batches = list(GroupBatchSampler(range(17), batch_size=4, drop_last=False))
    assert sorted(len(batch) for batch in batches) == [4, 4, 4, 5]
    (batch,) = GroupBatchSampler(range(3), batch_size=4, drop_last=False)
    assert sorted(batch) == [0, 1, 2], "the collator refuses it"


def examples_of(dataset):
    return [(q, [ids[0], *(dataset.hard_negatives or {}).get(q, ())]) for q, ids in dataset.relevant_docs.items()]


def example_sampler(dataset, size, window=2, seed=3, near_duplicates=None, **kwargs):
    examples = examples_of(dataset)
    traits = ExampleTraits.of(examples, FalseNegatives(dataset, window, near_duplicates))
    return ExampleBatchSampler(range(len(examples)), size, False, seed=seed, traits=traits, **kwargs)


def clashes(dataset, batches, window, near_duplicates=None):
    """Pairs of examples in one batch where a passage of one is a false negative of the other's query."""
    examples, false_negatives = examples_of(dataset), FalseNegatives(dataset, window, near_duplicates)
    return [
        (examples[i], examples[j])
        for batch in batches
        for i in batch
        for j in batch
        if i != j and any(false_negatives.excludes(examples[i][0], p) for p in examples[j][1])
    ]


@pytest.mark.parametrize("window", [0, 2, None])
def test_no_example_shares_a_batch_with_a_false_negative_and_none_is_left_out(window):
    dataset = make_dataset(passages=60, questions=3)
    documents = dict.fromkeys(dataset.corpus, "one") if window == 2 else {i: f"d{i[:2]}" for i in dataset.corpus}
    dataset.source_documents = documents
    dataset.queries["q7-0"] = dataset.queries["q40-1"]  # one wording, two answers
    dataset.hard_negatives = {f"q{n}-0": [f"p{(n + 20) % 60}"] for n in range(0, 60, 7)}
    alike = {"p5": "p5", "p50": "p5"}
    plain = ExampleBatchSampler(range(180), 16, False, seed=3)
    assert clashes(dataset, plain, window, alike), "the data would not test anything"
    sampler = example_sampler(dataset, 16, window, near_duplicates=alike)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(180))
        assert len(batches) == len(sampler)
        assert all(0 < len(batch) <= 16 for batch in batches)
        assert clashes(dataset, batches, window, alike) == []


def test_examples_that_do_not_clash_fill_their_batches():
    sampler = example_sampler(make_dataset(passages=100, questions=1, sources=False), 16)
    assert [len(batch) for batch in sampler] == [16] * 6 + [4]


def test_a_hard_negative_that_is_a_sibling_of_the_positive_stays_in_its_example():
    dataset = make_dataset(passages=20, questions=1)
    dataset.hard_negatives = {f"q{n}-0": [f"p{n ^ 1}"] for n in range(20)}  # the other passage of the document
    batches = list(example_sampler(dataset, 5))
    assert sorted(i for batch in batches for i in batch) == list(range(20))
    assert clashes(dataset, batches, 2) == []


def test_examples_of_the_same_passage_end_in_batches_of_one():
    dataset = make_dataset(passages=2, questions=30)
    sampler = example_sampler(dataset, 8)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 60
    assert sorted(i for batch in batches for i in batch) == list(range(60))


def test_the_order_of_examples_depends_on_seed_and_epoch_alone():
    dataset = make_dataset(passages=40)

    def order(seed, epoch):
        sampler = example_sampler(dataset, 8, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_processes_get_different_examples_and_equally_many_batches():
    dataset = make_dataset(passages=45, questions=1, sources=False)
    shares = [example_sampler(dataset, 8, rank=rank, world=4) for rank in range(4)]
    assert [len(list(share)) for share in shares] == [len(share) for share in shares] == [2] * 4
    assert {i for share in shares for batch in share for i in batch} == set(range(45))
