"""Long texts are read completely in windows, and short texts keep their vectors."""

import json
import shutil
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, losses

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, LoraFinetuneEngine, evaluate_retrieval
from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.core.files import file_digest
from llama_index_lora_embed.models import base_model
from llama_index_lora_embed.models.adapter_directory import Manifest
from llama_index_lora_embed.models.windows import (
    COUNTS,
    LONGEST_TEXT,
    JoinWindows,
    WindowedTransformer,
    add_windows,
    window_of,
)
from llama_index_lora_embed.training.efficiency.frozen_layers import TEXT_IDS, HiddenStateCache
from tests.architectures import ARCHITECTURES
from tests.conftest import WORDS, make_dataset, make_engine
from tests.helpers.datasets import asked_differently
from tests.helpers.gradients import assert_same, chunks, gradients, prepared

LONG = " ".join(WORDS[:100])
MIDDLE = " ".join(WORDS[100:130])
SHORT = "w1 w2 w3"


def base(path, window=None, **kwargs):
    return base_model.load_base(base_model.describe_base(str(path)), device="cpu", window=window, **kwargs)


def long_dataset(passages=16):
    """Passages of 60 words; each query contains words of the last third, which 24 tokens do not reach."""
    short = make_dataset(passages)
    corpus, queries = {}, {}
    for number, (passage_id, text) in enumerate(short.corpus.items()):
        filler = [WORDS[(7 * number + i) % 200] for i in range(50)]
        corpus[passage_id] = " ".join(filler) + " " + text
    queries = dict(short.queries)
    return EmbeddingQAFinetuneDataset(
        queries=queries,
        corpus=corpus,
        relevant_docs=short.relevant_docs,
        source_documents=short.source_documents,
        query_origins=short.query_origins,
    )


def test_windows_contain_the_whole_text_in_nearly_equal_parts(tiny_model):
    model, plain = base(tiny_model, 16), base(tiny_model)
    features = model.preprocess([LONG, SHORT, MIDDLE])
    assert features[COUNTS].tolist() == [8, 1, 3]  # 100 words in parts of 14, 30 in parts of 14
    rows = [
        row[mask.bool()].tolist() for row, mask in zip(features["input_ids"], features["attention_mask"], strict=True)
    ]
    words = plain.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert [number for row in rows[:8] for number in row[1:-1]] == words
    assert {len(row) for row in rows[:8]} == {14, 15}
    assert all(row[0] == 2 and row[-1] == 3 and len(row) <= 16 for row in rows)
    assert features["input_ids"].shape == features["attention_mask"].shape == (12, max(map(len, rows)))


def test_a_texts_vector_is_the_mean_of_its_windows(tiny_model):
    model, plain = base(tiny_model, 16), base(tiny_model)
    features = model.preprocess([LONG])
    words = [plain.tokenizer.decode(row[1 : int(mask.sum()) - 1]) for row, mask in
             zip(features["input_ids"], features["attention_mask"], strict=True)]  # fmt: skip
    with torch.no_grad():
        pooled = [plain[1](plain[0](plain.preprocess([text])))["sentence_embedding"][0] for text in words]
    mean = torch.stack(pooled).mean(0)
    assert np.allclose(model.encode(LONG), (mean / mean.norm()).numpy(), atol=1e-6)
    short = [SHORT, "w5", " ".join(WORDS[:14])]
    assert np.allclose(model.encode(short), plain.encode(short), atol=1e-6)
    both = model.encode([LONG, SHORT, MIDDLE, ""])
    assert np.allclose(both, [model.encode(text) for text in (LONG, SHORT, MIDDLE, "")], atol=1e-6)


def test_the_end_of_a_text_counts(tiny_model):
    changed = " ".join([*WORDS[:95], *WORDS[150:155]])
    cut, whole = base(tiny_model), base(tiny_model, 16)
    assert np.array_equal(cut.encode(LONG), cut.encode(changed))
    assert np.abs(whole.encode(LONG) - whole.encode(changed)).max() > 1e-3
    whole.max_seq_length = 50
    assert np.array_equal(whole.encode(LONG), whole.encode(changed)), "as much as max_seq_length says"


