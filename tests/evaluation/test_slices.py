from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.evaluation.slices import make_slices
from tests.conftest import make_dataset


def test_slices_hold_the_queries_that_their_names_say(tiny_model):
    dataset = make_dataset(passages=30)
    ids = list(dataset.queries)
    for number, query_id in enumerate(ids):
        dataset.queries[query_id] = " ".join(f"w{i:03d}" for i in range(number % 9 + 4)) + ("?" if number % 2 else "")
    dataset.query_origins = {i: ("title" if number < 10 else "human") for number, i in enumerate(ids)}
    dataset.corpus["p0"] = " ".join(["w1"] * 100)
    model = LoraEmbedding(base_model=tiny_model, device="cpu")  # reads 16 tokens
    found = {(by, name): members for by, name, members in make_slices(dataset, model, {"mine": ids[:3]})}
    by = {}
    for kind, name in found:
        by.setdefault(kind, []).append(name)
    assert [name.split()[0] for name in by["length"]] == ["up", "up", "more"]
    assert by["style"] == ["question", "keywords", "statement"]
    assert by["origin"] == ["human", "title"]
    assert by["source"][-1] == "5 others"
    assert by["truncation"] == ["complete passage", "truncated passage"]
    assert found["truncation", "truncated passage"] == ["q0-0", "q0-1"]
    assert found["custom", "mine"] == ids[:3]
    for kind in ("length", "style", "origin", "source", "truncation"):
        members = [i for name in by[kind] for i in found[kind, name]]
        assert sorted(members) == sorted(ids), f"{kind} has every query once"
    limits = [int(name.split()[-2]) for name in by["length"]]
    sizes = [[len(dataset.queries[i]) for i in found["length", name]] for name in by["length"]]
    assert max(sizes[0]) == limits[0] < min(sizes[1])
    assert max(sizes[1]) == limits[1] == limits[2] < min(sizes[2])
    criteria = {kind for kind, _, _ in make_slices(dataset, object())}
    assert "truncation" not in criteria, "only a LoraEmbedding tells what it truncates"
