"""The base as installed is a candidate and the row "base", where a run reads texts otherwise than it does."""

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LabelledPairs, LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import DeviceMemoryError
from llama_index_lora_embed.evaluation import Verdict, evaluate_pairs
from tests.conftest import make_dataset, make_engine, make_tiny_model
from tests.helpers.long_passages import long_passages
from tests.helpers.training import stop_at

VAL = {answer: long_passages(answer, seed=1) for answer in ("first", "last")}
NO_GAIN = {"learning_rate": 1e-12, "epochs": 1}


@pytest.fixture(scope="module")
def short_model(tmp_path_factory):
    """A base that reads 32 tokens and has positions for 64."""
    return str(make_tiny_model(tmp_path_factory.mktemp("short"), max_seq_length=32))


def run(model, path, answer, **kwargs):
    settings = {"precision": "fp32", "val_dataset": VAL[answer], **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_engine(model, path, long_passages(answer), **settings).finetune()


def vectors(model, answer):
    return np.array(model.get_text_embedding_batch(list(VAL[answer].corpus.values())))


def metrics(answer, *path, **loading):
    return evaluate_retrieval(LoraEmbedding(*path, device="cpu", **loading), VAL[answer]).metrics


def pairs_of(dataset):
    """Each query with its passage, and with the one before it."""
    ids = list(dataset.corpus)
    rows = [(text, ids.index(dataset.relevant_docs[i][0])) for i, text in dataset.queries.items()]
    pairs = [(text, dataset.corpus[ids[row - wrong]], 1.0 - wrong) for wrong in (0, 1) for text, row in rows]
    return LabelledPairs(*map(list, zip(*pairs, strict=True)))


def least_cosine(left, right):
    return float((left * right).sum(axis=1).min())


def test_if_a_longer_length_gains_nothing_the_vectors_of_the_installed_base_are_written(short_model, tmp_path):
    result = run(short_model, tmp_path / "a", "first", **NO_GAIN)
    assert (result.best_step, result.max_seq_length, result.truncation.length_after) == (0, 32, 56)
    base = LoraEmbedding(base_model=short_model, device="cpu")
    assert (
        least_cosine(vectors(LoraEmbedding(tmp_path / "a", device="cpu"), "first"), vectors(base, "first")) > 1 - 1e-6
    )
    written, plain = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "a", short_model))
    texts = list(VAL["first"].corpus.values())
    assert least_cosine(written.encode(texts), plain.encode(texts)) > 1 - 1e-6
    assert written.max_seq_length == 32
    assert "gives the vectors of the base as installed" in result.summary
    assert result.tuned_metrics == result.base_metrics == pytest.approx(metrics("first", base_model=short_model))
    assert result.base_change.metrics["ndcg@10"] < result.base_metrics["ndcg@10"]


def test_a_longer_length_that_gains_is_written_and_named_and_has_a_verdict_of_its_own(short_model, tmp_path):
    result = run(short_model, tmp_path / "a", "last", **NO_GAIN)
    assert (result.best_step, result.max_seq_length) == (0, 56)
    assert result.base_metrics == pytest.approx(metrics("last", base_model=short_model))
    assert result.tuned_metrics == result.base_change.metrics == pytest.approx(metrics("last", tmp_path / "a"))
    assert result.verdict is result.base_change.comparison.verdict is result.compare().verdict is Verdict.BETTER
    assert "Training gained nothing; the adapter gives the vectors of the base with 56 tokens" in result.summary


@pytest.mark.slow
def test_the_three_rows_are_in_the_result_its_text_the_manifest_the_card_and_the_report(short_model, tmp_path):
    result = run(short_model, tmp_path / "a", "last")
    assert result.best_step > 0
    assert result.base_metrics["ndcg@10"] < result.base_change.metrics["ndcg@10"] < result.tuned_metrics["ndcg@10"]
    assert result.comparison.difference == pytest.approx(
        result.tuned_metrics["ndcg@10"] - result.base_metrics["ndcg@10"]
    ), "the verdict is on the base as installed"
    rows = ["base", "base, 56 tokens", "tuned"]
    shown = [line for line in str(result).splitlines() if line.startswith(("base ", "base, 56 tokens ", "tuned "))]
    assert [line.partition("  ")[0] for line in shown] == rows
    own = "base, 56 tokens, against the base as installed: BETTER on 48 human-written queries"
    manifest = json.loads((tmp_path / "a" / "finetune.json").read_text())
    assert list(manifest["metrics"]) == rows
    card, page = (tmp_path / "a" / "README.md").read_text(), result.write_report().read_text(encoding="utf-8")
    for text in (str(result), manifest["base_change"], card, page):
        assert own in text
    values = [f"{metrics['ndcg@10']:.3f}" for metrics in manifest["metrics"].values()]
    assert all(value in card and value in page for value in values)
    assert "<td>base, 56 tokens</td>" in page


