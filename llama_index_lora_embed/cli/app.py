"""The application: all commands in the order of the help page."""

from __future__ import annotations

import typer

from llama_index_lora_embed.cli import adapters, data, evaluation, models, serve, tokens, training
from llama_index_lora_embed.cli.command import MARKUP
from llama_index_lora_embed.cli.flags import normal_name

app = typer.Typer(
    name="lora-embed",
    help="Fine-tune open embedding models with LoRA, and see whether retrieval is better.",
    no_args_is_help=True,
    rich_markup_mode=MARKUP,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": normal_name},
)


@app.callback()
def options() -> None:
    """Fine-tune open embedding models with LoRA, and see whether retrieval is better.

    Exit codes: 0 as asked, 1 error, 2 wrong usage, 3 verdict below --require, 130 interrupted.
    """


for part in (data, training, evaluation, models, adapters, serve, tokens):
    part.register(app)
