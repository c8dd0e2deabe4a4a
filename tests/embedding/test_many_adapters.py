"""Many adapters on one base model: each gives the vectors that it gives alone."""

import asyncio
import gc
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError, ModelNotFoundError
from llama_index_lora_embed.embedding import encode
from llama_index_lora_embed.embedding.adapter_pool import AdapterPool
from tests.conftest import WORDS, make_dataset
from tests.helpers.adapters import distance

TEXTS = [" ".join(WORDS[i : i + 1 + i % 20]) for i in range(60)]
KINDS = {
    "legal": {},
    "hr": {"lora_config": LoraConfig(r=4)},
    "prompted": {"query_prompt": "query : ", "passage_prompt": "passage : "},
    "short": {"max_seq_length": 8, "lora_config": LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])},
}


def trained(base, path, seed=0, **settings):
    settings = {"epochs": 2, "batch_size": 8, "val_fraction": 0.0, "learning_rate": 2e-2, "device": "cpu", **settings}
    engine = LoraFinetuneEngine(
        make_dataset(seed=seed), base, str(path), show_progress_bar=False, seed=seed, **settings
    )
    return engine.finetune().adapter_path


@pytest.fixture(scope="module")
def paths(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: trained(tiny_model, folder / name, seed, **kind) for seed, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def alone(paths, tiny_model):
    """For each adapter, and for the base model, an embedding model that shares nothing."""
    made = {name: LoraEmbedding(path, device="cpu") for name, path in paths.items()}
    return {**made, None: LoraEmbedding(base_model=tiny_model, device="cpu")}


@pytest.fixture
def many(paths):
    return LoraEmbedding(adapters=paths, device="cpu")


def own_vectors(alone, texts, names, kind="text"):
    embed = {"text": "get_text_embedding", "query": "get_query_embedding"}[kind]
    return [getattr(alone[name], embed)(text) for text, name in zip(texts, names, strict=True)]


def cycling(texts, names):
    return [names[i % len(names)] for i in range(len(texts))]


@pytest.mark.parametrize("kind", ["text", "query"])
def test_in_a_mixed_batch_each_text_has_the_vector_of_its_own_adapter(many, alone, kind):
    names = cycling(TEXTS, [None, *KINDS])
    mixed = many.get_mixed_embeddings(TEXTS, names, kind=kind)
    assert distance(mixed, own_vectors(alone, TEXTS, names, kind)) < 1e-5
    for one, other in zip([None, *KINDS], [*KINDS, None], strict=True):
        assert (
            distance(own_vectors(alone, TEXTS, [one] * 60, kind), own_vectors(alone, TEXTS, [other] * 60, kind)) > 1e-3
        )


def test_texts_that_fit_any_length_share_one_forward_pass(paths, alone, tiny_model, monkeypatch):
    same = {name: path for name, path in paths.items() if name != "prompted"}
    many = LoraEmbedding(adapters=same, device="cpu")
    many.get_mixed_embeddings(["w1"] * 4, [None, *same])  # the first call tries whether adapters can be mixed
    passes = []
    hook = many.backend.pool.model[0].register_forward_pre_hook(
        lambda module, inputs: passes.append(len(inputs[0]["input_ids"]))
    )
    # the texts have at most 8 tokens
    monkeypatch.setattr("llama_index_lora_embed.embedding.adapter_pool._MAX_SPECIAL_TOKENS", 2)
    texts = ["w1", "w2", "w3", "w4 w5"] * 4
    many.get_mixed_embeddings(texts, cycling(texts, [None, *same]))
    hook.remove()
    assert passes == [16]


@pytest.mark.parametrize("name", [None, *KINDS])
def test_with_adapter_is_that_adapter_and_has_its_fingerprint(many, alone, name):
    view = many.with_adapter(name)
    assert distance(view.get_text_embedding_batch(TEXTS), alone[name].get_text_embedding_batch(TEXTS)) < 1e-5
    assert distance(view.get_query_embedding("w1 ?"), alone[name].get_query_embedding("w1 ?")) < 1e-5
    assert view.fingerprint == alone[name].fingerprint
    assert view.max_seq_length == alone[name].max_seq_length
    assert (view.manifest is None) == (name is None)
    assert view.model_name == alone[name].model_name


def test_all_objects_share_one_base_model_which_is_freed_with_the_last(paths, tiny_model):
    before = len(AdapterPool._pools)
    one = LoraEmbedding(adapters={"legal": paths["legal"]}, device="cpu")
    other = LoraEmbedding(base_model=tiny_model, adapters={"a": paths["hr"]}, device="cpu")
    view = one.with_adapter("legal")
    assert one.backend.pool is other.backend.pool is view.backend.pool
    assert len(AdapterPool._pools) == before + 1
    del one, other, view
    gc.collect()
    assert len(AdapterPool._pools) == before


def test_more_adapters_than_fit_are_computed_in_rounds(paths, alone):
    gc.collect()  # the largest max_adapters of all users counts
    many = LoraEmbedding(adapters=paths, device="cpu", max_adapters=2, tokens_per_pass=40)
    names = cycling(TEXTS, ["short", None, *KINDS])
    assert distance(many.get_mixed_embeddings(TEXTS, names), own_vectors(alone, TEXTS, names)) < 1e-5
    assert len(many.backend.pool.loaded()) == 2
    kept = [name for name, module in many.backend.pool.model.named_modules() if name.endswith("lora_A.default")]
    assert kept == []


def test_the_least_recently_used_is_unloaded(paths):
    gc.collect()
    many = LoraEmbedding(adapters=paths, device="cpu", max_adapters=2)
    for name in ("legal", "hr", "legal", "short"):
        many.get_mixed_embeddings(["w1"], [name])
    assert many.backend.pool.loaded() == [many.backend.adapters["legal"].name, many.backend.adapters["short"].name]
    held = many.backend.pool.model.transformers_model.peft_config
    assert set(held) == set(many.backend.pool.loaded())


def test_memory_holds_the_base_model_once_and_the_adapters(paths, tiny_model):
    base = LoraEmbedding(base_model=tiny_model, device="cpu")
    many = LoraEmbedding(adapters=paths, device="cpu")
    many.get_mixed_embeddings(["w1"] * 4, list(KINDS))

    def size(model):
        return sum(parameter.nbytes for parameter in model.parameters())

    from safetensors.torch import load_file

    adapters = sum(t.nbytes for p in paths.values() for t in load_file(f"{p}/adapter_model.safetensors").values())
    assert size(many.backend.pool.model) == size(base.sentence_transformer) + adapters


def test_adapters_are_added_listed_and_removed(paths, alone, tiny_model):
    many = LoraEmbedding(base_model=tiny_model, adapters={}, device="cpu")
    assert many.list_adapters() == []
    many.add_adapter("legal", paths["legal"])
    many.add_adapter("hr", paths["hr"])
    assert many.list_adapters() == ["legal", "hr"]
    names = cycling(TEXTS, ["legal", "hr"])
    expected = own_vectors(alone, TEXTS, names)
    assert distance(many.get_mixed_embeddings(TEXTS, names), expected) < 1e-5
    many.remove_adapter("legal")
    assert many.list_adapters() == ["hr"]
    assert many.backend.pool.loaded() == [many.backend.adapters["hr"].name]
    with pytest.raises(ConfigError, match=r"'legal'.*one of 'hr'"):
        many.get_mixed_embeddings(["w1"], ["legal"])
    many.remove_adapter("hr")
    with pytest.raises(ConfigError, match="one of none"):
        many.with_adapter("hr")
    assert distance(many.get_text_embedding_batch(TEXTS), alone[None].get_text_embedding_batch(TEXTS)) < 1e-5
    many.add_adapter("legal", paths["legal"])  # after the last one was gone
    assert distance(many.get_mixed_embeddings(TEXTS, ["legal"] * 60), own_vectors(alone, TEXTS, ["legal"] * 60)) < 1e-5


def test_two_names_for_one_adapter_share_its_weights(paths):
    many = LoraEmbedding(adapters={"a": paths["legal"], "b": paths["legal"]}, device="cpu")
    one, other = many.get_mixed_embeddings(["w1 w2", "w1 w2"], ["a", "b"])
    assert distance(one, other) < 1e-6
    assert len(many.backend.pool.loaded()) == 1
    many.remove_adapter("a")
    assert len(many.backend.pool.loaded()) == 1, "b still uses it"


def test_an_adapter_that_was_removed_elsewhere_can_still_be_used(many, alone):
    view = many.with_adapter("legal")
    view.get_text_embedding("w1")
    many.remove_adapter("legal")
    assert distance(view.get_text_embedding("w1 w2"), alone["legal"].get_text_embedding("w1 w2")) < 1e-5


def test_threads_and_tasks_get_their_own_vectors_while_adapters_come_and_go(paths, alone):
    many = LoraEmbedding(adapters=paths, device="cpu", max_adapters=2)
    names = [*KINDS, None] * 6
    expected = {name: own_vectors(alone, TEXTS[:12], [name] * 12) for name in {*names}}
    views = {name: many.with_adapter(name) for name in {*names}}

    def work(job):
        number, name = job
        if number % 7 == 3:
            many.add_adapter(f"extra{number}", paths["legal"])
            many.remove_adapter(f"extra{number}")
        if number % 2:
            return name, many.get_mixed_embeddings(TEXTS[:12], [name] * 12)
        return name, views[name].get_text_embedding_batch(TEXTS[:12])

    with ThreadPoolExecutor(8) as pool:
        for name, vectors in pool.map(work, enumerate(names)):
            assert distance(vectors, expected[name]) < 1e-5

    async def together():
        return await asyncio.gather(
            *(many.aget_mixed_embeddings(TEXTS[:12], [name] * 12) for name in names),
            *(views[name].aget_text_embedding_batch(TEXTS[:12]) for name in names),
        )

    for name, vectors in zip(names * 2, asyncio.run(together()), strict=True):
        assert distance(vectors, expected[name]) < 1e-5


def _elsewhere(arguments):
    return LoraEmbedding(**arguments).get_text_embedding("w1 w2 w3")


def _here(embed_model):
    return embed_model.get_text_embedding("w1 w2 w3")


@pytest.mark.slow
def test_it_is_pickled_as_plain_values_and_works_in_another_process(many, alone, paths, tiny_model):
    view = many.with_adapter("hr")
    expected = alone["hr"].get_text_embedding("w1 w2 w3")
    copy = pickle.loads(pickle.dumps(view))
    assert copy._backend is None, "it is loaded at the first use"
    assert distance(copy.get_text_embedding("w1 w2 w3"), expected) < 1e-5
    assert copy.backend.pool is view.backend.pool
    again = LoraEmbedding.from_dict(view.to_dict())
    assert distance(again.get_text_embedding("w1 w2 w3"), expected) < 1e-5
    arguments = {"base_model": tiny_model, "adapters": paths, "adapter": "hr", "device": "cpu"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert distance(pool.submit(_elsewhere, arguments).result(), expected) < 1e-5
        assert distance(pool.submit(_here, view).result(), expected) < 1e-5


def test_an_index_is_built_with_one_of_them(many):
    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(TEXTS)]
    index = VectorStoreIndex(nodes, embed_model=many.with_adapter("legal"))
    found = index.as_retriever(similarity_top_k=1).retrieve(TEXTS[37])
    assert found[0].node.text == TEXTS[37]


def test_methods_of_sentence_transformers_for_adapters_work_on_an_unshared_model(many, paths, alone):
    """All seven: add, load, active, set, enable, disable, state dict."""
    model = LoraEmbedding(paths["legal"], merge=False, device="cpu").sentence_transformer
    (active,) = model.active_adapters()
    assert model.get_adapter_state_dict(active)
    model.load_adapter(paths["hr"], adapter_name="hr")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]), "new")
    for name, own in (("hr", "hr"), (active, "legal"), ("new", None)):
        model.set_adapter(name)
        assert distance(model.encode("w1 w2"), alone[own].get_text_embedding("w1 w2")) < 1e-5
    model.disable_adapters()
    assert distance(model.encode("w1 w2"), alone[None].get_text_embedding("w1 w2")) < 1e-5
    model.enable_adapters()
    with pytest.raises(ConfigError, match=r"share.*merge=False"):
        _ = many.with_adapter("legal").sentence_transformer


