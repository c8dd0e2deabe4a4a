import inspect
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_index.core.base.embeddings.base import BaseEmbedding
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from llama_index_lora_embed import (
    EmbeddingQAFinetuneDataset,
    LoraEmbedding,
    LoraFinetuneEngine,
    evaluate_retrieval,
)
from llama_index_lora_embed.core.errors import (
    ConfigError,
    DatasetError,
)
from llama_index_lora_embed.evaluation import Verdict
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.conftest import make_dataset
from tests.engines.conftest import QUIET, finetune
from tests.helpers.datasets import asked_differently

# -- the main line ------------------------------------------------------------------------------------


def test_the_line_from_dataset_to_embedding_model(tiny_model, dataset, val_dataset, out):
    engine, result = finetune(dataset, tiny_model, out, val_dataset=val_dataset, epochs=6, learning_rate=5e-3)
    embed_model = engine.get_finetuned_model()
    assert isinstance(embed_model, BaseEmbedding)
    assert embed_model.fingerprint == result.fingerprint == Manifest.read(out_path(result)).fingerprint
    assert result.tuned_metrics["ndcg@10"] > result.base_metrics["ndcg@10"]
    assert [entry["step"] for entry in result.history] == [0, 3, 6, 9, 12, 15, 18]
    (kept,) = [entry for entry in result.history if entry["step"] == result.best_step]
    assert result.tuned_metrics == kept["metrics"]
    assert "20 human-written queries" in result.summary
    assert result.adapter_path == out
    assert "tuned" in str(result)


def out_path(result):
    return Path(result.adapter_path)


def test_the_reported_metrics_are_those_of_the_written_adapter(tiny_model, dataset, val_dataset, out):
    _, result = finetune(dataset, tiny_model, out, val_dataset=val_dataset, epochs=4, learning_rate=5e-3)
    judged = {q: set(ids) for q, ids in val_dataset.relevant_docs.items()}
    evaluator = InformationRetrievalEvaluator(val_dataset.queries, val_dataset.corpus, judged)
    for path, metrics in ((tiny_model, result.base_metrics), (out, result.tuned_metrics)):
        measured = evaluator(SentenceTransformer(path, device="cpu"))
        assert metrics["ndcg@10"] == pytest.approx(measured["cosine_ndcg@10"], abs=1e-6)


def test_warnings_point_at_the_users_own_line(tiny_model, nodes, out):
    with pytest.warns(UserWarning, match="6 documents") as caught:
        engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, batch_size=4, epochs=1, **QUIET)
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(UserWarning, match="heuristic queries") as caught:
        engine.finetune()
    assert {warning.filename for warning in caught} == {__file__}


def test_without_validation_data_a_tenth_is_held_out_and_named(tiny_model, dataset, out):
    engine, result = finetune(dataset, tiny_model, out, learning_rate=5e-3, epochs=6)
    assert len(engine.val_dataset.queries) == 8
    assert result.verdict is not Verdict.NOT_EVALUATED
    assert "held out of the training set by source document" in result.summary
    plain = LoraFinetuneEngine(make_dataset(sources=False), tiny_model, out)
    assert "neighbouring passages may have been trained on" in plain._run.hold_out_note


def test_without_any_validation_the_result_says_not_evaluated(tiny_model, dataset, out):
    with pytest.warns(UserWarning, match="NOT EVALUATED"):
        _, result = finetune(dataset, tiny_model, out, val_fraction=0)
    assert result.verdict is Verdict.NOT_EVALUATED
    assert result.base_metrics == {}
    assert result.best_step == result.steps == 6


