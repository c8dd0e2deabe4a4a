"""Past one machine, on Ray: queries, embeddings and training runs on a cluster. It needs the extra `ray`."""

import lazy_loader

import llama_index_lora_embed.core.optional as _optional

_optional.require("ray")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
