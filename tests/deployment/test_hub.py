"""To the Hub and back, in a process that knows nothing but the Hub's address."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import AdapterError, ConfigError, HubError, ModelNotFoundError
from llama_index_lora_embed.deployment.hub import push_to_hub
from tests import hub as stand_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub():
    with stand_in.running() as running:
        yield running


def elsewhere(code, hub, cache, **more):
    """Run code in a process of its own that has the stand-in for its Hub, and a cache of its own."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        **{"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"},
        **{
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        **more,
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def push(path, repo, hub, cache, token=stand_in.TOKEN, **arguments):
    code = f"""
from llama_index_lora_embed.deployment.hub import push_to_hub
print(push_to_hub({str(path)!r}, {repo!r}, token={token!r}, **{arguments!r}))
"""
    return elsewhere(code, hub, cache)


@pytest.fixture(scope="module")
def base(hub, tiny_model):
    """The base of the adapter on the Hub."""
    files = {p.relative_to(tiny_model).as_posix(): p.read_bytes() for p in Path(tiny_model).rglob("*") if p.is_file()}
    hub.commit("them/tiny", "main", files)
    return "them/tiny"


@pytest.fixture(scope="module")
def pushed(hub, base, adapter, tmp_path_factory):
    done = push(adapter, "me/handbook", hub, tmp_path_factory.mktemp("cache"), base_model=base)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_what_was_pushed_loads_from_the_hub_with_the_same_vectors(hub, pushed, adapter, tmp_path):
    assert pushed == hub.heads["me/handbook", "main"]
    weights = (Path(adapter) / "adapter_model.safetensors").read_bytes()
    assert hub.objects[hashlib.sha256(weights).hexdigest()] == weights, "as a large file"
    code = """
import hashlib
import json
from llama_index_lora_embed import LoraEmbedding
from sentence_transformers import SentenceTransformer
ours = LoraEmbedding("me/handbook", device="cpu")
theirs = SentenceTransformer("me/handbook", device="cpu")
print(json.dumps([ours.fingerprint, ours.get_text_embedding("w1 w2"), theirs.encode_document("w1 w2").tolist()]))
"""
    done = elsewhere(code, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    fingerprint, ours, theirs = json.loads(done.stdout.splitlines()[-1])
    here = LoraEmbedding(adapter, device="cpu")
    assert fingerprint == here.fingerprint
    assert ours == pytest.approx(here.get_text_embedding("w1 w2"), abs=1e-6)
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_a_revision_is_loaded_as_it_was_and_without_a_network_again(hub, pushed, adapter, tmp_path):
    retrained = tmp_path / "retrained"
    shutil.copytree(adapter, retrained)
    (retrained / "README.md").write_text("---\ntags: [mine]\n---\nmy own words")
    done = push(retrained, "me/handbook", hub, tmp_path / "cache", base_model="them/tiny", revision="next")
    assert done.returncode == 0, done.stderr
    newer = done.stdout.split()[-1]
    assert hub.heads["me/handbook", "next"] == newer != pushed
    assert hub.heads["me/handbook", "main"] == pushed
    code = "from llama_index_lora_embed import LoraEmbedding\nLoraEmbedding('me/handbook', revision={!r})"
    for revision in (pushed, "next", newer):
        assert elsewhere(code.format(revision), hub, tmp_path / "cache").returncode == 0
    asked = len(hub.requests)
    offline = elsewhere(code.format(pushed), hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == asked, "from the cache alone"


def test_the_card_says_what_it_is_and_how_to_load_it_there(hub, pushed, adapter):
    files = hub.commits["me/handbook", pushed]
    card = files["README.md"].decode()
    metrics = json.loads((adapter / "finetune.json").read_text())["metrics"]
    for said in (
        "base_model: them/tiny",
        "# LoRA adapter for tiny",
        "Trained on 48 questions",
        "library_name: sentence-transformers",
        'LoraEmbedding("me/handbook")',
        'SentenceTransformer("me/handbook")',
        *(f"{metrics[which]['ndcg@10']:.3f}" for which in ("base", "tuned")),
    ):
        assert said in card, said
    everything = b"".join(files.values()).decode(errors="replace")
    assert str(adapter.parent) not in everything, "no paths of this computer"
    assert "/tmp/" not in everything


def test_a_card_that_somebody_wrote_stays(hub, adapter, base, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(adapter, mine)
    (mine / "README.md").write_text("---\ntags: [mine]\n---\nmy own words")
    (mine / ".env").write_text("SECRET=1")
    (mine / "keys").symlink_to(tmp_path)
    done = push(mine, "me/mine", hub, tmp_path / "cache", base_model=base)
    assert done.returncode == 0, done.stderr
    assert b"my own words" in hub.files("me/mine", "main")[1]["README.md"]
    assert (mine / "README.md").read_text().endswith("my own words")
    pushed = {name for name in hub.files("me/mine", "main")[1] if name != ".gitattributes"}
    manifest = json.loads((mine / "finetune.json").read_text())
    assert pushed == {*manifest["files"], "finetune.json", "README.md"}, "nothing else that lies there"


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(hub, adapter, tiny_model, tmp_path):
    asked = len(hub.requests)
    with pytest.raises(ConfigError, match="base_model="):
        push_to_hub(adapter, "me/none")
    for wrong in ("", "/home/me/base", "~/base", "./base", "C:\\base", str(tiny_model)):
        with pytest.raises(ConfigError, match="id on the Hub"):
            push_to_hub(adapter, "me/none", base_model=wrong)
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_config.json").write_text("{}")
    for path in (broken, tiny_model, tmp_path / "nowhere"):
        with pytest.raises(AdapterError):
            push_to_hub(path, "me/none", base_model="them/tiny")
    assert len(hub.requests) == asked


def test_a_hub_that_refuses_or_is_not_there_is_named(hub, adapter, base, tmp_path):
    refused = push(adapter, "me/other", hub, tmp_path / "cache", token="hf_wrong", base_model=base)
    assert "HubError: got no commit to 'me/other'" in refused.stderr
    assert ("me/other", "main") not in hub.heads
    with pytest.raises(HubError, match="OfflineModeIsEnabled"):
        push_to_hub(adapter, "me/other", base_model=base)  # the tests themselves are offline
    with pytest.raises(HubError, match="not/a/name"):
        push_to_hub(adapter, "not/a/name", base_model=base)
    missing = elsewhere("from llama_index_lora_embed import LoraEmbedding\nLoraEmbedding('me/nothing')", hub, tmp_path)
    assert ModelNotFoundError.__name__ in missing.stderr
    assert "me/nothing" in missing.stderr
