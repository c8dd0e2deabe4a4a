"""Where the weights of a model lie in memory."""

from pathlib import Path


def mapped_parameters(base_model: str) -> float:
    """The share of a base model's parameters that lie in a mapping of its safetensors file, after a text."""
    from llama_index_lora_embed import LoraEmbedding

    embed_model = LoraEmbedding(base_model=base_model, device="cpu")
    embed_model.get_text_embedding("w1 w2")
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = line.split()[0].split("-")
        if line.endswith(".safetensors"):
            mappings.append(range(int(first, 16), int(last, 16)))
    addresses = [parameter.data_ptr() for parameter in embed_model.backend.model.parameters()]
    return sum(any(address in mapping for mapping in mappings) for address in addresses) / len(addresses)
