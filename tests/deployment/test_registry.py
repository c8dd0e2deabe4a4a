import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llama_index_lora_embed import LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.core.errors import AdapterError, ConfigError, DatasetError, OutputDirectoryError
from llama_index_lora_embed.deployment import RunRegistry
from llama_index_lora_embed.evaluation.report import plots
from llama_index_lora_embed.evaluation.retrieval import evaluation_digest
from tests.conftest import make_dataset
from tests.helpers.evaluation import noisy_evaluation


@pytest.fixture(scope="module")
def many():
    return make_dataset(passages=100)


@pytest.fixture
def registry(adapter, many, tmp_path):
    """Three versions, the second better and the third worse than the first; v1 is promoted."""
    registry = RunRegistry(tmp_path / "registry")
    for noise in (1.0, 0.6, 3.0):
        registry.add(adapter, dataset=many, evaluation=noisy_evaluation(noise, many))
    registry.promote("v1")
    return registry


def test_versions_are_listed_and_shown(registry, adapter, many):
    assert [v.name for v in registry.list()] == ["v1", "v2", "v3"]
    assert RunRegistry(registry.path).list() == registry.list(), "all of it is on disk"
    shown = registry.show("v1")
    manifest = json.loads((adapter / "finetune.json").read_text())
    for part in (manifest["fingerprint"], manifest["verdict"], str(adapter), evaluation_digest(many), "ndcg@10"):
        assert part in shown
    assert ["promoted", "yes"] in [line.split() for line in shown.splitlines()]
    assert ["promoted", "no"] in [line.split() for line in registry.show("v2").splitlines()]
    table = registry.table()
    assert [row[0] for row in table.rows] == ["v1 (promoted)", "v2", "v3"]
    assert registry.promoted().name == "v1"
    with pytest.raises(ConfigError, match="one of: v1, v2, v3"):
        registry.show("v9")


def test_a_version_is_evaluated_when_it_is_added(adapter, tmp_path):
    registry, dataset = RunRegistry(tmp_path / "r"), make_dataset(passages=10, seed=7, prefix="v")
    version = registry.add(adapter, dataset=dataset, embed_model=LoraEmbedding(adapter, device="cpu"), name="first")
    assert version.metrics == evaluate_retrieval(LoraEmbedding(adapter, device="cpu"), dataset).metrics
    assert version.evaluated_on == evaluation_digest(dataset)
    assert registry.add(adapter).metrics == {}


def test_the_gate_refuses_a_worse_version(registry):
    assert registry.gate("v2")
    assert registry.gate("v2").comparison.difference > 0
    assert registry.gate("v1").passed, "the promoted version is no worse than itself"
    refused = registry.gate("v3")
    assert not refused
    assert str(refused).startswith("NOT PASSED: v3 against the promoted version v1: WORSE on ")
    assert registry.gate("v3", tolerance=1.0)
    registry.promote("v3")
    assert registry.promoted().name == "v3"
    assert registry.gate("v1")
    for wrong in (-1, 2, True, "x"):
        with pytest.raises(ConfigError, match="tolerance"):
            registry.gate("v1", tolerance=wrong)


def test_the_gate_refuses_a_version_with_too_little_evidence(adapter, tmp_path):
    registry, few = RunRegistry(tmp_path / "r"), make_dataset(passages=8)
    rng = np.random.default_rng(0)
    for _ in range(2):
        evaluation = noisy_evaluation(2.0, few, seed=int(rng.integers(100)))
        registry.add(adapter, dataset=few, evaluation=evaluation)
    registry.promote("v1")
    gate = registry.gate("v2")
    assert gate.comparison.interval[0] < -0.01
    assert not gate
    assert RunRegistry(tmp_path / "empty").promoted() is None
    fewer = make_dataset(passages=4)
    for _ in range(2):
        registry.add(adapter, dataset=fewer, evaluation=noisy_evaluation(1.0, fewer))
    registry.promote("v3")
    gate = registry.gate("v4", tolerance=1)
    assert not gate
    assert "A verdict needs at least 10 queries" in gate.reason


def test_the_first_version_passes_and_one_evaluated_on_other_data_cannot_be_compared(registry, adapter, tmp_path):
    fresh = RunRegistry(tmp_path / "fresh")
    fresh.add(adapter)
    assert str(fresh.gate("v1")) == "PASSED: no version is promoted yet"
    other = make_dataset(passages=20)
    registry.add(adapter, dataset=other, evaluation=noisy_evaluation(1.0, other))
    with pytest.raises(DatasetError, match="both evaluated on the same dataset"):
        registry.gate("v4")
    compared = registry.compare("v1", "v4")
    assert compared.metrics is None
    assert "evaluated on different datasets" in str(compared)


