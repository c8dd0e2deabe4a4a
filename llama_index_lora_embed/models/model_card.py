"""The adapter's README.md, which the Hub shows as its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index_lora_embed.models.adapter_directory import Manifest

# vectors from token vectors `tokens` and `mask`; both paddings are allowed, as in sentence-transformers' Pooling
_POOLING = {
    "mean": "(tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "cls": "tokens[torch.arange(len(tokens)), mask.argmax(1)]",
    "lasttoken": "tokens[torch.arange(len(tokens)), mask.cumsum(1).argmax(1)]",
}
_COLUMNS = 5  # metrics in the table; the most common ones come first in an evaluation


def model_card(manifest: Manifest, place: str = "path/of/this/folder", *, base_on_hub: bool = False) -> str:
    """Training data, metrics and loading code as Markdown, with the Hub's metadata.

    Args:
        manifest: The run's manifest.
        place: Folder or Hub id in the examples.
        base_on_hub: Whether the base model's name is a Hub id even though its revision is unknown.
    """
    base, dataset = manifest.base["model_id"], manifest.dataset
    origin = f"Trained on {dataset.get('queries', 0)} queries for {dataset.get('passages', 0)} passages"
    if "pairs" in dataset:
        origin = f"Trained on {dataset['pairs']} labelled pairs"
    if manifest.parents:
        # no path on the Hub, no fingerprint of an adapter without a manifest
        parents = [Path(p["path"]).name or (p["fingerprint"] or "an adapter")[:12] for p in manifest.parents]
        shares = [f"{p['weight']:g} x {name}" for p, name in zip(manifest.parents, parents, strict=True)]
        origin = f"Merged from {', '.join(shares)}"
    metadata = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    lines = ["---", *(f"{key}: {value}" for key, value in metadata.items())]
    if base_on_hub or manifest.base["revision"] is not None:
        lines.append(f"base_model: {base}")
    lines += [
        *("tags: [sentence-transformers, lora, peft, llama-index]", "---"),
        *(f"# LoRA adapter for {Path(base).name}", ""),
        f"{origin}. {manifest.verdict}".strip(),
    ]
    if manifest.metrics:
        names = list(manifest.metrics["base"])[:_COLUMNS]
        lines += ["", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row, values in manifest.metrics.items():
            lines.append(f"| {row} | " + " | ".join(f"{values[name]:.3f}" for name in names) + " |")
        if manifest.base_change:
            lines += ["", manifest.base_change]
    lines += [
        *("", "In LlamaIndex:", ""),
        *("```python", "from llama_index_lora_embed import LoraEmbedding", ""),
        *(f'embed_model = LoraEmbedding("{place}")', "index = VectorStoreIndex(nodes, embed_model=embed_model)", "```"),
        *("", "In sentence-transformers:", ""),
    ]
    windows = any(module["type"] == "JoinWindows" for module in manifest.pooling)
    code = ", trust_remote_code=True" if windows else ""
    lines += [
        *("```python", "from sentence_transformers import SentenceTransformer", ""),
        *(f'model = SentenceTransformer("{place}"{code})', "```", ""),
    ]
    if manifest.tune == "query":
        lines += [
            "The adapter is for queries alone; passages are embedded by the base model, as in an index that exists "
            "already. `LoraEmbedding` does so by itself. In sentence-transformers, embed passages with the base model.",
            "",
        ]
    if windows:
        lines += ["Modules of llama-index-lora-embed, which must be installed, split long texts into windows.", ""]
    lines += _peft_example(manifest, place)
    lines += [
        "A loaded adapter is frozen. To train it further, pass the folder to `LoraFinetuneEngine(continue_from=...)`, "
        'or call `model.set_adapter("default")` before `SentenceTransformerTrainer`.',
        "",
    ]
    return "\n".join(lines)


def _peft_example(manifest: Manifest, place: str) -> list[str]:
    """Code for peft and transformers; empty where an `AutoModel` and a line of pooling would not do."""
    pooling: dict[str, Any] = manifest.pooling[0] if manifest.pooling else {}
    mode, modules = pooling.get("pooling_mode"), [module["type"] for module in manifest.pooling]
    if (
        manifest.lora.get("task_type") != "FEATURE_EXTRACTION"
        or modules not in (["Pooling"], ["Pooling", "Normalize"])
        or not isinstance(mode, str)
        or mode not in _POOLING
        or not pooling.get("include_prompt", True)
    ):
        return []
    scaled = ["vectors = torch.nn.functional.normalize(vectors, dim=1)"] if manifest.normalise else []
    sides = [("query", "query"), ("passage", "document")][: 1 if manifest.tune == "query" else 2]
    texts = {f"a {side}": manifest.prompts.get(name) or "" for side, name in sides}
    inputs = ", ".join((f"{prompt!r} + " if prompt else "") + f'"{text}"' for text, prompt in texts.items())
    return [
        *("In peft:", ""),
        *("```python", "import torch", "from peft import AutoPeftModelForFeatureExtraction"),
        *("from transformers import AutoTokenizer", ""),
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        f'model = AutoPeftModelForFeatureExtraction.from_pretrained("{place}", dtype=torch.float32).eval()',
        f"texts = [{inputs}]",
        f'limits = {{"padding": True, "truncation": True, "max_length": {manifest.max_seq_length}}}',
        'batch = tokenizer(texts, **limits, return_tensors="pt")',
        "with torch.no_grad():",
        "    tokens = model(**batch).last_hidden_state",
        'mask = batch["attention_mask"]',
        f"vectors = {_POOLING[mode]}",
        *scaled,
        *("```", ""),
    ]
