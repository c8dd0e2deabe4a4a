"""The adapter's README.md, which the Hub shows as its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index_lora_embed.adapter import Manifest


def _trained_on(dataset: dict[str, Any]) -> str:
    if "pairs" in dataset:
        return f"{dataset['pairs']} labelled pairs"
    return f"{dataset.get('queries', 0)} questions about {dataset.get('passages', 0)} passages"


def model_card(manifest: Manifest) -> str:
    """What was trained on what, its measures, and how to load it, as Markdown with the Hub's header."""
    base = manifest.base["model_id"]
    metadata = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    lines = ["---", *(f"{key}: {value}" for key, value in metadata.items())]
    if manifest.base["revision"] is not None:
        lines.append(f"base_model: {base}")
    lines += [
        *(
            "tags: [sentence-transformers, lora, llama-index]",
            "---",
            f"# LoRA adapter for {Path(base).name}",
            "",
        ),
        f"Trained on {_trained_on(manifest.dataset)}. {manifest.verdict}".strip(),
    ]
    if manifest.metrics:
        names = list(manifest.metrics["base"])
        lines += ["", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row, values in manifest.metrics.items():
            lines.append(f"| {row} | " + " | ".join(f"{values[name]:.3f}" for name in names) + " |")
    lines += [
        *("", "```python", "from llama_index_lora_embed import LoraEmbedding", ""),
        *('embed_model = LoraEmbedding("path/of/this/folder")', "```", ""),
    ]
    if any(module["type"] == "JoinWindows" for module in manifest.pooling):
        lines += [
            "Long texts are read in windows. sentence-transformers loads the folder where llama-index-lora-embed is "
            "installed: `SentenceTransformer(path, trust_remote_code=True)`.",
            "",
        ]
    return "\n".join(lines)