def test_every_window_has_the_prompt(tiny_model):
    model = base(tiny_model, 16)
    features = model.preprocess([MIDDLE, SHORT], prompt="passage: ")
    prompt = model.tokenizer("passage:", add_special_tokens=False)["input_ids"]
    assert all(row[1:3].tolist() == prompt for row in features["input_ids"])
    assert features["prompt_length"] == base(tiny_model).preprocess([SHORT], prompt="passage: ")["prompt_length"]
    with pytest.raises(ConfigError, match="shorter prompt"):
        model.preprocess([LONG], prompt=" ".join(["passage"] * 9) + " ")


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"qwen3", "qwen3-right"}))
def test_every_architecture_supports_windows(name, tmp_path):
    path = ARCHITECTURES[name].make(tmp_path / name)
    model, plain = base(path, 20), base(path)
    texts = ["w1 w2", " ".join(WORDS[:70]), " ".join(WORDS[5:40])]
    features = model.preprocess(texts)
    tail = [token for token in [plain.tokenizer("w1")["input_ids"][-1]] if ARCHITECTURES[name].appends]
    ends = [
        row[mask.bool()][-1].item() for row, mask in zip(features["input_ids"], features["attention_mask"], strict=True)
    ]
    assert not tail or set(ends) == set(tail), "every window ends as a text does"
    vectors = model.encode(texts)
    assert np.isfinite(vectors).all()
    assert np.allclose(vectors, [model.encode(text) for text in texts], atol=1e-5)
    assert np.allclose(vectors[0], plain.encode(texts[0]), atol=1e-5)


def test_a_saved_model_gives_the_same_vectors_and_needs_trust_outside_of_this_package(tiny_model, tmp_path):
    model = base(tiny_model, 16)
    model.max_seq_length = 60
    wanted = model.encode([LONG, SHORT])
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    assert np.array_equal(again.encode([LONG, SHORT]), wanted)
    ours = base(tmp_path / "model")
    assert np.array_equal(ours.encode([LONG, SHORT]), wanted)
    assert (window_of(ours), ours.max_seq_length) == (16, 60)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "model"), device="cpu")


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """An engine that trained with windows, its result, and its validation set."""
    path = tmp_path_factory.mktemp("windows") / "adapter"
    val = asked_differently(long_dataset(8))
    engine = LoraFinetuneEngine(
        long_dataset(), tiny_model, str(path), batch_size=8, epochs=3, val_dataset=val,
        show_progress_bar=False, learning_rate=5e-3, device="cpu", precision="fp32", window=16,
    )  # fmt: skip
    return engine, engine.finetune(), val


def test_from_training_to_the_embedding_model(trained):
    engine, result, val = trained
    assert result.best_step > 0
    embed_model = engine.get_finetuned_model()
    assert evaluate_retrieval(embed_model, val).metrics == pytest.approx(result.tuned_metrics, abs=1e-6)
    path = Path(result.adapter_path)
    assert "trust_remote_code=True" in (path / "README.md").read_text()
    manifest = Manifest.read(path)
    assert manifest.max_seq_length == result.max_seq_length >= 62
    assert {"type": "JoinWindows", "window": 16} in manifest.pooling
    unmerged = LoraEmbedding(result.adapter_path, device="cpu", merge=False)
    plain = SentenceTransformer(result.adapter_path, device="cpu", trust_remote_code=True)
    for other in (unmerged.get_text_embedding(LONG), plain.encode_document(LONG)):
        assert np.allclose(other, embed_model.get_text_embedding(LONG), atol=1e-5)


def test_windows_are_part_of_the_fingerprint(tiny_model):
    prints = {LoraEmbedding(base_model=tiny_model, device="cpu", window=w).fingerprint for w in (None, 16, 24)}
    assert len(prints) == 3


def test_an_adapter_keeps_its_windows(trained):
    path = trained[1].adapter_path
    assert LoraEmbedding(path, device="cpu", window=16).max_seq_length >= 62
    with pytest.raises(ConfigError, match="window=24 for an adapter that was trained with 16"):
        LoraEmbedding(path, device="cpu", window=24)
    with pytest.raises(ConfigError, match="window"):
        LoraFinetuneEngine(long_dataset(), continue_from=path, window=16, device="cpu")


