"""`lora-embed`: the command line. Each command is one call of the package; nothing here trains or evaluates."""

import os
import sys


def main() -> None:
    """Run the command line; the entry point `lora-embed`."""
    from llama_index_lora_embed.core.errors import MissingExtraError
    from llama_index_lora_embed.core.optional import require

    try:
        require("typer")
    except MissingExtraError as error:
        print(f"error: {error.got}\n{error.hint}", file=sys.stderr)
        sys.exit(1)
    if not sys.stderr.isatty():  # bars would be hundreds of lines of a log; tqdm reads this when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    from llama_index_lora_embed.cli.app import app

    app(prog_name="lora-embed")
