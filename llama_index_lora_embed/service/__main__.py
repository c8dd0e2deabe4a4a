"""The server: `python -m llama_index_lora_embed.service`, with settings from the environment."""

from __future__ import annotations

from types import FrameType

import uvicorn
from fastapi import FastAPI

from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.connections import timed_protocol
from llama_index_lora_embed.service.logs import configure_logging
from llama_index_lora_embed.service.settings import ServiceSettings


class Server(uvicorn.Server):
    """uvicorn's server, which tells the application's streams to end before it waits for open requests."""

    def __init__(self, app: FastAPI, settings: ServiceSettings) -> None:
        self._stopping = app.state.stopping
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=timed_protocol(settings.client_timeout_s),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=settings.shutdown_s,
                # longer than clients keep a connection (httpx: 5 s, uvicorn's own default), or both close it at once
                timeout_keep_alive=75,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take SIGTERM or SIGINT."""
        self._stopping.set()
        super().handle_exit(sig, frame)


def main() -> None:
    """Serve with the settings of the environment, until SIGTERM or SIGINT."""
    settings = ServiceSettings()
    configure_logging(settings)
    Server(create_app(settings), settings).run()


if __name__ == "__main__":
    main()
