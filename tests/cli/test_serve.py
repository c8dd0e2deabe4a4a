"""`serve` and `worker` are the processes of the service."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.service_processes import environment, until


@pytest.mark.slow
@pytest.mark.extended  # tests/service starts both in other ways
def test_server_and_worker_start_and_stop(tiny_model, tmp_path):
    env = environment(tmp_path / "data", {"tiny": tiny_model}, auth="off")
    log = tmp_path / "log"
    with log.open("wb") as output:
        program = [sys.executable, "-m", "llama_index_lora_embed.cli"]
        streams = {"stdout": output, "stderr": output, "env": {**os.environ, **env}}
        server, worker = (subprocess.Popen([*program, name], **streams) for name in ("serve", "worker"))
        try:
            url = f"http://127.0.0.1:{env['LORA_EMBED_PORT']}/health"
            until(lambda: urllib.request.urlopen(url).status == 200, 120, "the server answers")
            until(lambda: "worker" in Path(log).read_text(), 120, "the worker has said something")
            assert worker.poll() is None, log.read_text()
        finally:
            for process in (server, worker):
                process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in (server, worker)]
    assert set(codes) <= {0, -signal.SIGTERM, 128 + signal.SIGTERM}, log.read_text()
    assert "Traceback" not in log.read_text()
    assert os.listdir(tmp_path / "data")
