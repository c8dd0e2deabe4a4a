"""The engine for embedding adapters, on models behind an API and on a model of our own."""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import chromadb
import numpy as np
import pytest
import torch
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.embeddings import resolve_embed_model
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.finetuning import EmbeddingAdapterFinetuneEngine as OldEngine
from llama_index.vector_stores.chroma import ChromaVectorStore

from llama_index_lora_embed import (
    AdapterEmbeddingModel,
    EmbeddingAdapterFinetuneEngine,
    EmbeddingQAFinetuneDataset,
    LabelledPairs,
    LinearLayer,
    LoraEmbedding,
    LowRankLayer,
    TwoLayerNN,
    evaluate_retrieval,
)
from llama_index_lora_embed.core.errors import (
    AdapterError,
    ConfigError,
    DatasetError,
    ModelNotFoundError,
    NonFiniteLossError,
    OutputDirectoryError,
    WrongIndexError,
)
from llama_index_lora_embed.deployment import RunRegistry, stamp_index, verify_index
from llama_index_lora_embed.embedding.adapter_embedding import PROBE
from llama_index_lora_embed.evaluation import Verdict
from llama_index_lora_embed.evaluation.embeddings import _PROBE
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.conftest import make_dataset
from tests.helpers.embedding_models import DIMENSIONS, PaidEmbedding, paid_twice
from tests.helpers.training import signal_in

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "adapter"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(tmp_path / "llama_index"))


@pytest.fixture
def data():
    """Enough passages that a rotation can be learnt, and queries of people to evaluate with."""
    return make_dataset(passages=80), make_dataset(passages=30, seed=7, prefix="v")


def engine(data, out, embed_model=None, **kwargs):
    train, val = data
    settings = {"epochs": 20, "val_dataset": val, "learning_rate": 0.02, "identity_weight": 1.0, "batch_size": 32}
    settings["negatives"] = "corpus"
    return EmbeddingAdapterFinetuneEngine(
        train, embed_model or PaidEmbedding(), model_output_path=out, **{**settings, **kwargs}
    )


# -- the main line ------------------------------------------------------------------------------------


def test_the_line_from_a_dataset_to_a_better_model_whose_index_stays(data, out):
    run = engine(data, out)
    base = run.embed_model
    result = run.finetune()
    assert result.verdict is Verdict.BETTER
    assert "human-written queries" in result.summary
    assert result.tuned_metrics["ndcg@10"] > result.base_metrics["ndcg@10"] + 0.1
    tuned = run.get_finetuned_model()
    assert tuned.fingerprint == result.fingerprint == Manifest.read(out).fingerprint
    measured = evaluate_retrieval(tuned, data[1]).metrics
    assert measured["ndcg@10"] == pytest.approx(result.tuned_metrics["ndcg@10"], abs=1e-9)
    assert evaluate_retrieval(base, data[1]).metrics["ndcg@10"] == pytest.approx(result.base_metrics["ndcg@10"])
    assert result.compare().comparison.difference == pytest.approx(result.comparison.difference)
    assert "tuned" in str(result)
    assert tuned.get_text_embedding("w1 w2") == base.get_text_embedding("w1 w2")


def test_the_arguments_of_the_old_engine_come_first_in_its_order():
    old, new = (list(inspect.signature(cls.__init__).parameters) for cls in (OldEngine, EmbeddingAdapterFinetuneEngine))
    assert new[: len(old) - 1] == old[:-1]
    assert issubclass(EmbeddingAdapterFinetuneEngine, OldEngine.__mro__[1])


@pytest.mark.parametrize(
    "adapter",
    [LowRankLayer(DIMENSIONS, 8), TwoLayerNN(DIMENSIONS, 32, DIMENSIONS, add_residual=True), None],
    ids=["low rank", "two layers", "bias"],
)
def test_other_adapters_learn_too(adapter, data, out):
    run = engine(data, out, adapter_model=adapter, bias=True, learning_rate=5e-3)
    before = None if adapter is None else {name: t.clone() for name, t in adapter.state_dict().items()}
    result = run.finetune()
    assert result.tuned_metrics["ndcg@10"] > result.base_metrics["ndcg@10"]
    if before is not None:
        assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    else:
        assert LinearLayer.load(out).bias


