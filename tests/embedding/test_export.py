"""Every backend is a new model until proven: exported, certified, loaded, compared, refused."""

import json
import logging
import pickle
import shutil

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode

from llama_index_lora_embed import LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.core.errors import (
    AdapterError,
    ConfigError,
    ExportError,
    OutputDirectoryError,
    WrongIndexError,
)
from llama_index_lora_embed.deployment import stamp_index, verify_index
from llama_index_lora_embed.embedding import export
from llama_index_lora_embed.embedding.backends import ExportedBackend
from tests.conftest import make_dataset, make_tiny_model

pytestmark = pytest.mark.slow
KINDS = [(backend, precision) for backend in ("onnx", "openvino") for precision in ("fp32", "int8")]


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(passages=40, seed=5)


@pytest.fixture(scope="module")
def texts(dataset):
    return list(dataset.corpus.values())


@pytest.fixture(scope="module")
def tuned(adapter):
    return LoraEmbedding(adapter, device="cpu")


@pytest.fixture(scope="module")
def exports(tuned, texts, dataset, tmp_path_factory):
    """Folder and certificate of each kind; int8 of a model of 32 dimensions and random weights is coarse."""
    folder, made = tmp_path_factory.mktemp("exports"), {}
    for backend, precision in KINDS:
        lower = {} if precision == "fp32" else {"min_cosine": 0.9, "min_agreement": 0.3}
        path = folder / f"{backend}-{precision}"
        queries = list(dataset.queries.values())
        made[backend, precision] = (
            path,
            tuned.export(path, texts=texts, queries=queries, backend=backend, precision=precision, **lower),
        )
    return made


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_an_export_gives_the_vectors_that_its_certificate_says(kind, exports, tuned, texts, dataset):
    path, certificate = exports[kind]
    exported = LoraEmbedding(path)
    ours, theirs = (np.array(model.get_text_embedding_batch(texts)) for model in (tuned, exported))
    cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert np.median(cosines) == pytest.approx(certificate.median_cosine, abs=1e-5)
    assert cosines.min() == pytest.approx(certificate.lowest_cosine, abs=1e-5)
    assert (certificate.texts, certificate.queries) == (40, 80)
    base, after = (evaluate_retrieval(model, dataset).metrics["ndcg@10"] for model in (tuned, exported))
    if kind[1] == "fp32":
        assert certificate.median_cosine > 0.99999
        assert certificate.identical == 1
        assert after == pytest.approx(base, abs=1e-6)
        long = "w1 " * 500
        for ask in ("get_text_embedding", "get_query_embedding"):
            for text in ("", "w1", long):
                assert getattr(exported, ask)(text) == pytest.approx(getattr(tuned, ask)(text), abs=1e-5)
        assert exported.is_cut([long, "w1"]) == [True, False]
    else:
        assert certificate.median_cosine < 1 - 1e-6, "it is another precision"
        assert abs(after - base) < 0.2
    assert json.loads((path / "export.json").read_text())["certificate"]["texts"] == 40


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_an_export_is_an_embedding_model_like_any_other(backend, exports, tuned, texts):
    path, _ = exports[backend, "fp32"]
    exported = LoraEmbedding(path)
    fingerprints = {LoraEmbedding(p).fingerprint for p, _ in exports.values()} | {tuned.fingerprint}
    assert len(fingerprints) == 5
    again = pickle.loads(pickle.dumps(exported))
    assert again.get_text_embedding(texts[0]) == exported.get_text_embedding(texts[0])
    assert LoraEmbedding.from_dict(exported.to_dict()).fingerprint == exported.fingerprint
    index = VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=exported)
    stamp_index(index, exported)
    verify_index(index, LoraEmbedding(path))
    with pytest.raises(WrongIndexError):
        verify_index(index, tuned)
    assert index.as_retriever(similarity_top_k=1).retrieve(texts[3])[0].get_content() == texts[3]
    assert isinstance(exported.backend, ExportedBackend)
    with pytest.raises(ConfigError, match="a model of torch"):
        _ = exported.sentence_transformer
    with pytest.raises(ConfigError, match="query_prompt, truncate_dim for a model that was exported"):
        LoraEmbedding(path, query_prompt="x", truncate_dim=4)


