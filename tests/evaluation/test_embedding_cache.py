import shutil

import pytest
from llama_index.core.bridge.pydantic import PrivateAttr

from llama_index_lora_embed import AdapterEmbeddingModel, LinearLayer, LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.core.errors import OutputDirectoryError
from llama_index_lora_embed.evaluation import embeddings
from llama_index_lora_embed.evaluation.embedding_cache import model_identity
from tests.conftest import make_dataset
from tests.helpers.embedding_models import DIMENSIONS, PaidEmbedding
from tests.helpers.evaluation import WordCountEmbedding


def requested_texts(model):
    """The number of texts that the model has embedded, with the probe that tells models apart."""
    return sum(count for _, count in model._calls)


def test_every_text_is_embedded_once_by_a_model(tmp_path):
    dataset, model, cache = make_dataset(), WordCountEmbedding(), tmp_path / "cache"
    first = evaluate_retrieval(model, dataset, cache_folder=cache)
    requested, probes = requested_texts(model), 2
    assert requested == 48 + 24 + probes
    again = evaluate_retrieval(model, dataset, cache_folder=cache)
    assert (requested_texts(model), again.metrics) == (requested + probes, first.metrics)
    evaluate_retrieval(WordCountEmbedding(api_key="another", embed_batch_size=7), dataset, cache_folder=cache)
    assert len(list(cache.iterdir())) == 1, "neither keys nor batch sizes change the vectors"
    content = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file())
    assert b"secret" not in content
    dataset.queries["q0-0"] = "something else"
    dataset.corpus["a first one"] = "w1 w2"
    evaluate_retrieval(model, dataset, cache_folder=cache)
    assert requested_texts(model) == requested + 2 * probes + 2, "the new query and the new passage"


def test_models_with_equal_settings_and_different_vectors_do_not_share_a_cache(tmp_path):
    class Private(WordCountEmbedding):
        """Its vectors depend on a private attribute."""

        _shift: int = PrivateAttr(default=0)

        def vector(self, text):
            vector = super().vector(text)
            return vector[self._shift :] + vector[: self._shift] if "?" in text else vector

    dataset, models = make_dataset(), [Private(), Private(), WordCountEmbedding(), WordCountEmbedding(dimensions=8)]
    models[1]._shift = 5
    uncached = [evaluate_retrieval(model, dataset).metrics for model in models]
    assert uncached[0] != uncached[1]
    for _ in range(2):
        assert [evaluate_retrieval(m, dataset, cache_folder=tmp_path).metrics for m in models] == uncached
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_cache_is_rebuilt_and_an_unwritable_one_is_an_error(tmp_path):
    dataset = make_dataset()
    first = evaluate_retrieval(WordCountEmbedding(), dataset, cache_folder=tmp_path)
    for file in tmp_path.rglob("*.sqlite"):
        file.write_bytes(b"nonsense" * 1000)
    assert evaluate_retrieval(WordCountEmbedding(), dataset, cache_folder=tmp_path).metrics == first.metrics
    model = WordCountEmbedding()
    evaluate_retrieval(model, dataset, cache_folder=tmp_path)
    assert requested_texts(model) == 2, "the probes"
    with pytest.raises(OutputDirectoryError, match="cache folder"):
        evaluate_retrieval(WordCountEmbedding(), dataset, cache_folder=__file__)


def test_a_model_that_was_retrained_in_its_folder_has_another_identity(tiny_model, adapter, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    before = model_identity(WordCountEmbedding(model_name=str(folder)))
    (folder / "modules.json").write_text((folder / "modules.json").read_text() + " ")
    assert model_identity(WordCountEmbedding(model_name=str(folder))) != before
    assert before[1] is False
    embed_model = LoraEmbedding(adapter, device="cpu")
    assert model_identity(embed_model) == (embed_model.fingerprint, True)
    for name in ("", "x" * 5000, "\0"):
        first, second = (model_identity(WordCountEmbedding(model_name=name)) for _ in range(2))
        assert first == second


def test_a_model_whose_probe_vector_is_not_finite_is_not_cached(tmp_path):
    class Overflows(WordCountEmbedding):
        def vector(self, text):
            return [float("nan")] * 24 if len(text) > 1000 else super().vector(text)

    evaluate_retrieval(Overflows(), make_dataset(), cache_folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_workers", [None, 2])
def test_what_was_paid_for_before_an_api_fails_is_not_paid_for_again(num_workers, tmp_path):
    dataset, settings = make_dataset(), {"num_workers": num_workers, "cache_folder": tmp_path}
    texts = [*dataset.queries.values(), *dataset.corpus.values()]
    paid = []
    for fails_at in (20, 20, 20, 0):
        model = PaidEmbedding(fails_at=fails_at)
        if fails_at:
            with pytest.raises(ConnectionError):
                evaluate_retrieval(model, dataset, **settings)
        else:
            evaluate_retrieval(model, dataset, **settings)
        paid += [text for text in model.paid if text != embeddings._PROBE]
    assert set(paid) == set(texts)
    under_way = 1 if num_workers is None else num_workers  # requests when one fails, of four passages at most
    assert len(paid) - len(set(paid)) <= 3 * 4 * under_way


def test_a_model_with_an_adapter_takes_what_the_model_below_it_was_paid_for(tmp_path):
    dataset, base = make_dataset(), PaidEmbedding()
    expected = evaluate_retrieval(base, dataset, cache_folder=tmp_path / "cache").metrics
    LinearLayer(DIMENSIONS, DIMENSIONS).save(tmp_path / "adapter")
    base.paid.clear()
    tuned = AdapterEmbeddingModel(base, tmp_path / "adapter")
    assert evaluate_retrieval(tuned, dataset, cache_folder=tmp_path / "cache").metrics == expected
    assert set(base.paid) == {embeddings._PROBE}