def test_two_versions_are_compared_with_what_changed(registry, adapter, many, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    manifest = json.loads((changed / "finetune.json").read_text())
    manifest["settings"]["epochs"] = 99
    (changed / "finetune.json").write_text(json.dumps(manifest))
    registry.add(changed, dataset=many, evaluation=noisy_evaluation(0.6, many), name="more-epochs")
    compared = registry.compare("v1", "more-epochs")
    assert compared.changed == {"settings.epochs": (6, 99)}
    assert compared.metrics["ndcg@10"].difference > 0
    assert "settings.epochs: 6 -> 99" in str(compared)
    assert registry.compare("v1", "v2").changed == {}


def test_a_version_reports_a_replaced_or_removed_directory(adapter, tmp_path):
    path = tmp_path / "adapter"
    shutil.copytree(adapter, path)
    registry = RunRegistry(tmp_path / "r")
    assert registry.add(path).status == "there"
    manifest = json.loads((path / "finetune.json").read_text())
    (path / "finetune.json").write_text(json.dumps(manifest | {"fingerprint": "0" * 64}))
    assert registry.list()[0].status == "replaced"
    for ask in (registry.promote, registry.gate):
        with pytest.raises(AdapterError, match="holds another model than v1"):
            ask("v1")
    (path / "finetune.json").write_text("{")
    assert registry.list()[0].status == "replaced"
    shutil.rmtree(path)
    assert registry.list()[0].status == "gone"
    assert ["directory", "gone"] in [line.split() for line in registry.show("v1").splitlines()]


def test_the_trend_covers_versions_evaluated_on_the_latest_dataset(registry, adapter, many, tmp_path):
    other = make_dataset(passages=20)
    registry.add(adapter, dataset=other, evaluation=noisy_evaluation(1.0, other), name="elsewhere")
    registry.add(adapter, dataset=many, evaluation=noisy_evaluation(0.5, many), name="last")
    figure = registry.trend()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["v1", "v2", "v3", "last"]
    assert len(plots.png(figure)) > 5000
    with pytest.raises(ConfigError, match="no version with"):
        RunRegistry(tmp_path / "none").trend()


def test_a_line_that_was_cut_short_is_skipped(registry, adapter):
    index = registry.path / "versions.jsonl"
    with open(index, "a") as file:
        file.write('{"event": "add", "name": "v4", "pa')
    before = index.read_text()
    assert len(registry.list()) == 3
    registry.add(adapter)
    assert [v.name for v in registry.list()] == ["v1", "v2", "v3", "v4"]
    assert index.read_text().startswith(before), "nothing is rewritten"


def test_a_registry_of_an_earlier_release_is_read(registry):
    index = registry.path / "versions.jsonl"
    text = index.read_text().replace('"evaluated_on"', '"judged_on"').replace('"promote"', '"use"')
    assert "judged_on" in text
    assert '"use"' in text
    versions = registry.list()
    index.write_text(text)
    assert registry.list() == versions
    assert registry.promoted().name == "v1"
    assert registry.gate("v2")


def test_concurrent_additions_get_distinct_names(adapter, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: RunRegistry(tmp_path / "r").add(adapter), range(24)))
    assert sorted(v.name for v in RunRegistry(tmp_path / "r").list()) == sorted(f"v{i}" for i in range(1, 25))


def test_invalid_additions_are_refused(registry, adapter, many, tiny_model, tmp_path):
    with pytest.raises(AdapterError, match=r"finetune\.json"):
        registry.add(tiny_model)
    with pytest.raises(ConfigError, match="which is taken"):
        registry.add(adapter, name="v1")
    with pytest.raises(ConfigError, match="which is taken"):
        registry.add(adapter, name="V1")
    for wrong in ("a/b", "", "a b", 5, ".."):
        with pytest.raises(ConfigError, match="letters, digits"):
            registry.add(adapter, name=wrong)
    with pytest.raises(ConfigError, match="without its dataset"):
        registry.add(adapter, evaluation=noisy_evaluation(1.0, many))
    with pytest.raises(DatasetError, match="other queries"):
        registry.add(adapter, dataset=make_dataset(), evaluation=noisy_evaluation(1.0, many))
    larger = many.model_copy(update={"corpus": {**many.corpus, "more": "w1"}})
    with pytest.raises(DatasetError, match="other queries or passages"):
        registry.add(adapter, dataset=larger, evaluation=noisy_evaluation(1.0, many))
    with pytest.raises(TypeError, match="datset"):
        registry.add(adapter, datset=many)
    (registry.path / "evaluations" / "v2.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be read"):
        registry.gate("v2")
    with pytest.raises(OutputDirectoryError, match="cannot be written"):
        RunRegistry(__file__).add(adapter)
    assert len(registry.list()) == 3