def test_fields_that_determine_the_vectors_are_frozen(many):
    view = many.with_adapter("legal")
    for name, value in (("adapter", "hr"), ("adapter_scale", 0.5)):
        with pytest.raises(ValueError, match="frozen"):
            setattr(view, name, value)


def test_an_adapter_of_sentence_transformers_is_compared_with_its_base(
    many, alone, tiny_model, other_tiny_model, tmp_path
):
    for base in (tiny_model, other_tiny_model):
        model = SentenceTransformer(base, device="cpu")
        model.add_adapter(LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
        model.save_pretrained(str(tmp_path / Path(base).parent.name))
    theirs = tmp_path / Path(tiny_model).parent.name
    many.add_adapter("theirs", theirs)
    own = LoraEmbedding(theirs, device="cpu")
    assert distance(many.get_mixed_embeddings(TEXTS, ["theirs"] * 60), own.get_text_embedding_batch(TEXTS)) < 1e-5
    assert many.with_adapter("theirs").fingerprint == own.fingerprint
    with pytest.raises(BaseModelMismatchError):
        many.add_adapter("others", tmp_path / Path(other_tiny_model).parent.name)


def test_an_initialisation_that_changes_the_base_model_is_refused(many, tiny_model, tmp_path):
    model = SentenceTransformer(tiny_model, device="cpu")
    model.add_adapter(LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "pissa"))
    config = tmp_path / "pissa" / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": false', '"init_lora_weights": "pissa"'))
    before = many.get_mixed_embeddings(TEXTS, [None] * 60)
    with pytest.raises(ConfigError, match="init_lora_weights='pissa'"):
        many.add_adapter("pissa", tmp_path / "pissa")
    assert many.get_mixed_embeddings(TEXTS, [None] * 60) == before


