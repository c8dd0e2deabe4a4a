import random

from hypothesis import given
from hypothesis import strategies as st

from llama_index_lora_embed.data.readers.sampling import HashSample


def sample(items, count):
    drawn = HashSample(count)
    for key, item in items:
        drawn.add(key, item)
    return [item for _, item in drawn]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 4))), st.integers(0, 10), st.randoms())
def test_a_sample_is_the_same_in_any_order_and_has_all_items_of_its_keys(items, count, rng):
    drawn = sample([(key, (key, item)) for key, item in items], count)
    shuffled = rng.sample(items, len(items))
    assert sample([(key, (key, item)) for key, item in shuffled], count) == drawn
    keys = {key for key, _ in drawn}
    assert len(keys) == min(count, len({key for key, _ in items}))
    assert sorted(drawn) == sorted({item for item in items if item[0] in keys})


def test_a_larger_sample_has_the_smaller_one_in_it_and_an_item_keeps_its_first_place():
    items = [(str(i), i) for i in range(1000)]
    assert set(sample(items, 10)) < set(sample(random.Random(0).sample(items, 1000), 50))
    drawn = HashSample(1)
    assert not drawn.add("a", "x", "row 1")
    assert drawn.add("a", "x", "row 2")
    assert list(drawn) == [("row 1", "x")]