def test_without_validation_data_a_tenth_is_held_out_and_its_passages_stay_negatives(data, out):
    run = engine((data[0], None), out, epochs=2)
    assert len(run.val_dataset.queries) == 16
    assert not run.dataset.overlap(run.val_dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run.finetune()
    assert "held out of the training set by source document" in result.summary
    paid = run.embed_model.paid
    assert set(data[0].corpus.values()) <= set(paid)
    with pytest.warns(UserWarning, match="NOT EVALUATED"):
        unjudged = engine((data[0], None), out, epochs=1, val_fraction=0.0).finetune()
    assert unjudged.verdict is Verdict.NOT_EVALUATED
    assert unjudged.best_step == unjudged.steps


def test_training_that_gains_nothing_leaves_vectors_as_they_are(data, out):
    base = PaidEmbedding(turn=0.0)
    run = engine(data, out, base, adapter_model=TwoLayerNN(DIMENSIONS, 2, DIMENSIONS), epochs=1)
    with pytest.warns(UserWarning, match="gained nothing"):
        result = run.finetune()
    assert result.best_step == 0
    assert result.tuned_metrics == result.base_metrics
    tuned = run.get_finetuned_model()
    assert tuned.get_query_embedding("w1 w2") == pytest.approx(base.get_query_embedding("w1 w2"), abs=1e-6)


def test_the_same_seed_gives_the_same_adapter(data, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        engine(data, tmp_path / name, epochs=2, seed=seed).finetune()
        weights.append(LinearLayer.load(tmp_path / name).linear.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_negatives_are_chosen_on_folds_of_the_training_queries(data, out):
    train = data[0].subset(list(data[0].queries)[:60], data[0].corpus)
    result = engine((train, data[1]), out, negatives="auto", epochs=3).finetune()
    assert set(result.negatives_tried) == {"answered", "corpus"}
    assert result.negatives == max(result.negatives_tried, key=result.negatives_tried.get)
    assert Manifest.read(out).settings["negatives"] == result.negatives


# -- what is paid for ---------------------------------------------------------------------------------


def test_no_text_is_paid_for_twice_by_any_run(data, tmp_path):
    ledger = tmp_path / "ledger"
    for name in ("a", "b"):
        run = engine(data, tmp_path / name, PaidEmbedding(ledger=str(ledger)), epochs=1)
        run.finetune()
        run.smart_batching_collate([(text, text) for text in list(data[0].queries.values())[:3]])
    known = f"query: {_PROBE}", f"passage: {_PROBE}", f"query: {PROBE}"
    assert sorted(paid_twice(ledger)) == sorted(known), "each run recognises the model by these"
    assert (tmp_path / "llama_index" / "lora_embed").is_dir()


def test_an_api_that_fails_half_way_costs_nothing_twice(data, out, tmp_path):
    ledger = tmp_path / "ledger"
    model = PaidEmbedding(ledger=str(ledger), fails_at=70)
    with pytest.raises(ConnectionError, match="text 70"):
        engine(data, out, model).finetune()
    assert not out.exists()
    result = engine(data, out, PaidEmbedding(ledger=str(ledger))).finetune()
    assert result.tuned_metrics["ndcg@10"] > result.base_metrics["ndcg@10"]
    refused = ledger.read_text().splitlines()[69]
    assert [line for line in paid_twice(ledger) if PROBE not in line and _PROBE not in line] == [refused]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"dim": 12}, "dim=12: expected 24"),
        ({"adapter_model": LinearLayer(12, 12)}, "from 12 to 12 dimensions"),
    ],
)
def test_dimensions_that_do_not_fit_are_found_with_the_first_text(arguments, problem, data, out):
    model = PaidEmbedding()
    with pytest.raises(ConfigError, match=problem):
        engine(data, out, model, **arguments).finetune()
    assert len(set(model.paid)) <= 2, "the two probes"


# -- bad input ----------------------------------------------------------------------------------------


