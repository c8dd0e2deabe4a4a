"""Tiny models of each architecture, made from the real configuration classes, as sentence-transformers folders.

Two layers of width 32 with random weights and a word-level tokenizer. Special tokens, pooling, heads, prompts and
padding side are those of the model that each is named after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import WORDS

WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
_PUNCTUATION = ["?", ":", ".", ",", "|", "query", "passage", "task", "search", "result", "title", "none", "text"]
_INSTRUCTION = ["Instruct", "Given", "a", "web", "retrieve", "relevant", "passages", "that", "answer", "the", "Query"]
_WIDTH, _LAYERS, _HEADS, _INNER = 32, 2, 2, 64


@dataclass(frozen=True)
class Architecture:
    """How a tiny model is made, and what is expected of it.

    Attributes:
        make: Writes the model; takes the folder and returns the path of the sentence-transformers folder.
        targets: Linear modules that the default LoRA adapts.
        longest: Tokens that its positions allow.
        pooling: Of the model it is named after.
        appends: The special token that ends every text, or None.
        prompts: Query and document prompt that its own files carry.
        heads: Dense heads after the pooling.
    """

    make: Callable[[Path], Path]
    targets: list[str]
    longest: int
    pooling: str = "mean"
    appends: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    heads: int = 0


def tokenizer_of(template: str, special: list[str], *, side: str = "right", length: int = 24, **tokens: str) -> Any:
    """A fast word-level tokenizer.

    Args:
        template: What is put around a text, e.g. "[CLS] $A [SEP]".
        special: Special tokens, in the order of their ids.
        side: Padding side.
        length: `model_max_length`.
        **tokens: Which token is the `pad_token`, `eos_token` and so on.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *_PUNCTUATION, *_INSTRUCTION])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    used = [part for part in template.split() if part != "$A"]
    if used:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, vocabulary[token]) for token in used]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side=side, model_max_length=length,
        model_input_names=["input_ids", "attention_mask"], **tokens,
    )  # fmt: skip


def bert_tokenizer(**kwargs: Any) -> Any:
    """[CLS] text [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return tokenizer_of("[CLS] $A [SEP]", special, mask_token="[MASK]", **names, **kwargs)


def roberta_tokenizer(**kwargs: Any) -> Any:
    """<s> text </s>, with the padding at id 1, from which RoBERTa counts its positions."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    return tokenizer_of("<s> $A </s>", special, bos_token="<s>", eos_token="</s>", mask_token="<mask>", **names,
                        **kwargs)  # fmt: skip


def decoder_tokenizer(template: str = "$A <eos>", **kwargs: Any) -> Any:
    """Text and <eos>, unless the template says otherwise."""
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return tokenizer_of(template, ["<pad>", "<unk>", "<bos>", "<eos>"], **names, **kwargs)