def test_loading_several_adapters_reports_no_missing_weights(paths, capfd):
    """transformers would report those of all other adapters."""
    gc.collect()
    many = LoraEmbedding(adapters=paths, device="cpu")
    many.get_mixed_embeddings(["w1"] * 4, list(paths))
    said = "".join(capfd.readouterr())
    assert "MISSING" not in said
    assert "newly initialized" not in said


def test_parallel_passes_use_their_own_adapters(many, alone):
    texts = [f"{text} {TEXTS[i % 5]}" for i, text in enumerate(TEXTS * (5000 // sum(map(len, TEXTS)) + 1))]
    names = cycling(texts, [None, *alone])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        mixed = many.get_mixed_embeddings(texts, names)
    finally:
        torch.set_num_threads(before)
    assert distance(mixed, own_vectors(alone, texts, names)) < 1e-5


def test_adapters_are_mixed_within_autocast(many, alone):
    names = cycling(TEXTS, [None, *alone])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = many.get_mixed_embeddings(TEXTS, names)
    assert many.backend.pool._can_mix
    assert distance(mixed, own_vectors(alone, TEXTS, names)) < 0.05


def test_adapters_are_not_mixed_if_layers_have_other_rows_than_texts(paths, alone, monkeypatch):
    """As in Longformer and XLNet, whose layers have tokens in the first dimension."""
    gc.collect()
    many = LoraEmbedding(adapters=paths, device="cpu")
    names = cycling(TEXTS, [None, "legal", "hr"])
    original, refused = encode._linear, []

    def tokens_first(base, products, x):
        if len(encode._PASS.runs) > 1:
            refused.append(sum(size for _, size in encode._PASS.runs))
            raise ConfigError("rows", "texts", "hint")
        return original(base, products, x)

    monkeypatch.setattr(encode, "_linear", tokens_first)
    assert distance(many.get_mixed_embeddings(TEXTS, names), own_vectors(alone, TEXTS, names)) < 1e-5
    assert refused == [3], "it is tried once"
    many.get_mixed_embeddings(TEXTS, names)
    assert refused == [3]


def test_adapters_of_embedding_layers_are_computed_even_if_disabled(tiny_model, tmp_path):
    path = trained(
        tiny_model, tmp_path / "words", lora_config=LoraConfig(r=4, target_modules=["query", "word_embeddings"])
    )
    many = LoraEmbedding(adapters={"words": path}, device="cpu")
    alone = LoraEmbedding(path, device="cpu")
    names = cycling(TEXTS, ["words", None])
    expected = own_vectors({"words": alone, None: LoraEmbedding(base_model=tiny_model, device="cpu")}, TEXTS, names)
    assert distance(many.get_mixed_embeddings(TEXTS, names), expected) < 1e-5
    many.backend.pool.model.disable_adapters()
    assert distance(many.get_mixed_embeddings(TEXTS, names), expected) < 1e-5


def test_views_keep_callbacks_and_share_no_cached_embedding(paths, alone):
    events = CallbackManager([])
    many = LoraEmbedding(adapters=paths, device="cpu", embeddings_cache=SimpleKVStore(), callback_manager=events)
    for _ in range(2):
        for name in ("legal", "hr", None):
            view = many.with_adapter(name)
            assert view.callback_manager is events
            assert distance(view.get_query_embedding("w1"), alone[name].get_query_embedding("w1")) < 1e-5
            assert distance(view.get_text_embedding("w1"), alone[name].get_text_embedding("w1")) < 1e-5


def test_an_adapter_that_was_retrained_in_place_is_refused(paths, tiny_model, tmp_path):
    gc.collect()
    path = tmp_path / "adapter"
    shutil.copytree(paths["legal"], path)
    many = LoraEmbedding(adapters={"legal": path, "hr": paths["hr"]}, device="cpu", max_adapters=1)
    view, saved = many.with_adapter("legal"), pickle.dumps(many.with_adapter("legal"))
    before = view.get_text_embedding("w1 w2")
    trained(tiny_model, path, seed=9)
    many.get_mixed_embeddings(["w1"], ["hr"])  # unloads it
    with pytest.raises(AdapterError, match="has changed since"):
        view.get_text_embedding("w1 w2")
    with pytest.raises(AdapterError, match="retrained since"):
        pickle.loads(saved).get_text_embedding("w1 w2")
    many.remove_adapter("legal")
    many.add_adapter("legal", path)
    after = many.with_adapter("legal")
    assert after.fingerprint != view.fingerprint
    assert distance(after.get_text_embedding("w1 w2"), before) > 1e-3


def test_an_adapter_that_does_not_load_does_not_affect_the_others(paths, alone, tmp_path):
    path = tmp_path / "adapter"
    shutil.copytree(paths["hr"], path)
    many = LoraEmbedding(adapters={"legal": paths["legal"], "broken": path}, device="cpu")
    shutil.rmtree(path)
    with pytest.raises(AdapterError, match="has changed since"):
        many.get_mixed_embeddings(["w1", "w2"], ["legal", "broken"])
    names = ["legal"] * 60
    assert distance(many.get_mixed_embeddings(TEXTS, names), own_vectors(alone, TEXTS, names)) < 1e-5


def test_an_adapter_for_another_base_is_refused(many, other_tiny_model, tmp_path):
    path = trained(other_tiny_model, tmp_path / "other")
    with pytest.raises(BaseModelMismatchError):
        many.add_adapter("other", path)
    assert "other" not in many.list_adapters()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(r=4, use_dora=True, target_modules=["query"]), "use_dora"),
        (LoraConfig(r=4, bias="lora_only", target_modules=["query"]), "bias"),
    ],
)
def test_an_adapter_that_cannot_share_a_pass_is_refused(many, tiny_model, tmp_path, config, named):
    path = trained(tiny_model, tmp_path / "other", lora_config=config)
    with pytest.raises(ConfigError, match=rf"{named}.*LoraEmbedding\('"):
        many.add_adapter("other", path)
    LoraEmbedding(path, device="cpu")


