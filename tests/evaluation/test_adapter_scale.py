import numpy as np
import pytest
from peft import LoraConfig

from llama_index_lora_embed import LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.evaluation import tune_scale
from tests.conftest import make_dataset, make_engine
from tests.helpers.adapters import TEXTS, vectors


def test_scale_0_is_the_base_and_scale_1_the_adapter(adapter, tiny_model):
    base, tuned = vectors(base_model=tiny_model), vectors(adapter)
    assert np.abs(vectors(adapter, adapter_scale=0.0) - base).max() < 1e-6
    assert np.abs(vectors(adapter, adapter_scale=1.0) - tuned).max() == 0
    half = vectors(adapter, adapter_scale=0.5)
    for other in (base, tuned):
        assert np.abs(half - other).max() > 1e-3
    assert (half * base).sum(1).mean() > (tuned * base).sum(1).mean()


@pytest.mark.parametrize("merge", [True, False])
def test_merged_unmerged_and_pooled_adapters_agree(adapter, merge):
    alone = vectors(adapter, adapter_scale=0.3, merge=merge)
    pooled = LoraEmbedding(adapters={"a": adapter}, adapter_scale=0.3, device="cpu").with_adapter("a")
    assert np.abs(pooled.get_text_embedding_batch(TEXTS) - alone).max() < 1e-5
    assert pooled.fingerprint == LoraEmbedding(adapter, adapter_scale=0.3, device="cpu").fingerprint


def test_two_scales_of_one_adapter_do_not_disturb_each_other(adapter):
    scales = (1.0, 0.5, 0.0, 0.5, 1.0)
    made = [LoraEmbedding(adapters={"a": adapter}, adapter="a", adapter_scale=s, device="cpu") for s in scales]
    for _ in range(2):
        for scale, one in zip(scales, made, strict=True):
            assert np.abs(one.get_text_embedding_batch(TEXTS) - vectors(adapter, adapter_scale=scale)).max() < 1e-5


def test_every_scale_has_its_fingerprint(adapter):
    digests = {LoraEmbedding(adapter, adapter_scale=s, device="cpu").fingerprint for s in (0.0, 0.25, 0.5, 1.0)}
    assert len(digests) == 4
    assert LoraEmbedding(adapter, device="cpu").fingerprint in digests


def test_the_scale_survives_to_dict_and_from_dict(adapter):
    half = LoraEmbedding(adapter, adapter_scale=0.5, device="cpu")
    again = LoraEmbedding.from_dict(half.to_dict())
    assert again.adapter_scale == 0.5
    assert again.get_text_embedding(TEXTS[3]) == half.get_text_embedding(TEXTS[3])


def test_the_sweep_evaluates_every_scale_and_chooses_the_best(adapter, tiny_model):
    dataset = make_dataset(passages=20, seed=11, prefix="w")
    sweep = tune_scale(adapter, dataset, scales=(1, 0.5, 0.0, 0.5), device="cpu")
    assert list(sweep.scores()) == [0.0, 0.5, 1.0]
    for scale, found in sweep.evaluations.items():
        own = evaluate_retrieval(LoraEmbedding(adapter, adapter_scale=scale, device="cpu"), dataset)
        assert found.metrics == pytest.approx(own.metrics, abs=1e-6)
    base = evaluate_retrieval(LoraEmbedding(base_model=tiny_model, device="cpu"), dataset)
    assert sweep.evaluations[0.0].metrics == pytest.approx(base.metrics, abs=1e-6)
    assert sweep.scores()[sweep.best] == max(sweep.scores().values())


def test_among_ties_the_scale_closest_to_the_base_is_chosen(adapter):
    dataset = make_dataset(passages=2, questions=1, seed=11, prefix="w")
    sweep = tune_scale(adapter, dataset, metric="recall@10", device="cpu")  # ten of two passages
    assert set(sweep.scores().values()) == {1.0}
    assert sweep.best == 0.0


@pytest.mark.parametrize("scales", [(), (0.5, 1.5), (-0.1,), ("half",), (True,)])
def test_scales_out_of_range_are_refused(adapter, scales):
    with pytest.raises(ConfigError, match="scales="):
        tune_scale(adapter, make_dataset(), scales=scales)


def test_an_unknown_metric_is_refused_with_the_known_ones(adapter):
    with pytest.raises(ConfigError, match=r"metric='f1'.*ndcg@10"):
        tune_scale(adapter, make_dataset(), metric="f1", device="cpu")


def test_only_plain_loras_can_be_scaled(tiny_model, tmp_path):
    dora = LoraConfig(r=4, use_dora=True, target_modules=["query"])
    engine = make_engine(tiny_model, tmp_path / "dora", epochs=1, val_dataset=None, val_fraction=0.0, lora_config=dora)
    path = engine.finetune().adapter_path
    with pytest.raises(ConfigError, match=r"adapter_scale=0\.5.*use_dora"):
        LoraEmbedding(path, adapter_scale=0.5, device="cpu")
    with pytest.raises(ValueError, match="adapter_scale"):
        LoraEmbedding(path, adapter_scale=1.5, device="cpu")