def save(
    folder: Path,
    name: str,
    tokenizer: Any,
    *,
    pooling: str | None = "mean",
    heads: int = 0,
    prompts: dict[str, str] | None = None,
    include_prompt: bool = True,
    model: str = "Model",
    **config: Any,
) -> Path:
    """Write a random model of a transformers architecture.

    Args:
        folder: An empty folder.
        name: Prefix of transformers' classes, e.g. "Bert".
        tokenizer: As the functions above make it.
        pooling: None writes a plain transformers checkpoint, without sentence-transformers' files.
        heads: Dense heads after the pooling.
        prompts: Recorded in the model's own files.
        include_prompt: Whether prompt tokens are pooled.
        model: Suffix of the model's class.
        **config: Of the configuration, besides sizes and special tokens.

    Returns:
        The folder to load.
    """
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": _WIDTH, "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS, "intermediate_size": _INNER,
    }  # fmt: skip
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    if name in ("Qwen3", "Mistral", "Llama", "Gemma3"):
        sizes |= {"num_key_value_heads": 1, "head_dim": _WIDTH // _HEADS}
    if name == "ModernBert":
        special |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    kind = "TextConfig" if name == "Gemma3" else "Config"
    made = getattr(transformers, name + kind)(**{**sizes, **special, **config})
    # wider than usual, so that random models tell texts apart and a changed token shows
    made.initializer_range = 0.2
    plain = folder / "transformer"
    getattr(transformers, name + ("TextModel" if name == "Gemma3" else model))(made).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    if pooling is None:
        return plain
    transformer = Transformer(str(plain), max_seq_length=tokenizer.model_max_length)
    modules: list[Any] = [transformer, Pooling(_WIDTH, pooling_mode=pooling, include_prompt=include_prompt)]
    for number in range(heads):
        wide, narrow = (_WIDTH, 2 * _WIDTH) if number % 2 == 0 else (2 * _WIDTH, _WIDTH)
        modules.append(Dense(wide, narrow, bias=False, activation_function=torch.nn.Identity()))
    whole = SentenceTransformer(modules=[*modules, Normalize()], device="cpu", prompts=prompts)
    whole.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


_BERT = ["attention.output.dense", "attention.self.key", "attention.self.query", "attention.self.value",
         "intermediate.dense", "output.dense"]  # fmt: skip
_GATED = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
_SELF = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
_GEMMA = {"query": "task: search result | query: ", "document": "title: none | text: "}


def qwen3(folder: Path, side: str = "left", **kwargs: Any) -> Path:
    """Qwen3-Embedding: last token, which is the end token that the tokenizer appends; an instruction on queries."""
    settings = {"pooling": "lasttoken", "prompts": {"query": WEB_SEARCH, "document": ""}}
    return save(folder, "Qwen3", decoder_tokenizer(side=side), max_position_embeddings=128,
                **{**settings, **kwargs})  # fmt: skip


def llama(folder: Path, **kwargs: Any) -> Path:
    """SmolLM2 and its kin: no special token around a text."""
    settings = {"pooling": "lasttoken", **kwargs}
    return save(folder, "Llama", decoder_tokenizer("$A", side="right"), max_position_embeddings=128, **settings)


def roberta(folder: Path, name: str = "Roberta", **kwargs: Any) -> Path:
    """66 rows in the position table, of which 64 hold tokens."""
    return save(folder, name, roberta_tokenizer(), max_position_embeddings=66, type_vocab_size=1, **kwargs)


ARCHITECTURES = {
    "bert": Architecture(
        lambda folder: save(folder, "Bert", bert_tokenizer(), pooling="cls", max_position_embeddings=64),
        _BERT, 64, "cls", "[SEP]",
    ),
    "roberta": Architecture(roberta, _BERT, 64, "mean", "</s>"),
    "xlm-roberta": Architecture(
        lambda folder: roberta(folder, "XLMRoberta", prompts={"query": "query: ", "document": "passage: "}),
        _BERT, 64, "mean", "</s>", {"query": "query: ", "document": "passage: "},
    ),
    "mpnet": Architecture(
        lambda folder: save(folder, "MPNet", roberta_tokenizer(), max_position_embeddings=66),
        ["attention.attn.k", "attention.attn.o", "attention.attn.q", "attention.attn.v", "intermediate.dense",
         "output.dense"],
        64, "mean", "</s>",
    ),
    "distilbert": Architecture(
        lambda folder: save(folder, "DistilBert", bert_tokenizer(), max_position_embeddings=64, hidden_dim=_INNER),
        ["attention.k_lin", "attention.out_lin", "attention.q_lin", "attention.v_lin", "ffn.lin1", "ffn.lin2"],
        64, "mean", "[SEP]",
    ),
    "modernbert": Architecture(
        lambda folder: save(folder, "ModernBert", bert_tokenizer(), max_position_embeddings=8192, local_attention=8,
                            layer_types=["full_attention", "sliding_attention"]),
        ["attn.Wo", "attn.Wqkv", "mlp.Wi", "mlp.Wo"], 8192, "mean", "[SEP]",
    ),
    "nomic_bert": Architecture(
        lambda folder: save(folder, "NomicBert", bert_tokenizer(), max_position_embeddings=2048),
        [*_GATED, *_SELF], 2048, "mean", "[SEP]",
    ),
    "gte": Architecture(
        lambda folder: save(folder, "Gte", roberta_tokenizer(), pooling="cls", max_position_embeddings=8192),
        [*_GATED, *_SELF], 8192, "cls", "</s>",
    ),
    "qwen3": Architecture(
        qwen3, [*_GATED, *_SELF], 128, "lasttoken", "<eos>", {"query": WEB_SEARCH, "document": ""}
    ),
    "qwen3-right": Architecture(
        lambda folder: qwen3(folder, "right"), [*_GATED, *_SELF], 128, "lasttoken", "<eos>",
        {"query": WEB_SEARCH, "document": ""},
    ),
    "gemma3": Architecture(
        lambda folder: save(folder, "Gemma3", decoder_tokenizer("<bos> $A <eos>"), heads=2, prompts=_GEMMA,
                            max_position_embeddings=2048, use_bidirectional_attention=True, sliding_window=8,
                            layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16),
        [*_GATED, *_SELF], 2048, "mean", "<eos>", _GEMMA, heads=2,
    ),
    "mistral": Architecture(
        lambda folder: save(folder, "Mistral", decoder_tokenizer("<bos> $A <eos>", side="left"), pooling="lasttoken",
                            max_position_embeddings=32768, sliding_window=8),
        [*_GATED, *_SELF], 32768, "lasttoken", "<eos>",
    ),
    "llama": Architecture(llama, [*_GATED, *_SELF], 128, "lasttoken"),
}  # fmt: skip
