"""Used by every other package: errors, optional dependencies, atomic files, asynchronous work from synchronous code."""

from llama_index_lora_embed.core.errors import *  # noqa: F403
from llama_index_lora_embed.core.errors import __all__  # noqa: F401