def test_a_step_that_beats_the_changed_base_but_not_the_installed_one_is_not_kept(short_model, tmp_path):
    result = run(short_model, tmp_path / "a", "first", learning_rate=4e-3, epochs=2)
    first, *later = (entry["metrics"]["ndcg@10"] for entry in result.history)
    assert first < max(later) < result.base_metrics["ndcg@10"]
    assert (result.best_step, result.max_seq_length) == (0, 32)


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "learning_rate", "kept"), [("first", 1e-12, 0), ("last", 5e-3, 12)])
def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(
    short_model, tmp_path, monkeypatch, answer, learning_rate, kept
):
    whole = run(short_model, tmp_path / "whole", answer, learning_rate=learning_rate)
    again = partial(run, short_model, tmp_path / "again", answer, learning_rate=learning_rate)
    stop_at(monkeypatch, 7, again)
    resumed = again(resume_from_checkpoint=True)
    assert whole.best_step == kept
    for name in ("fingerprint", "base_metrics", "tuned_metrics", "base_change", "best_step", "summary"):
        assert getattr(resumed, name) == getattr(whole, name), name


@pytest.mark.parametrize("answer", ["first", "last"])
def test_windows_are_a_change_of_the_base_too(short_model, tmp_path, answer):
    result = run(short_model, tmp_path / "a", answer, window=32, **NO_GAIN)
    assert result.base_change.name == "base, windows of 32 tokens"
    assert result.base_metrics == pytest.approx(metrics(answer, base_model=short_model))
    assert result.base_change.metrics == pytest.approx(metrics(answer, base_model=short_model, window=32))
    assert result.tuned_metrics == pytest.approx(metrics(answer, tmp_path / "a"))
    wins = answer == "last"
    base = LoraEmbedding(base_model=short_model, device="cpu", window=32 if wins else None)
    assert least_cosine(vectors(LoraEmbedding(tmp_path / "a", device="cpu"), answer), vectors(base, answer)) > 1 - 1e-6
    assert ("JoinWindows" in (tmp_path / "a" / "modules.json").read_text()) == wins
    if not wins:  # a directory that plain sentence-transformers loads
        texts = list(VAL[answer].corpus.values())
        written, plain = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "a", short_model))
        assert least_cosine(written.encode(texts), plain.encode(texts)) > 1 - 1e-6


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"query_prompt": "passage query : "}, "base, other prompts"),
        ({"pooling": "cls"}, "base, cls pooling"),
        ({"pooling": "cls", "passage_prompt": "passage : "}, "base, cls pooling, other prompts"),
    ],
)
def test_prompts_and_pooling_of_the_run_are_a_change_of_the_base_too(tiny_model, tmp_path, change, name):
    val = make_dataset(passages=10, seed=7, prefix="v")
    with pytest.warns(UserWarning, match="raining gained nothing"):
        result = make_engine(tiny_model, tmp_path / "a", **NO_GAIN, **change, precision="fp32").finetune()
    installed = LoraEmbedding(base_model=tiny_model, device="cpu")
    changed = LoraEmbedding(base_model=tiny_model, device="cpu", **change)
    written = LoraEmbedding(tmp_path / "a", device="cpu")
    assert result.base_change.name == name
    assert result.base_metrics == pytest.approx(evaluate_retrieval(installed, val).metrics, abs=1e-6)
    assert result.base_change.metrics == pytest.approx(evaluate_retrieval(changed, val).metrics, abs=1e-6)
    better = changed if result.base_change.metrics["ndcg@10"] > result.base_metrics["ndcg@10"] else installed
    for embed in ("get_query_embedding", "get_text_embedding"):
        left, right = (np.array(getattr(model, embed)("w1 w2 w3")) for model in (written, better))
        assert left @ right > 1 - 1e-6, embed


def test_the_pooling_given_for_files_that_name_none_is_the_bases_own(tiny_model, tmp_path):
    bare = Path(tiny_model).parent / "transformer"
    with pytest.warns(UserWarning, match="gives the vectors of the base"):
        result = make_engine(bare, tmp_path / "a", pooling="cls", precision="fp32", **NO_GAIN).finetune()
    assert result.base_change is None
    base = LoraEmbedding(base_model=bare, pooling="cls", device="cpu")
    assert result.base_metrics == pytest.approx(evaluate_retrieval(base, make_dataset(10, 7, "v")).metrics, abs=1e-6)


@pytest.mark.slow
def test_labelled_pairs_have_the_three_rows_too(short_model, tmp_path):
    train, val = (pairs_of(long_passages("last", passages=30, seed=seed)) for seed in (2, 3))
    result = make_engine(short_model, tmp_path / "a", train, val_dataset=val, precision="fp32", epochs=1).finetune()
    installed, longer = (LoraEmbedding(base_model=short_model, device="cpu") for _ in range(2))
    longer.sentence_transformer.max_seq_length = result.truncation.length_after
    assert result.base_metrics == pytest.approx(evaluate_pairs(installed, val).metrics, abs=1e-6)
    assert result.base_change.metrics == pytest.approx(evaluate_pairs(longer, val).metrics, abs=1e-6)
    assert str(result.base_change) in result.write_report().read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "length"), [("first", 32), ("last", 56)])
