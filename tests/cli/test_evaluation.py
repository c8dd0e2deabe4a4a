"""`eval`, `compare` and `report` beside the functions that they call."""

import shutil
from pathlib import Path

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, compare_retrieval, evaluate_retrieval
from llama_index_lora_embed.evaluation import evaluate_pairs
from tests.helpers.cli import lora_embed, result_of


def test_eval_has_the_metrics_of_evaluate_retrieval_for_adapter_and_base(workplace):
    val = EmbeddingQAFinetuneDataset.from_json("val.json")
    for place, model in (("runs/handbook", LoraEmbedding("runs/handbook")), ("base", LoraEmbedding(base_model="base"))):
        assert result_of(f"eval {place} val.json")["metrics"] == evaluate_retrieval(model, val).metrics
    assert "20 queries (20 human) over 10 passages" in lora_embed("eval base val.json").stdout


def test_eval_reads_labelled_pairs(workplace):
    found = result_of("eval base pairs.csv --kind pairs")
    assert found["metrics"] == evaluate_pairs(LoraEmbedding(base_model="base"), "pairs.csv").metrics


def test_compare_takes_the_adapters_own_base(workplace):
    val = EmbeddingQAFinetuneDataset.from_json("val.json")
    expected = compare_retrieval(LoraEmbedding(base_model="base"), LoraEmbedding("runs/handbook"), val)
    found = result_of("compare runs/handbook val.json --require better")
    assert found["comparison"]["verdict"] == expected.verdict.value == "BETTER"
    assert found["comparison"]["interval"] == list(expected.comparison.interval)


def test_compare_ends_with_3_where_the_model_is_worse(workplace):
    line = "compare base val.json --base runs/handbook"
    assert result_of(line)["comparison"]["verdict"] == "WORSE"
    for requirement in ("better", "no-worse"):
        done = lora_embed(f"{line} --require {requirement}")
        assert done.exit_code == 3
        assert done.stdout.startswith("WORSE on 20 human-written queries")
        assert f"below --require {requirement}" in done.stderr


def test_compare_on_labelled_pairs(workplace):
    found = result_of("compare runs/handbook pairs.csv --kind pairs")
    assert found["evidence"] == "labelled pairs"
    assert found["metric"] == "roc_auc"


def test_compare_asks_for_a_base_where_a_model_names_none(workplace):
    done = lora_embed("compare base val.json")
    assert done.exit_code == 1
    assert "--base" in done.stderr


def test_a_report_is_a_page_about_the_run(workplace):
    found = result_of("report runs/handbook val.json --output pages/report.html")
    page = Path(found["report"]).read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "BETTER" in page
    assert "learning rate" in page  # of the manifest


def test_a_report_works_without_a_manifest(workplace):
    shutil.copytree("runs/handbook", "runs/bare")
    Path("runs/bare/finetune.json").unlink()
    assert result_of("report runs/bare val.json --base base")["comparison"]["queries"] == 20


@pytest.mark.parametrize("place", ["nowhere", "./nowhere", "val.json"])
def test_a_model_that_is_not_there_is_an_error_with_its_hint(workplace, place):
    done = lora_embed(f"eval {place} val.json")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: got model") or done.stderr.startswith("error: got")
    assert "expected a folder or a model id on the Hub" in done.stderr or "expected the folder or Hub id" in done.stderr
