"""The README's Python is run as it stands; only the model's name is another."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode

from tests.conftest import make_dataset
from tests.helpers.llms import FakeLLM

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def namespace(tiny_model, nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_dataset().save_json("train.json")
    make_dataset(passages=10, seed=7, prefix="v").save_json("val.json")
    return {"nodes": nodes}


def run(snippet, namespace, tiny_model):
    code = snippet.replace("sentence-transformers/all-MiniLM-L6-v2", tiny_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "README.md", "exec"), namespace)


def test_the_snippets_are_the_ones_that_are_tested_here():
    assert len(SNIPPETS) == 7


def test_the_ten_lines(namespace, tiny_model, capsys):
    run(SNIPPETS[0], namespace, tiny_model)
    assert "tuned" in capsys.readouterr().out
    assert namespace["index"].as_retriever(similarity_top_k=2).retrieve("w1 w2")


def test_nodes_alone(namespace, tiny_model):
    exec("from llama_index_lora_embed import LoraFinetuneEngine", namespace)
    run(SNIPPETS[1], namespace, tiny_model)
    assert namespace["engine"].val_dataset is not None


def test_questions_by_an_llm(namespace, tiny_model, capsys):
    exec("from llama_index_lora_embed import LoraFinetuneEngine", namespace)
    run(SNIPPETS[2], {**namespace, "llm": FakeLLM()}, tiny_model)
    assert "12 answered with 12 calls" in capsys.readouterr().out


def test_training_further(namespace, tiny_model):
    run(SNIPPETS[0], namespace, tiny_model)
    run(SNIPPETS[3], namespace, tiny_model)
    assert namespace["result"].steps == 4
    assert json.loads(Path("runs/handbook-2/finetune.json").read_text())["parent"]["path"].endswith("runs/handbook")


def test_several_adapters_and_a_stamp(namespace, tiny_model, adapter):
    from llama_index.core import VectorStoreIndex

    from llama_index_lora_embed.deployment import read_index_stamp

    for name in ("legal", "hr"):
        shutil.copytree(adapter, f"runs/{name}")
    namespace["VectorStoreIndex"] = VectorStoreIndex
    run(SNIPPETS[4], namespace, tiny_model)
    assert len(namespace["vectors"]) == 3
    assert read_index_stamp(namespace["index"]).fingerprint == namespace["legal"].fingerprint


def test_is_it_better_now(namespace, tiny_model, capsys):
    make_dataset(passages=8, seed=3).save_json("general.json")
    asked_about = make_dataset(passages=10, seed=7, prefix="v").corpus
    namespace["nodes"] = [TextNode(id_=i, text=text) for i, text in asked_about.items()]
    run(SNIPPETS[0], namespace, tiny_model)
    run(SNIPPETS[5], namespace, tiny_model)
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert "Regression set" in printed
    assert Path("report.html").stat().st_size > 100_000
    assert namespace["registry"].in_use().name == "v1"


def test_coming_from_the_old_package(namespace, tiny_model):
    """The old documentation's calls, with only the import changed."""
    run(SNIPPETS[6], namespace, tiny_model)
    train_dataset = namespace["EmbeddingQAFinetuneDataset"].from_json("train.json")
    val_dataset = namespace["EmbeddingQAFinetuneDataset"].from_json("val.json")
    finetune_engine = namespace["SentenceTransformersFinetuneEngine"](
        train_dataset, model_id=tiny_model, model_output_path="test_model", val_dataset=val_dataset
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finetune_engine.finetune()
    embed_model = finetune_engine.get_finetuned_model()

    from llama_index.core.embeddings import resolve_embed_model

    local = resolve_embed_model("local:test_model")
    assert local.get_text_embedding("w1 w2") == pytest.approx(embed_model.get_text_embedding("w1 w2"), abs=1e-5)
