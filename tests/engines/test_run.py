"""`run_finetune`: the same run as the engine's, from a configuration file and data by reference."""

import json

import pytest
from peft import LoraConfig
from safetensors.numpy import load_file

from llama_index_lora_embed import FinetuneConfig, LoraEmbedding, LoraFinetuneEngine, run_finetune
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, SplitError
from llama_index_lora_embed.data import GeneratedQuery
from llama_index_lora_embed.data.readers.nodes import read_nodes
from llama_index_lora_embed.engines.run import run_of
from tests.conftest import make_dataset, make_engine
from tests.helpers.llms import FakeLLM


def configuration(tmp_path, tiny_model, data, more=""):
    (tmp_path / "run.yaml").write_text(f"""
data: {json.dumps(data)}
base: {{model_id: {tiny_model}}}
training: {{batch_size: 8, epochs: 4, learning_rate: 5e-3, show_progress_bar: false, device: cpu}}
output: {{model_output_path: {tmp_path / "from_file"}}}
{more}
""")
    return FinetuneConfig.from_file(tmp_path / "run.yaml")


def weights(path):
    return {name: tensor.tobytes() for name, tensor in load_file(path / "adapter_model.safetensors").items()}


def test_a_configuration_file_trains_what_the_engine_trains(tiny_model, tmp_path):
    make_dataset().save_json(str(tmp_path / "train.json"))
    make_dataset(passages=10, seed=7, prefix="v").save_json(str(tmp_path / "val.json"))
    data = {"dataset": str(tmp_path / "train.json"), "val_dataset": str(tmp_path / "val.json")}
    result = run_finetune(configuration(tmp_path, tiny_model, data, "lora_config: {lora_alpha: 16}"))
    engine = make_engine(tiny_model, tmp_path / "engine", lora_config=LoraConfig(lora_alpha=16))
    expected = engine.finetune()
    assert weights(tmp_path / "from_file") == weights(tmp_path / "engine")
    assert result.tuned_metrics == expected.tuned_metrics
    manifests = [json.loads((tmp_path / n / "finetune.json").read_text()) for n in ("from_file", "engine")]
    assert manifests[0]["settings"] == manifests[1]["settings"]
    assert engine.config.digest() == run_of(FinetuneConfig.from_file(tmp_path / "run.yaml")).config.digest()
    assert LoraEmbedding(tmp_path / "from_file").fingerprint == result.fingerprint


def test_given_data_replaces_the_data_of_the_configuration(tiny_model, tmp_path):
    config = configuration(tmp_path, tiny_model, {"dataset": "not/there.json"})
    with pytest.warns(UserWarning, match="NO CLEAR DIFFERENCE"):
        result = run_finetune(config, dataset=make_dataset(), val_dataset=make_dataset(passages=4, seed=9, prefix="v"))
    assert result.adapter_path == str(tmp_path / "from_file")


def test_labelled_pairs_are_read_from_a_file(tiny_model, tmp_path):
    rows = [f"w{n} w{n + 50},w{n + 100} w{n + 150},{n % 2}" for n in range(40)]
    (tmp_path / "pairs.csv").write_text("text1,text2,label\n" + "\n".join(rows))
    config = configuration(tmp_path, tiny_model, {"dataset": str(tmp_path / "pairs.csv"), "kind": "pairs"})
    with pytest.warns(UserWarning, match="NO CLEAR DIFFERENCE"):
        result = run_finetune(config)
    assert "roc_auc" in result.base_metrics


@pytest.mark.parametrize("data", [{}, {"dataset": "a.json", "nodes": "b"}])
def test_a_run_without_data_or_with_two_kinds_is_refused(tiny_model, tmp_path, data):
    with pytest.raises(ConfigError, match=r"data\.dataset="):
        run_finetune(configuration(tmp_path, tiny_model, data))


def test_nodes_by_reference_get_the_defaults_for_synthetic_queries(tiny_model, tmp_path, nodes):
    (tmp_path / "nodes.jsonl").write_text("".join(node.to_json() + "\n" for node in nodes))
    data = {"nodes": str(tmp_path / "nodes.jsonl"), "query_generators": [{"kind": "title"}], "val_fraction": 0.3}
    (tmp_path / "run.yaml").write_text(f"""
data: {json.dumps(data)}
base: {{model_id: {tiny_model}}}
training: {{show_progress_bar: false, device: cpu, seed: 5}}
output: {{model_output_path: {tmp_path / "from_file"}}}
""")
    with pytest.warns(UserWarning, match="fewer than 10"):
        result = run_finetune(FinetuneConfig.from_file(tmp_path / "run.yaml"))
    settings = json.loads((tmp_path / "from_file" / "finetune.json").read_text())["settings"]
    assert (settings["epochs"], settings["learning_rate"], settings["seed"]) == (1, 5e-4, 5)
    assert (settings["adapter_scale"], settings["length_coverage"]) == (0.5, 0.5)
    assert result.data_report is not None


