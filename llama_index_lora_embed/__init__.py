"""Fine-tune open embedding models on your own LlamaIndex nodes with LoRA.

The public names are listed in `__init__.pyi` and loaded when they are first used: importing it imports no torch.
Everything else is imported from the folder that owns it, e.g. `llama_index_lora_embed.deployment`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