def test_everything_wrong_is_said_at_once(data, out, tmp_path):
    pairs = LabelledPairs(["a", "b"], ["c", "d"], [0.0, 1.0])
    with pytest.raises(ConfigError) as raised:
        EmbeddingAdapterFinetuneEngine(
            pairs,
            7,
            batch_size=0,
            epochs="3",
            adapter_model=LinearLayer(12, 24),
            dim=True,
            temperature=-1.0,
            negatives="none",
            warmup_steps=100,
            optimizer_class="adam",
            val_dataset={"queries": {}, "corpus": {}, "relevant_docs": {}},
        )
    text = "\n".join(raised.value.problems)
    for part in ("batch_size=0", "epochs='3'", "temperature=-1.0", "negatives='none'", "warmup_steps: unknown",
                 "optimizer_class='adam'", "embed_model of type int", "dim=True", "from 12 to 24 dimensions",
                 "dataset of labelled pairs", "val_dataset with 0 queries"):  # fmt: skip
        assert part in text
    with pytest.raises(ConfigError, match="dim=12 with an adapter_model of 24"):
        engine(data, out, dim=12, adapter_model=LinearLayer(24, 24))
    with pytest.raises(ConfigError, match="adapter_model of type str"):
        engine(data, out, adapter_model="linear")
    with pytest.raises(DatasetError, match="labelled pairs"):
        engine((pairs, None), out)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        engine(data, out, f"local:{tmp_path / 'nowhere'}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputDirectoryError, match="did not write"):
        engine(data, tmp_path / "mine")
    with pytest.raises(ConfigError, match="steps_per_epoch: unknown"):
        engine(data, out).finetune(steps_per_epoch=3)
    with pytest.raises(ConfigError, match="SGD"):
        engine(data, out, epochs=1, optimizer_class=torch.optim.SGD, optimizer_params={"betas": 1}).finetune()
    with pytest.raises(OutputDirectoryError, match=r"finetune\(\) first"):
        engine(data, out).get_finetuned_model()


def test_a_vector_that_is_not_finite_is_named(data, out):
    class Overflows(PaidEmbedding):
        def _get_text_embedding(self, text):
            return [float("nan")] * DIMENSIONS if text == data[0].corpus["p3"] else super()._get_text_embedding(text)

        def _get_text_embeddings(self, texts):
            return [self._get_text_embedding(text) for text in texts]

    with pytest.raises(NonFiniteLossError, match=r"1 of \d+ passage vectors \('p3'\)"):
        engine(data, out, Overflows()).finetune()


def test_vectors_of_differing_lengths_are_compared_by_cosine_and_it_says_so(data, tmp_path):
    even = engine(data, tmp_path / "even").finetune()
    run = engine(data, tmp_path / "uneven", PaidEmbedding(length=3.0))
    uneven = run.finetune()
    assert even.warnings == []
    assert "compared by cosine" in uneven.warnings[0]
    assert uneven.warnings[0] in uneven.summary
    assert uneven.tuned_metrics["ndcg@10"] == pytest.approx(even.tuned_metrics["ndcg@10"], abs=1e-6)


def test_an_asynchronous_method_that_gives_other_vectors_is_named(data, out):
    class Differs(PaidEmbedding):
        async def _aget_query_embedding(self, query):
            return self._vector(f"{query} in another way", True)

    class Refuses(PaidEmbedding):
        async def _aget_query_embedding(self, query):
            raise NotImplementedError("only synchronous")

    assert "another vector" in engine(data, out, Differs(), epochs=1).finetune().warnings[0]
    assert "only synchronous" in engine(data, out, Refuses(), epochs=1).finetune().warnings[0]


def test_a_loss_that_is_not_finite_leaves_what_was_there(data, out):
    engine(data, out, epochs=1).finetune()
    before = Manifest.read(out).fingerprint
    with pytest.raises(NonFiniteLossError):
        engine(data, out, learning_rate=1e30, identity_weight=1e9).finetune()
    assert Manifest.read(out).fingerprint == before


# -- old code and other places ------------------------------------------------------------------------


def test_the_documentation_s_example_runs_with_its_imports_changed(tiny_model, tmp_path, monkeypatch):
    from llama_index_lora_embed import BaseAdapter

    monkeypatch.chdir(tmp_path)
    train_dataset = make_dataset(passages=40)
    base_embed_model = resolve_embed_model(f"local:{tiny_model}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finetune_engine = EmbeddingAdapterFinetuneEngine(
            train_dataset,
            base_embed_model,
            model_output_path="model_output_test",
            epochs=4,
            verbose=True,
            optimizer_class=torch.optim.SGD,
            optimizer_params={"lr": 0.01},
        )
        finetune_engine.finetune()
        embed_model = finetune_engine.get_finetuned_model()
        same = AdapterEmbeddingModel(base_embed_model, "model_output_test")
        adapter_model = TwoLayerNN(32, 64, 32, bias=True, add_residual=True)
        finetune_engine = EmbeddingAdapterFinetuneEngine(
            train_dataset,
            base_embed_model,
            model_output_path="model5_output_test",
            model_checkpoint_path="model5_ck",
            adapter_model=adapter_model,
            epochs=25,
            verbose=True,
        )
        finetune_engine.finetune()
        two_layers = finetune_engine.get_finetuned_model(adapter_cls=TwoLayerNN)
        at_step_100 = AdapterEmbeddingModel(base_embed_model, "model5_ck/step_100", TwoLayerNN)

        class CustomNN(BaseAdapter):
            def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
                super().__init__()
                self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
                self.linear1 = torch.nn.Linear(in_features, hidden_features, bias=True)
                self.linear2 = torch.nn.Linear(hidden_features, out_features, bias=True)
                self.residual_weight = torch.nn.Parameter(torch.zeros(1))

            def forward(self, embed: torch.Tensor) -> torch.Tensor:
                return self.residual_weight * self.linear2(torch.relu(self.linear1(embed))) + embed

            def get_config_dict(self) -> dict:
                names = ("in_features", "hidden_features", "out_features")
                return {name: getattr(self, name) for name in names}

        custom_engine = EmbeddingAdapterFinetuneEngine(
            train_dataset, base_embed_model, model_output_path="custom", adapter_model=CustomNN(32, 64, 32), epochs=2
        )
        custom_engine.finetune()
        custom = custom_engine.get_finetuned_model(adapter_cls=CustomNN)
        assert custom_engine.get_finetuned_model().get_query_embedding("w1") == custom.get_query_embedding("w1")
    assert isinstance(base_embed_model, HuggingFaceEmbedding)
    assert embed_model.get_query_embedding("w1 w2") == same.get_query_embedding("w1 w2")
    for model in (embed_model, two_layers, at_step_100, custom):
        assert model.get_text_embedding("w1") == base_embed_model.get_text_embedding("w1")
        assert np.isfinite(model.get_query_embedding("w1 w2")).all()


def test_training_goes_on_from_an_adapter_of_the_old_package_in_its_own_folder(data, tmp_path):
    from llama_index.embeddings.adapter import LinearLayer as OldLayer

    place = tmp_path / "model_output"
    old = OldLayer(DIMENSIONS, DIMENSIONS)
    with torch.no_grad():
        old.linear.weight.mul_(0.5)
    old.save(str(place))
    run = EmbeddingAdapterFinetuneEngine.from_model_path(
        data[0], PaidEmbedding(), str(place), LinearLayer,
        model_output_path=place, epochs=1, val_dataset=data[1], learning_rate=1e-12, identity_weight=0.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.finetune()
    torch.testing.assert_close(LinearLayer.load(place).linear.weight, old.linear.weight)
    with pytest.raises(AdapterError, match="AdapterEmbeddingModel"):
        LoraEmbedding(tmp_path / "model_output.previous")
    assert (tmp_path / "model_output.previous" / "pytorch_model.bin").exists()


def test_a_model_can_be_named_by_its_folder(tiny_model, adapter, data, tmp_path):
    base = engine(data, tmp_path / "a", tiny_model).embed_model
    assert isinstance(base, LoraEmbedding)
    assert base.adapter_path is None
    tuned = engine(data, tmp_path / "b", adapter)
    assert tuned.embed_model.fingerprint == LoraEmbedding(adapter).fingerprint
    assert isinstance(engine(data, tmp_path / "c", f"local:{tiny_model}").embed_model, HuggingFaceEmbedding)


def test_constructing_an_engine_imports_no_torch(tmp_path):
    code = (
        "import sys; sys.modules['llama_index.finetuning'] = None; "
        "from llama_index.core import MockEmbedding; "
        "from llama_index_lora_embed import EmbeddingAdapterFinetuneEngine; "
        "data = dict(queries={'q': 'a'}, corpus={'p': 'c', 's': 'd'}, relevant_docs={'q': ['p']}); "
        "EmbeddingAdapterFinetuneEngine(data, MockEmbedding(4), model_output_path="
        f"{str(tmp_path / 'out')!r}, val_fraction=0.0); "
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'peft'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stamped_collection_is_searched_by_the_tuned_model_and_not_changed(data, out, tmp_path):
    run = engine(data, out)
    base = run.embed_model
    collection = chromadb.PersistentClient(str(tmp_path / "chroma")).create_collection("passages")
    nodes = [TextNode(text=text, id_=i) for i, text in data[1].corpus.items()]
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    index = VectorStoreIndex(nodes, storage_context=storage, embed_model=base)
    stamp_index(index, base)

    def vectors():
        found = collection.get(include=["embeddings"])
        return {i: vector.tobytes() for i, vector in zip(found["ids"], found["embeddings"], strict=True)}

    before = vectors()
    run.finetune()
    tuned = run.get_finetuned_model()

    def hits(embed_model):
        retriever = VectorStoreIndex.from_vector_store(storage.vector_store, embed_model=embed_model).as_retriever(
            similarity_top_k=3
        )
        found = {q: [node.node_id for node in retriever.retrieve(text)] for q, text in data[1].queries.items()}
        return sum(data[1].relevant_docs[q][0] in ids for q, ids in found.items())

    verify_index(index, tuned, without_stamp="raise")
    assert hits(tuned) > hits(base) + 5
    assert vectors() == before
    with pytest.raises(WrongIndexError, match="'other'"):
        verify_index(index, AdapterEmbeddingModel(PaidEmbedding(model_name="other"), out))


def test_the_registry_and_the_report_take_a_run(data, out, tmp_path):
    run = engine(data, out)
    result = run.finetune()
    page = result.write_report(tmp_path / "report.html")
    assert page.stat().st_size > 100_000
    registry = RunRegistry(tmp_path / "registry")
    with pytest.raises(ConfigError, match="embed_model=AdapterEmbeddingModel"):
        registry.add(out, dataset=data[1])
    version = registry.add(out, dataset=data[1], embed_model=run.get_finetuned_model())
    assert version.fingerprint == result.fingerprint
    assert version.metrics["ndcg@10"] == pytest.approx(result.tuned_metrics["ndcg@10"])
    with pytest.raises(AdapterError, match=r"embedding adapter(.|\n)*AdapterEmbeddingModel\(embed_model, "):
        LoraEmbedding(out)


# -- interruptions ------------------------------------------------------------------------------------


def test_ctrl_c_saves_a_checkpoint_and_the_resumed_run_ends_with_the_same_adapter(data, tmp_path, monkeypatch):
    engine(data, tmp_path / "calm", epochs=3).finetune()
    signal_in(monkeypatch, torch.optim.AdamW, "step", signal.SIGINT, 7)
    with pytest.raises(KeyboardInterrupt):
        engine(data, tmp_path / "stopped", epochs=3).finetune()
    monkeypatch.undo()
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(tmp_path / "llama_index"))
    assert [path.name for path in (tmp_path / "stopped.run").glob("checkpoint-*")] == ["checkpoint-7"]
    model = PaidEmbedding()
    with pytest.raises(ConfigError, match="temperature"):
        engine(data, tmp_path / "stopped", model, epochs=3, temperature=0.5, resume_from_checkpoint=True).finetune()
    engine(data, tmp_path / "stopped", model, epochs=3, resume_from_checkpoint=True).finetune()
    calm, resumed = ((tmp_path / name / "embedding_adapter.safetensors") for name in ("calm", "stopped"))
    assert calm.read_bytes() == resumed.read_bytes()
    assert not list((tmp_path / "stopped.run").glob("checkpoint-*")), "nobody asked for checkpoints"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_kills_at_random_moments_end_with_the_adapter_of_a_calm_run_and_nothing_is_paid_for_twice(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.killed_adapter_training"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip

    def order(name, kill=None):
        process.stdin.write(json.dumps({"path": str(tmp_path / name), "kill": kill}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())["code"]

    def content(name):
        manifest = json.loads((tmp_path / name / "finetune.json").read_text())
        kept = {key: manifest[key] for key in ("fingerprint", "metrics", "best_step", "files")}
        return (tmp_path / name / "embedding_adapter.safetensors").read_bytes(), kept

    assert order("calm") == 0
    rng = random.Random(0)
    killed = 0
    for kill in [
        *({"paid": rng.randint(2, 40)} for _ in range(4)),
        *({"step": rng.randint(1, 5)} for _ in range(3)),
        *({"in_save": rng.randint(1, 60)} for _ in range(4)),
        *({"in_write": rng.randint(1, 8)} for _ in range(2)),
    ]:
        code = order("killed", kill)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
    assert killed >= 10
    assert order("killed") == 0
    process.stdin.close()
    process.wait(timeout=60)
    assert content("killed") == content("calm")
    lines = (tmp_path / "killed.ledger").read_text().splitlines()
    asked = [line for line in lines if line.startswith("query") and PROBE not in line and _PROBE not in line]
    assert len(asked) == len(set(asked)), "a query costs once"


def test_a_val_dataset_of_training_queries_is_not_evaluated_on(data, out):
    mixed = EmbeddingQAFinetuneDataset(
        queries={**data[1].queries, "q0-0": data[0].queries["q0-0"]},
        corpus={**data[1].corpus, **data[0].corpus},
        relevant_docs={**data[1].relevant_docs, "q0-0": ["p0"]},
    )
    with pytest.warns(UserWarning, match="1 of 61 validation queries are training queries"):
        run = engine((data[0], mixed), out)
    assert "q0-0" not in run.val_dataset.queries
    with pytest.raises(DatasetError, match="on_overlap='raise'"):
        engine((data[0], mixed), out, on_overlap="raise")