def test_an_adapter_with_another_pooling_is_refused(many, tiny_model, tmp_path):
    path = trained(tiny_model, tmp_path / "cls", pooling="cls")
    with pytest.raises(ConfigError, match="pooling="):
        many.add_adapter("cls", path)
    assert LoraEmbedding(adapters={"cls": path}, pooling="cls", device="cpu").list_adapters() == ["cls"]


def test_windows_are_mixed_too(tiny_model, tmp_path):
    paths = {str(n): trained(tiny_model, tmp_path / str(n), n, window=16, max_seq_length=60) for n in (1, 2)}
    texts = [" ".join(WORDS[i : i + 4 * i + 1]) for i in range(12)]
    names = cycling(texts, ["1", None, "2"])
    many = LoraEmbedding(adapters=paths, window=16, device="cpu")
    alone = {name: LoraEmbedding(path, device="cpu") for name, path in paths.items()}
    base = LoraEmbedding(base_model=tiny_model, window=16, device="cpu")
    assert distance(many.get_mixed_embeddings(texts, names), own_vectors({**alone, None: base}, texts, names)) < 1e-5


def test_wrong_arguments_are_named(many, paths, tiny_model, tmp_path):
    for adapters, named in (
        ("legal", "'legal' for 2 texts"),
        (["legal"], "1 names for 2 texts"),
        (None, "None for 2 texts"),
        (["legal", "nobody"], r"'nobody'.*'legal', 'hr', 'prompted', 'short'"),
    ):
        with pytest.raises(ConfigError, match=named):
            many.get_mixed_embeddings(["w1", "w2"], adapters)
    with pytest.raises(ConfigError, match="kind='passage'"):
        many.get_mixed_embeddings(["w1"], [None], kind="passage")
    with pytest.raises(ConfigError, match="second adapter named 'hr'"):
        many.add_adapter("hr", paths["hr"])
    with pytest.raises(ConfigError, match="names, each with"):
        many.add_adapter("", paths["hr"])
    with pytest.raises(ModelNotFoundError):
        many.add_adapter("new", tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        many.add_adapter("new", tiny_model)
    with pytest.raises(ConfigError, match="in use"):
        many.with_adapter("hr").remove_adapter("hr")
    with pytest.raises(ConfigError, match="together with adapters"):
        LoraEmbedding(paths["hr"], adapters=paths)
    with pytest.raises(ConfigError, match="an adapter named 'nobody'"):
        LoraEmbedding(adapters=paths, adapter="nobody", device="cpu")
    with pytest.raises(ConfigError, match="not a mapping"):
        LoraEmbedding(adapters=[paths["hr"]])
    with pytest.raises(ConfigError, match="one that was made with adapters"):
        LoraEmbedding(paths["hr"], device="cpu").with_adapter("hr")
    assert many.get_mixed_embeddings([], []) == []
