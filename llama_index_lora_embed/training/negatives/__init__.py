"""Hard negatives: mined from the training corpus, without false negatives."""

from llama_index_lora_embed.training.negatives.from_store import mine_from_store
from llama_index_lora_embed.training.negatives.mining import MiningReport, mine_hard_negatives

__all__ = ["MiningReport", "mine_from_store", "mine_hard_negatives"]