def test_an_adapter_is_continued_in_its_windows(trained, tiny_model, tmp_path):
    _, result, val = trained
    more = LoraFinetuneEngine(
        long_dataset(), tiny_model, str(tmp_path / "more"), continue_from=result.adapter_path, batch_size=8,
        epochs=1, val_dataset=val, show_progress_bar=False, device="cpu",
    )  # fmt: skip
    more.finetune()
    assert {"type": "JoinWindows", "window": 16} in Manifest.read(tmp_path / "more").pooling


def test_a_directory_with_earlier_names_of_the_modules_loads_and_is_continued(trained, tiny_model, tmp_path):
    _, result, val = trained
    old = Path(shutil.copytree(result.adapter_path, tmp_path / "old"))
    modules = (old / "modules.json").read_text()
    assert modules.count("llama_index_lora_embed.models.windows.") == 2
    (old / "modules.json").write_text(modules.replace("llama_index_lora_embed.models.", "llama_index_lora_embed."))
    manifest = json.loads((old / "finetune.json").read_text())
    manifest["files"]["modules.json"] = file_digest(old / "modules.json")
    (old / "finetune.json").write_text(json.dumps(manifest))
    embed_model, new = LoraEmbedding(old, device="cpu"), LoraEmbedding(result.adapter_path, device="cpu")
    assert embed_model.fingerprint == new.fingerprint
    assert embed_model.get_text_embedding(LONG) == new.get_text_embedding(LONG)
    LoraFinetuneEngine(
        long_dataset(), tiny_model, str(tmp_path / "more"), continue_from=str(old), batch_size=8, epochs=1,
        val_dataset=val, show_progress_bar=False, device="cpu",
    ).finetune()  # fmt: skip
    assert "llama_index_lora_embed.models.windows.JoinWindows" in (tmp_path / "more" / "modules.json").read_text()


def test_another_window_is_another_run(trained, tiny_model, tmp_path):
    def engine(window, **kwargs):
        return make_engine(
            tiny_model, tmp_path / "run", long_dataset(), val_dataset=None, val_fraction=0, epochs=1, window=window,
            save_checkpoints=True, checkpoint_save_steps=1, **kwargs,
        )  # fmt: skip

    engine(16).finetune()
    with pytest.raises(ConfigError, match="window"):
        engine(24, resume_from_checkpoint=True).finetune()


@pytest.mark.parametrize("window", [0, 15, 65, "16", True, 1.5])
def test_windows_of_invalid_length_are_refused(tiny_model, tmp_path, window):
    with pytest.raises(ConfigError, match="window"):
        LoraFinetuneEngine(long_dataset(), tiny_model, str(tmp_path / "x"), window=window, device="cpu").finetune()


def test_a_model_without_transformer_and_pooling_is_refused(tiny_model):
    model = SentenceTransformer(modules=[SentenceTransformer(tiny_model, device="cpu")[0]], device="cpu")
    with pytest.raises(ConfigError, match="a Transformer and a Pooling"):
        add_windows(model, 16)


@pytest.mark.parametrize("form", ["plain", "gradcache", "frozen layers", "gradcache and frozen layers"])
def test_every_form_of_step_has_the_same_gradient(tiny_model, form, monkeypatch):
    monkeypatch.setattr("tests.helpers.gradients.make_dataset", long_dataset)
    monkeypatch.setattr(
        base_model, "load_base", lambda found, load=base_model.load_base, **kwargs: load(found, window=16, **kwargs)
    )
    from peft import LoraConfig

    upper = LoraConfig(r=4, target_modules=["layer.1.attention.self.query", "layer.1.output.dense"])
    model, loss, batch = prepared(tiny_model, upper)
    assert isinstance(model[0], WindowedTransformer)
    assert any(isinstance(module, JoinWindows) for module in model)
    assert any(COUNTS in chunk for chunk in chunks(batch))
    plain = gradients(model, loss, batch)
    if "gradcache" in form:
        model, loss, batch = prepared(tiny_model, upper, ObjectiveSettings(mini_batch_size=3))
        sizes = [(len(chunk["input_ids"]), len(chunk.get(COUNTS, ()))) for chunk in chunks(batch)]
        assert all(rows <= 3 or texts == 1 for rows, texts in sizes), "windows are what takes memory, not texts"
    if "frozen layers" in form:
        for chunk in chunks(batch):
            assert len(set(chunk[TEXT_IDS].tolist())) == len(chunk["input_ids"]), "each window has a number of its own"
        loss.hidden_state_cache = HiddenStateCache.of(model, 1 << 20)
        assert loss.hidden_state_cache.agrees(model, chunks(batch)[-1], 1e-5)
        gradients(model, loss, batch)
    assert_same(gradients(model, loss, batch), plain)


