"""Adapters of peft alone, whose files hold nothing but a LoRA: one directory, one vector, however it is loaded."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.deployment import merge_adapters
from llama_index_lora_embed.evaluation import tune_merge, tune_scale
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.architectures import bert_tokenizer, decoder_tokenizer, save
from tests.conftest import WORDS, make_dataset, make_engine
from tests.helpers.adapters import peft_adapter

TEXTS = [" ".join(WORDS[start : start + count]) for start, count in ((0, 3), (7, 12), (30, 60))]
PROMPTS = {"query": "query: ", "document": "passage: "}
LENGTH = 32  # of the base, where its tokenizer's files say 64


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that takes the first token, scales to length 1, has prompts and truncates."""
    folder = save(tmp_path_factory.mktemp("base"), "Bert", bert_tokenizer(length=64), pooling="cls", prompts=PROMPTS,
                  max_position_embeddings=64)  # fmt: skip
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = LENGTH
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The files of transformers alone, in a folder whose name says nothing."""
    folder = tmp_path_factory.mktemp("plain")
    return str(save(folder, "Bert", bert_tokenizer(length=64), pooling=None, max_position_embeddings=64))


@pytest.fixture(scope="module")
def bare(base, tmp_path_factory):
    return peft_adapter(base, tmp_path_factory.mktemp("adapters") / "bare")


def of_peft(base, adapter, texts, prompt="", length=64, *, first=True, scaled=True):
    """Vectors by peft and transformers alone: first token or mean, at length 1 or as they are."""
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), adapter).eval()
    given = [prompt + text for text in texts]
    batch = AutoTokenizer.from_pretrained(base)(
        given, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = tokens[:, 0] if first else (tokens * mask).sum(1) / mask.sum(1)
    return (torch.nn.functional.normalize(vectors, dim=1) if scaled else vectors).numpy()


def passages(embed_model):
    return np.array(embed_model.get_text_embedding_batch(TEXTS))


def distance(one, other):
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def ways(adapter, **settings):
    """The same adapter loaded merged, unmerged and among several, and after pickling and serialisation."""
    merged = LoraEmbedding(adapter, device="cpu", **settings)
    unmerged = LoraEmbedding(adapter, device="cpu", merge=False, **settings)
    pooled = LoraEmbedding(adapters={"it": adapter}, adapter="it", device="cpu", **settings)
    again = [LoraEmbedding.from_dict(merged.to_dict()), pickle.loads(pickle.dumps(pooled))]
    assert len({model.fingerprint for model in (merged, unmerged, pooled, *again)}) == 1
    return [merged, unmerged, pooled, *again]


def test_an_adapter_of_peft_alone_is_pooled_scaled_prompted_and_truncated_as_its_base(base, bare):
    expected = of_peft(base, bare, TEXTS, "passage: ", LENGTH)
    queries = of_peft(base, bare, TEXTS[:1], "query: ", LENGTH)
    for embed_model in ways(bare):
        assert embed_model.manifest is None
        assert embed_model.max_seq_length == LENGTH
        assert distance(passages(embed_model), expected) < 1e-5
        assert distance(embed_model.get_query_embedding(TEXTS[0]), queries[0]) < 1e-5
    assert distance(expected, passages(LoraEmbedding(base_model=base, device="cpu"))) > 1e-2, "the adapter must show"


def test_a_tokenizer_that_was_saved_with_the_adapter_changes_neither_length_nor_vectors(base, bare, tmp_path):
    copy = shutil.copytree(bare, tmp_path / "copy")
    AutoTokenizer.from_pretrained(base, model_max_length=64).save_pretrained(copy)
    assert json.loads((copy / "tokenizer_config.json").read_text())["model_max_length"] == 64
    expected = passages(LoraEmbedding(bare, device="cpu"))
    for embed_model in ways(copy):
        assert distance(passages(embed_model), expected) < 1e-5
    assert ways(copy)[0].fingerprint == LoraEmbedding(bare, device="cpu").fingerprint


def test_another_tokenizer_of_the_adapter_is_used_alone_and_refused_among_several(tmp_path):
    base = save(tmp_path / "base", "Llama", decoder_tokenizer("$A", side="right"), pooling="lasttoken",
                max_position_embeddings=64)  # fmt: skip
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    without = passages(LoraEmbedding(adapter, device="cpu"))
    decoder_tokenizer("$A <eos>", side="right").save_pretrained(adapter)
    alone = LoraEmbedding(adapter, device="cpu")
    assert distance(passages(alone), without) > 1e-2
    assert alone.sentence_transformer.preprocess(["w1"])["input_ids"].shape == (1, 2)
    with pytest.raises(ConfigError, match="another tokenizer"):
        LoraEmbedding(adapters={"it": adapter}, device="cpu")
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(AdapterError, match="Remove its files"):
        LoraEmbedding(adapter, device="cpu")


def test_weights_in_bfloat16_are_loaded_alike_in_every_way(base, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = peft_adapter(base, tmp_path / "half")
    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    expected = of_peft(base, adapter, TEXTS, "passage: ", LENGTH)
    for embed_model in ways(adapter):
        assert distance(passages(embed_model), expected) < 1e-5


def test_dora_of_peft_alone_loads_on_its_base(base, tmp_path):
    adapter = peft_adapter(base, tmp_path / "dora", use_dora=True)
    expected = of_peft(base, adapter, TEXTS, "passage: ", LENGTH)
    for merge in (True, False):
        assert distance(passages(LoraEmbedding(adapter, device="cpu", merge=merge)), expected) < 1e-5


def test_the_pooling_that_is_named_wins_over_the_bases(base, bare):
    expected = of_peft(base, bare, TEXTS, "passage: ", LENGTH, first=False)
    for embed_model in ways(bare, pooling="mean"):
        assert distance(passages(embed_model), expected) < 1e-5
    assert LoraEmbedding(bare, pooling="cls", device="cpu").fingerprint == LoraEmbedding(bare, device="cpu").fingerprint


@pytest.mark.slow
def test_windows_can_be_chosen_for_an_adapter_of_peft_alone(bare):
    whole, *others = ways(bare, window=16)
    assert distance(passages(whole), passages(LoraEmbedding(bare, device="cpu"))) > 1e-3
    for embed_model in others:
        assert distance(passages(embed_model), passages(whole)) < 1e-5


def test_a_pooling_that_nothing_names_is_asked_for(plain, tmp_path):
    adapter = peft_adapter(plain, tmp_path / "adapter")
    calls = [
        lambda: LoraEmbedding(adapter, device="cpu"),
        lambda: LoraEmbedding(adapter, merge=False, device="cpu"),
        lambda: LoraEmbedding(adapters={"it": adapter}, device="cpu"),
        lambda: LoraEmbedding(adapters={}, base_model=plain, device="cpu").add_adapter("it", adapter),
        lambda: merge_adapters([adapter], tmp_path / "merged"),
        lambda: make_engine(plain, tmp_path / "child", continue_from=str(adapter)).finetune(),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match='Pass pooling="mean"'):
            call()
    for pooling, first in (("cls", True), ("mean", False)):
        expected = of_peft(plain, adapter, TEXTS, first=first, scaled=False)
        for embed_model in ways(adapter, pooling=pooling):
            assert distance(passages(embed_model), expected) < 1e-5
    assert merge_adapters([adapter], tmp_path / "merged", pooling="mean")
    assert distance(passages(LoraEmbedding(tmp_path / "merged", device="cpu")), expected) < 1e-5
    assert tune_scale(adapter, make_dataset(passages=3), scales=[1.0], pooling="mean", device="cpu").best == 1


@pytest.mark.slow
def test_merges_of_adapters_of_peft_are_tuned_with_the_pooling_that_is_named(plain, tmp_path):
    adapters = [peft_adapter(plain, tmp_path / name) for name in "ab"]
    sweep = tune_merge(adapters, make_dataset(passages=3), weights=[[0.5, 0.5]], pooling="cls", device="cpu")
    assert len(sweep.evaluations) == 4


@pytest.mark.parametrize(("name", "pooling", "prompt"), [("bge-small-zh", "cls", ""), ("e5-base", "mean", "passage: ")])
def test_a_plain_checkpoint_of_a_known_family_is_pooled_as_the_family(plain, tmp_path, name, pooling, prompt):
    folder = shutil.copytree(plain, tmp_path / name)
    adapter = peft_adapter(folder, tmp_path / "adapter")
    expected = of_peft(folder, adapter, TEXTS, prompt, first=pooling == "cls")
    for embed_model in ways(adapter):
        assert distance(passages(embed_model), expected) < 1e-5
    for settings in ({}, {"pooling": "lasttoken"}):
        untuned = passages(LoraEmbedding(base_model=folder, device="cpu", **settings))
        assert distance(np.linalg.norm(untuned, axis=1), 1) < 1e-5


def test_the_default_pooling_of_a_base_alone_is_said(plain, caplog):
    LoraEmbedding(base_model=plain, device="cpu")
    assert "name no pooling" in caplog.text
    assert "'mean'" in caplog.text
    caplog.clear()
    LoraEmbedding(base_model=plain, pooling="cls", device="cpu")
    assert "pooling" not in caplog.text


def test_what_was_used_is_written_by_continuing_merging_and_saving(base, bare, tmp_path):
    expected = passages(LoraEmbedding(bare, device="cpu"))
    continued = tmp_path / "continued"
    make_engine(base, continued, continue_from=str(bare), epochs=1, learning_rate=1e-9).finetune()
    merge_adapters([bare], tmp_path / "merged")
    LoraEmbedding(bare, merge=False, device="cpu").sentence_transformer.save_pretrained(str(tmp_path / "saved"))
    for path in (continued, tmp_path / "merged", tmp_path / "saved"):
        modules = [module["type"].rpartition(".")[2] for module in json.loads((path / "modules.json").read_text())]
        assert modules == ["Transformer", "Pooling", "Normalize"]
        model = SentenceTransformer(str(path), device="cpu")
        assert {task: model.prompts[task] for task in PROMPTS} == PROMPTS
        assert distance(passages(LoraEmbedding(path, device="cpu")), expected) < 1e-5
    for path in (tmp_path / "merged", tmp_path / "saved"):
        assert distance(SentenceTransformer(str(path), device="cpu").encode_document(TEXTS), expected) < 1e-5
    assert Manifest.read(continued).pooling[0]["pooling_mode"] == "cls"


def test_the_pooling_that_was_named_is_written_by_continuing(plain, tmp_path):
    adapter = peft_adapter(plain, tmp_path / "adapter")
    child = tmp_path / "child"
    make_engine(plain, child, continue_from=str(adapter), pooling="cls", epochs=1, learning_rate=1e-9).finetune()
    expected = passages(LoraEmbedding(adapter, pooling="cls", device="cpu"))
    assert distance(passages(LoraEmbedding(child, device="cpu")), expected) < 1e-5
    with pytest.raises(ConfigError, match="trained with 'cls'"):
        LoraEmbedding(child, pooling="mean", device="cpu")


@pytest.mark.slow
def test_an_export_of_an_adapter_of_peft_alone_has_its_vectors(bare, tmp_path):
    embed_model = LoraEmbedding(bare, device="cpu")
    embed_model.export(tmp_path / "export", texts=[" ".join(WORDS[i : i + 8]) for i in range(60)], backend="onnx")
    assert distance(passages(LoraEmbedding(tmp_path / "export", device="cpu")), passages(embed_model)) < 1e-4


def test_damaged_modules_are_an_error_and_not_an_adapter_of_peft(base, tmp_path):
    adapter = peft_adapter(base, tmp_path / "adapter")
    (adapter / "modules.json").write_text("[")
    for settings in ({"adapter_path": adapter}, {"adapters": {"it": adapter}}):
        with pytest.raises(AdapterError):
            LoraEmbedding(device="cpu", **settings)
