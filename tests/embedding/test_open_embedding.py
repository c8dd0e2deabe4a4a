"""Whatever a folder holds is opened as what it is."""

import shutil

import pytest

from llama_index_lora_embed import AdapterEmbeddingModel, EmbeddingAdapterFinetuneEngine, LoraEmbedding
from llama_index_lora_embed.core.errors import ConfigError, ModelNotFoundError
from llama_index_lora_embed.embedding.open_embedding import open_base, open_embedding
from tests.conftest import make_dataset


def test_an_adapter_and_a_base_are_told_apart(adapter, tiny_model):
    assert open_embedding(adapter).fingerprint == LoraEmbedding(adapter).fingerprint
    base = LoraEmbedding(base_model=tiny_model).fingerprint
    assert open_embedding(tiny_model).fingerprint == open_base(adapter).fingerprint == base


def test_an_adapter_whose_base_has_moved(adapter, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "moved")
    assert open_embedding(adapter, base_model=tmp_path / "moved").fingerprint == LoraEmbedding(adapter).fingerprint
    with pytest.raises(ConfigError, match="which is no adapter"):
        open_embedding(tiny_model, base_model=tmp_path / "moved")


def test_an_embedding_adapter_needs_the_model_below_it(tiny_model, tmp_path):
    model = LoraEmbedding(base_model=tiny_model)
    engine = EmbeddingAdapterFinetuneEngine(
        make_dataset(), model, epochs=1, negatives="corpus", model_output_path=str(tmp_path / "map")
    )
    engine.finetune()
    with pytest.raises(ConfigError, match="the model below it"):
        open_embedding(tmp_path / "map")
    opened = open_embedding(tmp_path / "map", base_model=tiny_model)
    assert isinstance(opened, AdapterEmbeddingModel)
    assert opened.fingerprint == engine.get_finetuned_model().fingerprint
    with pytest.raises(ConfigError, match="no model to compare with"):
        open_base(tmp_path / "map")


def test_what_is_not_there_or_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFoundError, match="which is a file"):
        open_embedding(tmp_path / "file")
    with pytest.raises(ModelNotFoundError, match="not there"):
        open_embedding(tmp_path / "nothing")
