"""Log lines of server and workers: text for people, or JSON for programs that collect them."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from llama_index_lora_embed.service.settings import ServiceSettings

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`; Ray adds attributes with an underscore to the records of every logger."""
    return {name: value for name, value in vars(record).items() if name not in _OWN and not name.startswith("_")}


class JsonFormatter(logging.Formatter):
    """A JSON object per line: time (UTC), level, logger, message, and what the caller passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        extra = " ".join(f"{name}={value}" for name, value in _extra(record).items())
        return super().format(record) + (f" [{extra}]" if extra else "")


def configure_logging(settings: ServiceSettings) -> None:
    """Send the log of this process to standard error, in the format of the settings."""
    handler = logging.StreamHandler()
    as_text = _TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else as_text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "httpx2"):  # a line per request to the Hub
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