def test_an_export_that_differs_too_much_is_refused_and_the_old_one_stays(exports, tuned, texts, tmp_path):
    target = tmp_path / "export"
    shutil.copytree(exports["onnx", "fp32"][0], target)
    before = sorted((p.name, p.read_bytes()) for p in target.iterdir() if p.is_file())
    with pytest.raises(ExportError, match="differs too much from the original: cosine"):
        tuned.export(target, texts=texts, precision="int8", min_cosine=1.0)
    assert sorted((p.name, p.read_bytes()) for p in target.iterdir() if p.is_file()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    vectors = tuned.get_text_embedding(texts[0])
    assert LoraEmbedding(target).get_text_embedding(texts[0]) == pytest.approx(vectors, abs=1e-5)


def test_a_base_model_alone_with_prompts_is_exported(tmp_path, texts):
    path = make_tiny_model(tmp_path, seed=4)
    base = LoraEmbedding(base_model=path, query_prompt="query : ", passage_prompt="passage : ", device="cpu")
    base.export(tmp_path / "export", texts=texts)
    exported = LoraEmbedding(tmp_path / "export")
    assert exported.get_query_embedding("w5 w6") == pytest.approx(base.get_query_embedding("w5 w6"), abs=1e-5)
    assert exported.get_query_embedding("w5 w6") != pytest.approx(exported.get_text_embedding("w5 w6"), abs=1e-3)


def test_the_error_for_a_model_too_large_for_onnx_names_openvino(tuned, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_ONNX_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"less than 2 GB[\s\S]*openvino"):
        tuned.export(tmp_path / "x", texts=texts)
    assert not list(tmp_path.iterdir())


def test_log_records_of_other_threads_are_not_lost(caplog):
    with export._quietly():
        logging.getLogger("their.app").warning("a warning of another thread")
        logging.warning("quantisation speaks like this")
    assert [record.message for record in caplog.records] == ["a warning of another thread"]


def test_a_damaged_export_is_refused(exports, tmp_path):
    for kind, file in ((("onnx", "fp32"), "model.onnx"), (("openvino", "fp32"), "model.bin")):
        copy = tmp_path / kind[0]
        shutil.copytree(exports[kind][0], copy)
        content = bytearray((copy / file).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / file).write_bytes(bytes(content))
        with pytest.raises(AdapterError, match="changed or cut short"):
            LoraEmbedding(copy)
        (copy / file).unlink()
        with pytest.raises(AdapterError, match="missing"):
            LoraEmbedding(copy)
        shutil.copy(exports[kind][0] / file, copy / file)
        facts = json.loads((copy / "export.json").read_text())
        facts["prompts"]["query"] = "another prompt"  # other vectors under the same fingerprint
        (copy / "export.json").write_text(json.dumps(facts))
        with pytest.raises(AdapterError, match=r"export\.json.*was changed"):
            LoraEmbedding(copy)
        (copy / "export.json").write_text("{}")
        with pytest.raises(AdapterError, match=r"unreadable .*export\.json"):
            LoraEmbedding(copy)


def test_a_model_that_cannot_be_exported_is_refused_before_writing(tuned, adapter, tiny_model, texts, tmp_path):
    with pytest.raises(ConfigError, match="wrong argument") as caught:
        tuned.export(tmp_path / "x", texts=texts[:3], queries=[], backend="tf", precision="fp4", min_cosine=2)
    assert len(caught.value.problems) == 5
    several = LoraEmbedding(adapters={"a": adapter}, adapter="a", device="cpu")
    cases = [
        (several, "shares its model with others"),
        (LoraEmbedding(adapter, merge=False, device="cpu"), "a merged adapter"),
        (LoraEmbedding(base_model=tiny_model, window=16, device="cpu"), "windows"),
        (LoraEmbedding(base_model=tiny_model, truncate_dim=8, device="cpu"), "truncate_dim"),
    ]
    for model, said in cases:
        with pytest.raises(ConfigError, match=said):
            model.export(tmp_path / "x", texts=texts)
    with pytest.raises(ConfigError, match=r"texts\[0\] is of type int"):
        tuned.export(tmp_path / "x", texts=[1] * 30)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="cannot be written"):
        tuned.export(tmp_path / "file" / "x", texts=texts)


