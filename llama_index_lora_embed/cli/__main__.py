"""`python -m llama_index_lora_embed.cli`."""

from llama_index_lora_embed.cli import main

main()
