"""Hard negatives: mined from the training corpus, without false negatives."""

from llama_index_lora_embed.training.negatives.mining import MiningReport, mine_hard_negatives

__all__ = ["MiningReport", "mine_hard_negatives"]