def test_only_an_export_is_overwritten(tuned, adapter, texts, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    (tmp_path / "new.previous").mkdir()
    (tmp_path / "new.previous" / "only_copy.txt").write_text("mine")
    for target in (tmp_path / "work", tmp_path / "new", adapter):
        with pytest.raises(OutputDirectoryError, match="something other than an export"):
            tuned.export(target, texts=texts)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "new.previous" / "only_copy.txt").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_vectors_with_nan_get_no_certificate(tuned, texts, tmp_path, monkeypatch):
    from llama_index_lora_embed.embedding import export

    encode = export.encode

    def broken(model, some, task):
        vectors = encode(model, some, task)
        vectors[0, 0] = np.nan
        return vectors

    monkeypatch.setattr(export, "encode", broken)
    with pytest.raises(ExportError, match="NaN"):
        tuned.export(tmp_path / "x", texts=texts)
    assert not (tmp_path / "x").exists()
    assert tuned.backend.fused, "an export must not switch oneDNN's products off"


def test_settings_that_an_export_fixes_are_refused(exports):
    path, _ = exports["onnx", "fp32"]
    with pytest.raises(ConfigError, match="merge, device for a model that was exported"):
        LoraEmbedding(path, merge=False, device="cuda")
    assert LoraEmbedding(path, device="cpu").fingerprint


def test_a_merged_export_is_what_others_load_and_what_the_adapter_computes(tuned, texts, dataset, tmp_path):
    from safetensors import safe_open
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    queries = list(dataset.queries.values())
    certificate = tuned.export(tmp_path / "merged", texts=texts, queries=queries, backend="merged")
    assert certificate.median_cosine > 0.99999
    assert certificate.identical == 1
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="np") as file:
        names = set(file.keys())
    assert not [name for name in names if "lora" in name or "base_model" in name]
    theirs = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    expected = tuned.get_text_embedding_batch(texts)
    np.testing.assert_allclose(theirs.encode_document(texts), expected, atol=1e-5)
    _, info = AutoModel.from_pretrained(str(tmp_path / "merged"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    exported = LoraEmbedding(tmp_path / "merged", device="cpu")
    np.testing.assert_allclose(exported.get_text_embedding_batch(texts), expected, atol=1e-5)
    again = pickle.loads(pickle.dumps(exported))
    assert again.fingerprint == exported.fingerprint != tuned.fingerprint
    with pytest.raises(ConfigError, match="for a model that was exported"):
        LoraEmbedding(tmp_path / "merged", query_prompt="query: ")


def test_a_merged_export_that_was_changed_is_refused(tuned, texts, tmp_path):
    tuned.export(tmp_path / "merged", texts=texts, backend="merged")
    tuned.export(tmp_path / "merged", texts=texts, backend="merged")  # replaces its own kind
    assert (tmp_path / "merged.previous" / "export.json").exists()
    weights = tmp_path / "merged" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterError, match="changed or cut short"):
        LoraEmbedding(tmp_path / "merged")


def test_a_merged_export_has_no_int8(tuned, texts, tmp_path):
    with pytest.raises(ConfigError, match="'int8' for 'onnx' and 'openvino'"):
        tuned.export(tmp_path / "merged", texts=texts, backend="merged", precision="int8")
