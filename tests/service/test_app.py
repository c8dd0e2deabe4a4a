import subprocess
import sys

import pytest


def test_the_server_answers_that_it_is_alive_and_ready(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_a_server_whose_database_is_gone_is_alive_and_not_ready(client):
    def broken():
        raise OSError("no database")

    client.app.state.services.database.read = broken
    assert client.get("/health").status_code == 200
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


@pytest.mark.slow
def test_an_application_imports_no_torch(tmp_path):
    code = (
        "import sys; from llama_index_lora_embed.service.app import create_app; "
        "from llama_index_lora_embed.service.settings import ServiceSettings; "
        f"create_app(ServiceSettings(data_dir={str(tmp_path)!r})); "
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'peft'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
