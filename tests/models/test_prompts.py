import pytest
import torch
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.prompts import set_prompts
from llama_index_lora_embed.training.lora import lora_target_modules
from tests.conftest import make_dataset, make_tiny_model

WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
BGE = "Represent this sentence for searching relevant passages: "


def load(path, **prompts):
    return SentenceTransformer(path, device="cpu", prompts=prompts or None)


@pytest.mark.parametrize(
    ("model_id", "query", "passage"),
    [
        ("intfloat/e5-small-v2", "query: ", "passage: "),
        ("/models/multilingual-e5-base/", "query: ", "passage: "),
        ("BAAI/bge-small-en-v1.5", BGE, ""),
        ("BAAI/bge-m3", "", ""),
        ("intfloat/multilingual-e5-large-instruct", WEB_SEARCH, ""),
        ("intfloat/e5-mistral-7b-instruct", WEB_SEARCH, ""),
        ("nomic-ai/nomic-embed-text-v1", "search_query: ", "search_document: "),
        ("nomic-ai/nomic-embed-text-v1.5", "search_query: ", "search_document: "),
        ("nomic-ai/modernbert-embed-base", "search_query: ", "search_document: "),
        ("Qwen/Qwen3-Embedding-0.6B", "", ""),
        ("somebody/e5-small-v2-tuned", "", ""),
    ],
)
def test_prompts_of_families_whose_files_name_none(tiny_model, model_id, query, passage):
    model = load(tiny_model)
    set_prompts(model, model_id)
    assert (model.prompts["query"], model.prompts["document"]) == (query, passage)


def test_the_users_prompt_wins_over_the_models_and_the_models_over_the_table(tiny_model):
    model = load(tiny_model, query="own: ", document="")
    set_prompts(model, "BAAI/bge-small-en")
    assert model.prompts["query"] == "own: "
    set_prompts(model, "BAAI/bge-small-en", query_prompt="", passage_prompt="mine: ")
    assert (model.prompts["query"], model.prompts["document"]) == ("", "mine: ")


def test_a_query_prompt_under_the_name_of_its_task_is_found(tmp_path):
    model = SentenceTransformer(str(make_tiny_model(tmp_path)), device="cpu")
    model.prompts = {"sts_query": "other: ", "web_search_query": "search: ", "passage": "given: "}
    model.save_pretrained(str(tmp_path / "tasks"), create_model_card=False)
    again = load(str(tmp_path / "tasks"))
    set_prompts(again, "somebody/model")
    assert (again.prompts["query"], again.prompts["document"]) == ("search: ", "given: ")


def test_a_prompt_that_was_switched_off_stays_off_when_the_adapter_is_loaded(tmp_path):
    folder = make_tiny_model(tmp_path / "make").rename(tmp_path / "e5-small")
    out = str(tmp_path / "out")
    data, val = make_dataset(), make_dataset(passages=10, seed=7, prefix="v")
    settings = {"val_dataset": val, "epochs": 4, "learning_rate": 5e-3, "show_progress_bar": False, "device": "cpu"}
    LoraFinetuneEngine(data, str(folder), out, query_prompt="", passage_prompt="", **settings).finetune()
    plain = LoraEmbedding(out, device="cpu")
    assert plain.get_query_embedding("w1") == plain.get_text_embedding("w1")
    LoraFinetuneEngine(data, str(folder), out, **settings).finetune()
    prompted = LoraEmbedding(out, device="cpu")
    assert prompted.manifest.prompts == {"query": "query: ", "document": "passage: "}
    expected = SentenceTransformer(out, device="cpu").encode(["query: w1", "passage: w1"])
    assert prompted.get_query_embedding("w1") == pytest.approx(expected[0].tolist(), abs=1e-5)
    assert prompted.get_text_embedding("w1") == pytest.approx(expected[1].tolist(), abs=1e-5)


def test_targets_are_the_linear_modules_of_the_layers_without_the_pooler(tiny_model):
    assert lora_target_modules(load(tiny_model)) == [
        "attention.output.dense",
        "attention.self.key",
        "attention.self.query",
        "attention.self.value",
        "intermediate.dense",
        "output.dense",
    ]


def test_fused_projections_are_found():
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    class Wrapper:
        transformers_model = ModernBertModel(config)

    assert lora_target_modules(Wrapper()) == ["attn.Wo", "attn.Wqkv", "mlp.Wi", "mlp.Wo"]


def test_a_model_without_layers_is_refused_with_a_hint():
    class Wrapper:
        transformers_model = torch.nn.Linear(2, 2)

    with pytest.raises(ConfigError, match="target_modules"):
        lora_target_modules(Wrapper())