def test_a_folder_of_documents_becomes_nodes(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.md").write_text(f"# Title {number}\n\nText of document {number}.")
    assert {node.ref_doc_id.rpartition("/")[2].partition(".")[0] for node in read_nodes(tmp_path)} == {"0", "1", "2"}


def test_a_source_without_nodes_is_reported(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nodes.jsonl").write_text('{"text": "fine", "id_": "a"}\nno json\n')
    for path, said in (
        ("empty", "empty"),
        ("nodes.jsonl", "line 2"),
        ("nowhere", "not there"),
        ("run.txt", "not there"),
    ):
        with pytest.raises(DatasetError, match=said):
            read_nodes(tmp_path / path)


def test_with_an_llm_the_queries_are_its_own_and_its_answers_are_kept_beside_the_output(tiny_model, tmp_path, nodes):
    llm = FakeLLM()
    arguments = {"device": "cpu", "show_progress_bar": False, "filters": None, "val_fraction": 0.3}
    engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, str(tmp_path / "run"), llm=llm, **arguments)
    assert {origin.partition("/")[0] for origin in engine.dataset.query_origins.values()} == {"llm"}
    assert (tmp_path / "run.queries.jsonl").exists()
    calls = llm.calls
    LoraFinetuneEngine.from_nodes(nodes, tiny_model, str(tmp_path / "run"), llm=llm, **arguments)
    assert llm.calls == calls, "no answer is paid for twice"


def test_generators_by_reference_that_cannot_be_made_are_all_named_by_their_path(tiny_model, tmp_path, nodes):
    wrong = [
        ({"kind": "llm"}, "data.query_generators[0]: 'llm' without an LLM"),
        ({"kind": "title", "options": {"n": 1, "max_words": 0}}, "data.query_generators[1].options: n: unknown"),
        ({"kind": "query_log"}, "data.query_generators[2].options: "),
        ({"kind": "query_log", "options": {"source": "log.csv", "colums": {}}}, "did you mean 'columns'"),
    ]
    generators = [generator for generator, _ in wrong]
    config = configuration(tmp_path, tiny_model, {"query_generators": [*generators, {"kind": "title"}]})
    with pytest.raises(ConfigError) as caught:
        run_finetune(config, nodes=nodes)
    assert len(caught.value.problems) == 5
    for _, said in wrong:
        assert said in str(caught.value)
    assert "missing 1 required positional argument: 'source'" in caught.value.problems[3]


def test_nodes_of_one_document_cannot_be_held_out(tiny_model, tmp_path, nodes):
    with pytest.raises(SplitError):
        run_finetune(configuration(tmp_path, tiny_model, {}), nodes=nodes[:2])


def test_lora_fields_that_peft_refuses_are_named(tiny_model, tmp_path):
    config = configuration(tmp_path, tiny_model, {}, "lora_config: {rank: 8}")
    with pytest.raises(ConfigError, match="rank"):
        run_finetune(config, dataset=make_dataset())
    assert not (tmp_path / "from_file").exists()


@pytest.mark.parametrize(
    ("name", "written"),
    [("llm", True), ("llm or title or lead", True), ("human", True), ("metadata", True), ("title or lead", False)],
)
def test_queries_that_somebody_wrote_are_trained_with_the_defaults_of_labelled_data(
    tiny_model, tmp_path, nodes, name, written
):
    class Named:
        def generate(self, nodes, *, seed=0):
            return [GeneratedQuery(f"w{n} w{n + 3}", node.node_id, "title") for n, node in enumerate(nodes)]

    Named.name = name
    engine = LoraFinetuneEngine.from_nodes(
        nodes, tiny_model, str(tmp_path / "run"), query_generators=[Named()], filters=None, val_fraction=0
    )
    training = engine.config.training
    assert (training.epochs, training.adapter_scale) == ((4, 1.0) if written else (1, 0.5))
