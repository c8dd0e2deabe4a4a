"""Push to a Hub and load from it, in processes that only know its address."""

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
from llama_index_lora_embed.deployment import merge_adapters
from llama_index_lora_embed.deployment.hub import push_to_hub
from tests.helpers.hub import TOKEN, local_hub

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub():
    with local_hub() as hub:
        yield hub


def run_in_process(code, hub, cache, **more):
    """Run code in a new process with this Hub and an own cache."""
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


def push(path, repo, hub, cache, token=TOKEN, **arguments):
    code = f"""
from llama_index_lora_embed.deployment.hub import push_to_hub
print(push_to_hub({str(path)!r}, {repo!r}, token={token!r}, **{arguments!r}))
"""
    return run_in_process(code, hub, cache)


@pytest.fixture(scope="module")
def base(hub, tiny_model):
    """The adapter's base model, on the Hub."""
    files = {p.relative_to(tiny_model).as_posix(): p.read_bytes() for p in Path(tiny_model).rglob("*") if p.is_file()}
    hub.commit("them/tiny", "main", files)
    return "them/tiny"


@pytest.fixture(scope="module")
def pushed(hub, base, adapter, tmp_path_factory):
    done = push(adapter, "me/handbook", hub, tmp_path_factory.mktemp("cache"), base_model=base)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_a_pushed_adapter_loads_from_the_hub_with_the_same_vectors(hub, pushed, adapter, tmp_path):
    assert pushed == hub.heads["me/handbook", "main"]
    weights = (Path(adapter) / "adapter_model.safetensors").read_bytes()
    assert hub.objects[hashlib.sha256(weights).hexdigest()] == weights, "uploaded as a large file"
    code = """
import hashlib
import json
from llama_index_lora_embed import LoraEmbedding
from sentence_transformers import SentenceTransformer
ours = LoraEmbedding("me/handbook", device="cpu")
theirs = SentenceTransformer("me/handbook", device="cpu")
print(json.dumps([ours.fingerprint, ours.get_text_embedding("w1 w2"), theirs.encode_document("w1 w2").tolist()]))
"""
    done = run_in_process(code, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    fingerprint, ours, theirs = json.loads(done.stdout.splitlines()[-1])
    here = LoraEmbedding(adapter, device="cpu")
    assert fingerprint == here.fingerprint
    assert ours == pytest.approx(here.get_text_embedding("w1 w2"), abs=1e-6)
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_a_revision_loads_as_it_was_pushed_and_again_offline_from_the_cache(hub, pushed, adapter, tmp_path):
    retrained = tmp_path / "retrained"
    shutil.copytree(adapter, retrained)
    (retrained / "README.md").write_text("---\ntags: [mine]\n---\nmy own words")
    done = push(retrained, "me/handbook", hub, tmp_path / "cache", base_model="them/tiny", revision="next")
    assert done.returncode == 0, done.stderr
    newer = done.stdout.split()[-1]
    assert hub.heads["me/handbook", "next"] == newer != pushed
    assert hub.heads["me/handbook", "main"] == pushed
    code = """
from llama_index_lora_embed import LoraEmbedding
for revision in {!r}:
    LoraEmbedding("me/handbook", revision=revision)
"""
    loaded = run_in_process(code.format([pushed, "next", newer]), hub, tmp_path / "cache")
    assert loaded.returncode == 0, loaded.stderr
    requests = len(hub.requests)
    offline = run_in_process(code.format([pushed]), hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == requests, "loaded from the cache"


def test_the_model_card_names_base_data_metrics_and_how_to_load_it(hub, pushed, adapter):
    files = hub.commits["me/handbook", pushed]
    card = files["README.md"].decode()
    metrics = json.loads((adapter / "finetune.json").read_text())["metrics"]
    for part in (
        "base_model: them/tiny",
        "# LoRA adapter for tiny",
        "Trained on 48 queries",
        "library_name: sentence-transformers",
        'LoraEmbedding("me/handbook")',
        'SentenceTransformer("me/handbook")',
        *(f"{metrics[which]['ndcg@10']:.3f}" for which in ("base", "tuned")),
    ):
        assert part in card, part
    everything = b"".join(files.values()).decode(errors="replace")
    assert str(adapter.parent) not in everything, "no local paths"
    assert "/tmp/" not in everything


def test_a_merged_adapter_is_pushed_without_the_paths_of_its_parents(hub, adapter, base, tmp_path):
    merge_adapters([adapter], tmp_path / "merged", weights=[0.5])
    done = push(tmp_path / "merged", "me/merged", hub, tmp_path / "cache", base_model=base)
    assert done.returncode == 0, done.stderr
    files = hub.commits["me/merged", done.stdout.split()[-1]]
    fingerprint = json.loads((adapter / "finetune.json").read_text())["fingerprint"]
    parent = {"path": "", "fingerprint": fingerprint, "weight": 0.5}
    assert json.loads(files["finetune.json"])["parents"] == [parent]
    assert f"Merged from 0.5 x {fingerprint[:12]}" in files["README.md"].decode()
    assert str(adapter.parent) not in b"".join(files.values()).decode(errors="replace")


def test_an_edited_model_card_and_other_files_of_the_user_stay(hub, adapter, base, tmp_path):
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
    assert pushed == {*manifest["files"], "finetune.json", "README.md"}, "no other files of the user"


def test_an_invalid_push_is_refused_before_any_request(hub, adapter, tiny_model, tmp_path):
    requests = len(hub.requests)
    with pytest.raises(ConfigError, match="base_model="):
        push_to_hub(adapter, "me/none")
    for wrong in ("", "/home/me/base", "~/base", "./base", "C:\\base", str(tiny_model)):
        with pytest.raises(ConfigError, match="Hub id"):
            push_to_hub(adapter, "me/none", base_model=wrong)
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_config.json").write_text("{}")
    for path in (broken, tiny_model, tmp_path / "nowhere"):
        with pytest.raises(AdapterError):
            push_to_hub(path, "me/none", base_model="them/tiny")
    assert len(hub.requests) == requests


def test_a_hub_that_refuses_or_is_offline_raises_hub_error(hub, adapter, base, tmp_path):
    refused = push(adapter, "me/other", hub, tmp_path / "cache", token="hf_wrong", base_model=base)
    assert "HubError: got no commit to 'me/other'" in refused.stderr
    assert ("me/other", "main") not in hub.heads
    with pytest.raises(HubError, match="OfflineModeIsEnabled"):
        push_to_hub(adapter, "me/other", base_model=base)  # this process is offline
    with pytest.raises(HubError, match="not/a/name"):
        push_to_hub(adapter, "not/a/name", base_model=base)
    missing = run_in_process(
        "from llama_index_lora_embed import LoraEmbedding\nLoraEmbedding('me/nothing')", hub, tmp_path
    )
    assert ModelNotFoundError.__name__ in missing.stderr
    assert "me/nothing" in missing.stderr