def test_training_that_gains_nothing_says_so_and_gives_the_base(tiny_model, dataset, val_dataset, out):
    # a rate so small that every evaluation ties with the base's, which comes first
    with pytest.warns(UserWarning, match="gained nothing"):
        engine, result = finetune(dataset, tiny_model, out, val_dataset=val_dataset, learning_rate=1e-12)
    assert result.best_step == 0
    assert result.verdict is Verdict.NO_CLEAR_DIFFERENCE
    assert result.tuned_metrics == result.base_metrics
    assert len(result.history) == 3
    texts = list(val_dataset.corpus.values())
    base = LoraEmbedding(base_model=tiny_model, device="cpu")
    tuned = engine.get_finetuned_model().get_text_embedding_batch(texts)
    assert np.abs(np.array(tuned) - np.array(base.get_text_embedding_batch(texts))).max() < 1e-6


def test_the_same_seed_gives_the_same_adapter(tiny_model, dataset, val_dataset, tmp_path):
    results = [
        finetune(dataset, tiny_model, str(tmp_path / name), val_dataset=val_dataset, seed=seed)[1]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert results[0].fingerprint == results[1].fingerprint != results[2].fingerprint


def test_a_second_run_replaces_the_adapter_and_keeps_the_first(tiny_model, dataset, val_dataset, out):
    _, first = finetune(dataset, tiny_model, out, val_dataset=val_dataset, seed=1)
    _, second = finetune(dataset, tiny_model, out, val_dataset=val_dataset, seed=2)
    assert LoraEmbedding(out).fingerprint == second.fingerprint
    assert LoraEmbedding(out + ".previous").fingerprint == first.fingerprint
    assert sorted(os.listdir(os.path.dirname(out))) == ["adapter", "adapter.previous", "adapter.run"]


def test_another_working_directory_changes_nothing(tiny_model, dataset, val_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = LoraFinetuneEngine(dataset, tiny_model, "relative", val_dataset=val_dataset, epochs=1, **QUIET)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    engine.finetune()
    assert (tmp_path / "relative" / "finetune.json").exists()
    assert engine.get_finetuned_model().max_seq_length == 16


# -- arguments ----------------------------------------------------------------------------------------


def test_the_arguments_are_those_of_the_old_engine_in_its_order():
    from llama_index.finetuning import SentenceTransformersFinetuneEngine

    old = inspect.signature(SentenceTransformersFinetuneEngine).parameters
    new = inspect.signature(LoraFinetuneEngine).parameters
    assert list(new)[: len(old)] == list(old)
    changed = {name for name in old if name != "dataset" and old[name].default != new[name].default}
    assert changed == {"batch_size", "epochs"}, "each of them explained in the docstring"
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in list(new.values())[len(old) :])
    assert {"lora_config", "learning_rate", "max_seq_length", "seed"} <= new.keys()


def test_all_wrong_arguments_are_named_at_once(tiny_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        LoraFinetuneEngine(
            {"queries": {}, "corpus": {}, "relevant_docs": {}},
            "/nowhere/at/all",
            str(tmp_path / "file"),
            batch_size=0,
            epochs=1.5,
            loss="mnrl",
            lora_config={"r": 8},
            precision="fp16",
            on_overlap="ignore",
            use_all_docs="yes",
            learning_rate=float("nan"),
        )
    text = "\n".join(caught.value.problems)
    for expected in (
        "batch_size=0", "epochs=1.5", "loss of type str", "lora_config of type dict", "precision='fp16'",
        "use_all_docs",
        "on_overlap='ignore'", "learning_rate=nan", "/nowhere/at/all", "which is a file", "0 queries",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_custom_lora_config(tiny_model, dataset, val_dataset, out):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query"], lora_dropout=0.1, use_rslora=True)
    _, result = finetune(dataset, tiny_model, out, val_dataset=val_dataset, lora_config=config, learning_rate=0.01)
    written = json.loads((out_path(result) / "adapter_config.json").read_text())
    assert (written["r"], written["target_modules"], written["use_rslora"]) == (2, ["query"], True)


def test_a_lora_config_that_does_not_fit_names_what_would(tiny_model, dataset, out):
    engine = LoraFinetuneEngine(dataset, tiny_model, out, lora_config=LoraConfig(target_modules=["q_proj"]), **QUIET)
    with pytest.raises(ConfigError, match=r"attention\.self\.query"):
        engine.finetune()
    assert not os.path.exists(os.path.dirname(out))


def nested_loss(path):
    users_own = SentenceTransformer(path, device="cpu")
    inner = losses.MultipleNegativesRankingLoss(users_own)
    return losses.MatryoshkaLoss(users_own, inner, matryoshka_dims=[32, 16])


def test_a_custom_loss_sees_the_prompts_of_serving(tiny_model, dataset, val_dataset, out):
    seen = []

    class Spy(losses.MultipleNegativesRankingLoss):
        def forward(self, features, labels):
            features = list(features)
            seen.append([self.model.tokenizer.decode(column["input_ids"][0][1:3]) for column in features])
            return super().forward(features, labels)

    finetune(
        dataset, tiny_model, out, val_dataset=val_dataset, loss=Spy, epochs=1,
        query_prompt="query : ", passage_prompt="passage : ",
    )  # fmt: skip
    assert all(pair == ["query :", "passage :"] for pair in seen)


def test_a_dense_head_is_frozen_because_the_adapter_does_not_hold_it(tiny_model, dataset, val_dataset, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense

    model = SentenceTransformer(tiny_model, device="cpu")
    model.insert(2, Dense(32, 8))
    base = str(tmp_path / "dense")
    model.save_pretrained(base)
    engine, result = finetune(
        dataset, base, str(tmp_path / "out"), val_dataset=val_dataset, learning_rate=5e-3, epochs=6, precision="fp32"
    )
    assert result.best_step > 0
    tuned = engine.get_finetuned_model()
    assert len(tuned.get_text_embedding("w1")) == 8
    assert evaluate_retrieval(tuned, val_dataset).metrics["ndcg@10"] == pytest.approx(result.tuned_metrics["ndcg@10"])
    written = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert written[2].linear.weight.equal(model[2].linear.weight)


@pytest.mark.parametrize("as_what", ["class", "instance", "nested", "callable"])
def test_a_loss_of_sentence_transformers(tiny_model, dataset, val_dataset, out, as_what):
    loss = {
        "class": losses.MultipleNegativesRankingLoss,
        "instance": losses.MultipleNegativesRankingLoss(SentenceTransformer(tiny_model, device="cpu")),
        "nested": nested_loss(tiny_model),
        "callable": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
    }[as_what]
    _, result = finetune(dataset, tiny_model, out, val_dataset=val_dataset, loss=loss, epochs=4, learning_rate=5e-3)
    assert result.best_step > 0


def test_hard_negatives_reach_a_loss_of_sentence_transformers_as_tuples(tiny_model, val_dataset, out):
    dataset = make_dataset()
    dataset.hard_negatives = {q: ["p20", "p21"] for q in dataset.queries if not q.startswith(("q20", "q21"))}
    dataset.hard_negatives |= {q: ["p0"] for q in dataset.queries if q.startswith(("q20", "q21"))}
    seen = []

    class Spy(losses.MultipleNegativesRankingLoss):
        def forward(self, features, labels):
            features = list(features)
            seen.append(len(features))
            return super().forward(features, labels)

    finetune(dataset, tiny_model, out, val_dataset=val_dataset, loss=Spy, epochs=1)
    assert set(seen) == {4}, "anchor, positive and two negatives; who has one gets another passage besides"


def test_training_arguments_of_sentence_transformers_pass_through(tiny_model, dataset, val_dataset, out):
    engine = LoraFinetuneEngine(dataset, tiny_model, out, val_dataset=val_dataset, batch_size=8, epochs=2, **QUIET)
    assert engine.finetune(max_steps=2).steps == 2
    with pytest.raises(ConfigError, match="no_such_argument"):
        engine.finetune(no_such_argument=1)


# -- data ---------------------------------------------------------------------------------------------


def with_training_queries(val, train):
    """A validation set with the training queries, as the old notebook writes it: other ids, case and spaces."""
    known = {f"again-{i}": f" {text.upper()}" for i, text in train.queries.items()}
    relevant = {f"again-{i}": train.relevant_docs[i] for i in train.queries}
    return EmbeddingQAFinetuneDataset(
        queries={**known, **val.queries},
        corpus={**train.corpus, **val.corpus},
        relevant_docs={**relevant, **val.relevant_docs},
        query_origins=val.query_origins,
    )


def test_training_queries_are_dropped_from_a_validation_file_that_holds_them(tiny_model, dataset, val_dataset, out):
    both = with_training_queries(val_dataset, dataset)
    with pytest.warns(UserWarning, match="48 of 68 validation queries are training queries, too, and were dropped"):
        engine = LoraFinetuneEngine(dataset, tiny_model, out, val_dataset=both, epochs=1, **QUIET)
    assert engine.val_dataset.queries == val_dataset.queries
    assert engine.val_dataset.corpus == both.corpus, "the passages are still searched"
    assert engine.dataset == dataset
    summary = engine.finetune().summary
    assert "48 of 68 validation queries are training queries" in summary
    assert "were trained on" not in summary


@pytest.mark.parametrize("part", [slice(None), slice(7)])
def test_validation_queries_that_are_all_trained_on_are_replaced(tiny_model, dataset, out, part):
    val = dataset.subset(list(dataset.queries)[part])
    count = len(val.queries)
    said = (
        rf"{count} of {count} validation queries .* not used\. Others are evaluated on instead\. .* by source document"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        engine = LoraFinetuneEngine(dataset, tiny_model, out, val_dataset=val, epochs=1, **QUIET)
    assert {warning.filename for warning in caught} == {__file__}
    assert engine.val_dataset.queries.keys() | engine.dataset.queries.keys() == dataset.queries.keys()
    assert engine.val_dataset.queries
    assert not engine.val_dataset.overlap(engine.dataset)
    assert "Others are evaluated on instead." in engine.finetune().summary


def test_training_queries_as_validation_of_what_cannot_be_split_train_without_a_verdict(tiny_model, out):
    one_document = make_dataset(passages=2)
    for settings in ({}, {"val_fraction": 0, "best_metric": "mrr@10"}):
        with pytest.warns(UserWarning, match="4 of 4 validation queries are training queries, too, and were not used"):
            engine = LoraFinetuneEngine(one_document, tiny_model, out, val_dataset=one_document, **settings)
        assert (engine.dataset, engine.val_dataset) == (one_document, None)


def test_passages_that_were_trained_on_with_other_queries_are_named_in_the_verdict(tiny_model, dataset, out):
    """One corpus that is split by query, so that its passages are on both sides."""
    val = dataset.subset([i for i in dataset.queries if i.endswith("-1")], dataset.corpus)
    train = dataset.subset([i for i in dataset.queries if i.endswith("-0")][:15], dataset.corpus)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = LoraFinetuneEngine(train, tiny_model, out, val_dataset=val, **QUIET, epochs=1)
    assert (engine.dataset, engine.val_dataset) == (train, val)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = engine.finetune()
    share = "62 % of the relevant validation passages (15 of 24) were trained on, with other queries."
    assert share in result.comparison.basis
    assert share in result.summary
    assert share in str(result.compare())
    assert "24 human-written queries" in result.summary, "they are evidence all the same"


def test_the_same_ids_with_other_texts_are_not_dropped(tiny_model, dataset, out):
    val = make_dataset(seed=7)
    assert val.queries.keys() == dataset.queries.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = LoraFinetuneEngine(dataset, tiny_model, out, val_dataset=val, on_overlap="drop")
    assert engine.val_dataset == val


def test_any_overlap_is_refused_on_request(tiny_model, dataset, val_dataset, out):
    def engine(val):
        return LoraFinetuneEngine(dataset, tiny_model, out, val_dataset=val, on_overlap="raise")

    assert engine(make_dataset(seed=7).model_copy(update={"source_documents": None})).val_dataset
    question = val_dataset.model_copy(update={"queries": {**val_dataset.queries, "vq0-0": dataset.queries["q0-0"]}})
    for val, count, named in (
        (question, "1 of 20", "vq0-0"),
        (asked_differently(dataset.subset(["q0-0", "q5-1"])), "2 of 2", "q5-1"),
        (make_dataset(seed=7), "48 of 48", "q0-0"),  # of the same documents
    ):
        with pytest.raises(DatasetError, match=f"{count} validation queries") as caught:
            engine(val)
        assert any(named in problem for problem in caught.value.problems)


def test_a_dataset_smaller_than_a_batch_works(tiny_model, val_dataset, out):
    _, result = finetune(make_dataset(passages=3), tiny_model, out, val_dataset=val_dataset, batch_size=64)
    assert result.steps == 2


def test_one_passage_is_refused(tiny_model, val_dataset, out):
    with pytest.raises(DatasetError, match="one passage only"):
        finetune(make_dataset(passages=1), tiny_model, out, val_dataset=val_dataset)


def test_a_training_set_that_cannot_be_split_trains_with_a_warning(tiny_model, out):
    one_document = make_dataset(passages=2)
    with pytest.warns(UserWarning, match="Nothing is held out"):
        LoraFinetuneEngine(one_document, tiny_model, out)


def test_truncated_texts_are_counted_and_reported(tiny_model, val_dataset, out):
    dataset = make_dataset()
    dataset.corpus = {i: f"{text} {text}" for i, text in dataset.corpus.items()}
    learns = {"epochs": 4, "batch_size": 8, "learning_rate": 5e-3}
    engine = LoraFinetuneEngine(dataset, tiny_model, out, val_dataset=val_dataset, **learns, **QUIET)
    with pytest.warns(UserWarning, match="24 of 72 texts are longer than the model's own limit of 16"):
        result = engine.finetune()
    assert (result.truncation.cut_before, result.truncation.cut_after, result.max_seq_length) == (24, 0, 24)
    assert engine.get_finetuned_model().max_seq_length == 24
    assert SentenceTransformer(out, device="cpu").max_seq_length == 24


# -- the old package ----------------------------------------------------------------------------------


def test_the_engine_is_an_instance_of_the_legacy_base_class(tiny_model, dataset, out):
    from llama_index.finetuning.types import BaseEmbeddingFinetuneEngine

    assert isinstance(LoraFinetuneEngine(dataset, tiny_model, out), BaseEmbeddingFinetuneEngine)


def test_datasets_pass_both_ways(tiny_model, tmp_path, out):
    from llama_index.finetuning.embeddings.common import EmbeddingQAFinetuneDataset as Old

    ours = make_dataset()
    ours.save_json(tmp_path / "ours.json")
    old = Old.from_json(str(tmp_path / "ours.json"))
    assert (old.queries, old.corpus, old.relevant_docs) == (ours.queries, ours.corpus, ours.relevant_docs)
    old.save_json(str(tmp_path / "old.json"))
    back = EmbeddingQAFinetuneDataset.from_json(tmp_path / "old.json")
    assert (back.queries, back.corpus, back.relevant_docs) == (ours.queries, ours.corpus, ours.relevant_docs)
    engine = LoraFinetuneEngine(old, tiny_model, out, val_fraction=0)
    assert engine.dataset.queries == ours.queries


def test_bfloat16_and_float32_steps_learn_the_same(tiny_model, dataset, val_dataset, tmp_path):
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("no bfloat16 instructions here")
    vectors = []
    for precision in ("bf16", "fp32"):
        engine, result = finetune(
            dataset, tiny_model, str(tmp_path / precision), val_dataset=val_dataset, precision=precision,
            evaluation_steps=0, epochs=3, learning_rate=5e-3,
        )  # fmt: skip
        assert result.precision == precision
        vectors.append(np.array(engine.get_finetuned_model().get_text_embedding_batch(list(dataset.corpus.values()))))
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.98
