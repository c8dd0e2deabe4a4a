"""After training: merging, export, the Hub, registered versions, stamped indexes, bridges and replacement."""

from llama_index_lora_embed.deployment.align import Alignment, align_index
from llama_index_lora_embed.deployment.hub import push_to_hub
from llama_index_lora_embed.deployment.index_stamp import IndexStamp, read_index_stamp, stamp_index, verify_index
from llama_index_lora_embed.deployment.registry import Gate, RunRegistry
from llama_index_lora_embed.deployment.reindex import (
    ChromaIndexStore,
    FolderIndexStore,
    IndexStore,
    ReindexResult,
    open_index,
    reindex,
    roll_back,
)
from llama_index_lora_embed.deployment.versions import Version, VersionComparison
from llama_index_lora_embed.embedding.export import Certificate, certificate_of, export_model
from llama_index_lora_embed.models.merge import MergedAdapter, merge_adapters

__all__ = [
    "Alignment",
    "Certificate",
    "ChromaIndexStore",
    "FolderIndexStore",
    "Gate",
    "IndexStamp",
    "IndexStore",
    "MergedAdapter",
    "ReindexResult",
    "RunRegistry",
    "Version",
    "VersionComparison",
    "align_index",
    "certificate_of",
    "export_model",
    "merge_adapters",
    "open_index",
    "push_to_hub",
    "read_index_stamp",
    "reindex",
    "roll_back",
    "stamp_index",
    "verify_index",
]
