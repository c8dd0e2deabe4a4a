"""What every room uses: errors, optional dependencies, files that are whole or absent, asynchronous bridges."""

from llama_index_lora_embed.core.errors import *  # noqa: F403
from llama_index_lora_embed.core.errors import __all__  # noqa: F401