def test_rounds_of_mining_share_one_base(short_model, tmp_path, answer, length):
    result = run(short_model, tmp_path / "a", answer, mining=MiningSettings(num_negatives=1, rounds=2), **NO_GAIN)
    assert (result.best_step, result.max_seq_length) == (0, length)
    assert result.base_metrics == pytest.approx(metrics(answer, base_model=short_model))
    assert len(result.history) == 3


@pytest.mark.slow
def test_of_an_adapter_for_queries_the_base_as_installed_has_its_own_query_prompt(tiny_model, tmp_path):
    val, change = make_dataset(passages=10, seed=7, prefix="v"), {"query_prompt": "passage query : "}
    settings = {"tune": "query", "precision": "fp32"}
    parent = make_engine(tiny_model, tmp_path / "parent", **settings).finetune()
    assert parent.best_step > 0
    further = {**settings, **NO_GAIN, "continue_from": str(tmp_path / "parent")}
    for more, installed in (({}, {"base_model": tiny_model}), (further, {"adapter_path": tmp_path / "parent"})):
        result = make_engine(tiny_model, tmp_path / "a", **{**settings, **NO_GAIN, **more}, **change).finetune()
        own = evaluate_retrieval(LoraEmbedding(**installed, device="cpu"), val).metrics
        assert result.base_metrics == pytest.approx(own, abs=1e-6)
        assert result.base_change.name == "base, other prompts"
        written = evaluate_retrieval(LoraEmbedding(tmp_path / "a", device="cpu"), val).metrics
        assert result.tuned_metrics == pytest.approx(written, abs=1e-6)


@pytest.mark.parametrize("same", [{}, {"pooling": "mean"}, {"query_prompt": ""}, {"max_seq_length": 20}])
def test_where_nothing_differs_there_is_one_row_and_no_further_evaluation(tiny_model, tmp_path, same, monkeypatch):
    """A longer length that no validation text needs differs in nothing that was evaluated, but is not written."""
    from llama_index_lora_embed.engines import evaluator

    calls, evaluate = [], evaluator.evaluate_model
    monkeypatch.setattr(evaluator, "evaluate_model", lambda *args, **more: calls.append(1) or evaluate(*args, **more))
    with pytest.warns(UserWarning, match="gives the vectors of the base"):
        result = make_engine(tiny_model, tmp_path / "a", **NO_GAIN, **same).finetune()
    assert result.base_change is None
    assert len(calls) == len(result.history) == 2
    assert result.max_seq_length == 16
    assert "base," not in str(result)


@pytest.mark.slow
def test_an_adapter_that_is_continued_is_the_base_as_it_was_saved(short_model, tmp_path):
    run(short_model, tmp_path / "parent", "first", max_seq_length=32)
    parent = LoraEmbedding(tmp_path / "parent", device="cpu")
    of_parent = evaluate_retrieval(parent, VAL["first"]).metrics
    child = {"continue_from": str(tmp_path / "parent"), "max_seq_length": 56, "query_prompt": "query : "}
    result = run(short_model, tmp_path / "child", "first", **child, **NO_GAIN)
    assert result.base_change.name == "base, 56 tokens, other prompts"
    assert result.base_metrics == result.tuned_metrics == pytest.approx(of_parent, abs=1e-6)
    assert "gives the vectors of the adapter that it continues as it was saved" in result.summary
    written = LoraEmbedding(tmp_path / "child", device="cpu")
    assert written.fingerprint == parent.fingerprint
    assert least_cosine(vectors(written, "first"), vectors(parent, "first")) > 1 - 1e-6


@pytest.mark.parametrize("change", [{"pooling": "cls"}, {"window": 16}], ids=["pooling", "windows"])
def test_a_base_beside_the_run_s_shares_its_weights_so_that_a_device_holds_them_once(tiny_model, tmp_path, change):
    model, _, _, installed = make_engine(tiny_model, tmp_path / "a", **change)._run.load()
    model.add_adapter(LoraConfig(target_modules="all-linear", task_type="FEATURE_EXTRACTION"))
    with installed.within(model) as own:
        assert own is not model
        shared = {tensor.data_ptr() for tensor in model.parameters()}
        assert all(tensor.data_ptr() in shared for tensor in own.parameters())
        texts = ["w1 w2 w3", "w4"]
        plain = SentenceTransformer(str(tiny_model), device="cpu").encode(texts)
        assert np.abs(own.encode(texts) - plain).max() < 1e-6
        assert np.abs(model.encode(texts) - plain).max() > 1e-3 or "window" in change
    with torch.no_grad():  # a weight of its own, as of a base in 4 bit
        next(model.parameters()).add_(1.0)
    with installed.within(model) as own:
        assert np.abs(own.encode(texts) - plain).max() < 1e-6

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    def load(**kwargs):
        own = installed.load(**kwargs)
        own.to = full
        return own

    with (
        pytest.raises(DeviceMemoryError, match=r"beside the base of the run .*20 MiB(.|\n)*quantized=False"),
        replace(installed, load=load).within(model),
    ):
        pass