def test_a_loss_of_the_users_own_sees_windows_too(tiny_model, tmp_path):
    result = LoraFinetuneEngine(
        long_dataset(), tiny_model, str(tmp_path / "x"), batch_size=8, epochs=2,
        val_dataset=asked_differently(long_dataset(8)), loss=losses.MultipleNegativesRankingLoss, window=16,
        show_progress_bar=False, learning_rate=5e-3, device="cpu",
    ).finetune()  # fmt: skip
    assert result.max_seq_length >= 62
    assert len(result.history) >= 2


def test_very_long_texts_are_truncated(tiny_model):
    model = base(tiny_model, 64)
    assert model.max_seq_length == LONGEST_TEXT
    features = model.preprocess([" ".join(["w1"] * 10_000)])
    assert int(features["attention_mask"].sum()) - 2 * int(features[COUNTS]) == LONGEST_TEXT - 2


def test_threads_get_the_vectors_of_one_thread(tiny_model):
    model = base(tiny_model, 16)
    model.max_seq_length = 30
    texts = [" ".join(WORDS[i : i + 60]) for i in range(20)]
    wanted = [model.encode(text) for text in texts]
    wrong = []

    def work():
        for text, vector in zip(texts * 3, wanted * 3, strict=True):
            if not np.allclose(model.encode(text), vector, atol=1e-6):
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_token_embeddings_are_those_of_each_text(tiny_model):
    model, plain = base(tiny_model, 16), base(tiny_model)
    rows = model.encode([SHORT, LONG, "w5 w6"], output_value="token_embeddings")
    assert [len(row) for row in rows] == [5, 100 + 2 * 8, 4]
    assert torch.allclose(rows[0], plain.encode([SHORT], output_value="token_embeddings")[0], atol=1e-5)
    assert model.encode([LONG, SHORT], output_value=None)[1]["input_ids"].tolist()[:5] == [2, 6, 7, 8, 3]


@pytest.mark.parametrize(
    "loss", [losses.CachedMultipleNegativesRankingLoss, losses.CachedMultipleNegativesSymmetricRankingLoss]
)
def test_losses_that_split_batches_are_refused(tiny_model, tmp_path, loss):
    engine = LoraFinetuneEngine(
        long_dataset(), tiny_model, str(tmp_path / "x"), loss=loss, window=16, val_fraction=0, device="cpu"
    )
    with pytest.raises(ConfigError, match="ObjectiveSettings"):
        engine.finetune()


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_embedded(tiny_model):
    with pytest.raises(ConfigError, match="shorter prompt"):
        LoraEmbedding(base_model=tiny_model, device="cpu", window=16, passage_prompt="passage " * 9)


def test_modules_keep_their_names(tiny_model, tmp_path):
    named = SentenceTransformer(
        modules=OrderedDict(zip(["transformer", "pooling", "normalize"], base(tiny_model), strict=True)), device="cpu"
    )
    named.save_pretrained(str(tmp_path / "named"), create_model_card=False)
    model = base(tmp_path / "named", 16)
    assert list(model._modules) == ["transformer", "pooling", "windows", "normalize"]
    assert np.allclose(model.encode([LONG]), base(tiny_model, 16).encode([LONG]), atol=1e-6)


def test_the_longest_training_text_is_read_whole(tiny_model, tmp_path):
    data = long_dataset()
    longest = next(iter(data.corpus))
    data.corpus[longest] = " ".join(WORDS * 4)
    result = LoraFinetuneEngine(
        data, tiny_model, str(tmp_path / "x"), batch_size=8, epochs=1, val_fraction=0, window=16, device="cpu",
        show_progress_bar=False,
    ).finetune()  # fmt: skip
    assert result.max_seq_length >= 802
    assert result.truncation.cut_after == 0
