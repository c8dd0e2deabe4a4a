"""`serve` and `worker`: the processes of the service."""

from __future__ import annotations

import typer

from llama_index_lora_embed.cli.command import Outcome, command


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "lora-embed serve")(serve)
    command(app, "lora-embed worker")(worker)


def serve() -> Outcome:
    """Serve fine-tuning, evaluation and embeddings over HTTP, until SIGTERM or Ctrl-C.

    Settings are environment variables LORA_EMBED_...: see docs/service.md. Jobs are trained by workers.
    """
    from llama_index_lora_embed.service.__main__ import main

    main()
    return Outcome({}, "")


def worker() -> Outcome:
    """Train the jobs of the service, one at a time; start one worker for each accelerator.

    Settings are those of the server.
    """
    from llama_index_lora_embed.service.jobs.worker import main

    main()
    return Outcome({}, "")
