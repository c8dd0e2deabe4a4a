import json
import logging

from llama_index_lora_embed.service.logs import JsonFormatter


def test_a_line_has_what_the_caller_passed_and_the_exception():
    records = []
    logger = logging.Logger("worker")
    logger.addHandler(handler := logging.Handler())
    handler.emit = records.append
    try:
        raise OSError("disk")
    except OSError:
        logger.exception("job %s failed", "a", extra={"job": "a", "attempt": 2, "_of_a_library": 1})
    line = JsonFormatter().format(records[0])
    assert "\n" not in line
    entry = json.loads(line)
    assert entry.pop("time").endswith("Z")
    assert entry.pop("exception").endswith("OSError: disk")
    assert entry == {"level": "ERROR", "logger": "worker", "message": "job a failed", "job": "a", "attempt": 2}
