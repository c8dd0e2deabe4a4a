import pytest

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.service.settings import ServiceSettings


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EMBED_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LORA_EMBED_PORT", "9000")
    monkeypatch.setenv("LORA_EMBED_ALLOWED_MODELS", '{"minilm": "/models/minilm"}')
    settings = ServiceSettings()
    assert (settings.data_dir, settings.port) == (tmp_path, 9000)
    assert settings.allowed_models == {"minilm": "/models/minilm"}
    assert settings.database == f"sqlite:///{tmp_path}/service.db"


def test_models_may_be_a_list_of_hub_ids(monkeypatch):
    monkeypatch.setenv("LORA_EMBED_ALLOWED_MODELS", '["BAAI/bge-small-en"]')
    assert ServiceSettings().allowed_models == {"BAAI/bge-small-en": "BAAI/bge-small-en"}


def test_all_wrong_settings_are_named_at_once(monkeypatch):
    monkeypatch.setenv("LORA_EMBED_PORT", "many")
    monkeypatch.setenv("LORA_EMBED_LEASE_S", "-1")
    with pytest.raises(ConfigError) as caught:
        ServiceSettings()
    assert [problem.partition("=")[0] for problem in caught.value.problems] == ["port", "lease_s"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "example.org", "::"])
def test_only_a_loopback_host_may_do_without_tokens(host):
    with pytest.raises(ConfigError, match="auth='off'"):
        ServiceSettings(auth="off", host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_loopback_host_may_do_without_tokens(host):
    assert ServiceSettings(auth="off", host=host).auth == "off"


def test_a_lease_outlives_a_heartbeat():
    with pytest.raises(ConfigError, match="at least two heartbeats"):
        ServiceSettings(lease_s=5, heartbeat_s=4)


def test_the_environment_gives_the_same_settings(tmp_path, monkeypatch):
    settings = ServiceSettings(
        data_dir=tmp_path, allowed_models={"a": "b"}, executor="ray", queue_url=None, ray_gpus=0.5, device="cpu"
    )
    for name, text in settings.environment().items():
        monkeypatch.setenv(name, text)
    assert ServiceSettings() == settings
