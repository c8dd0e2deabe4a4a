import gc
import json
import weakref

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from llama_index_lora_embed.core.errors import ConfigError, ModelNotFoundError, UnsafeCheckpointError
from llama_index_lora_embed.training import teacher as teacher_module
from llama_index_lora_embed.training.teacher import Teacher, scores_file
from tests.helpers.teachers import save_cross_encoder, shared_words

CPU = torch.device("cpu")
PAIRS = [(f"w{n} w{n + 1}", f"w{n + step} w{n + step + 3}") for n in range(5) for step in range(3)]


class Counting:
    """A teacher that remembers what it was asked for."""

    def __init__(self, score=shared_words):
        self.score = score
        self.asked = []

    def __call__(self, pairs):
        self.asked.extend(pairs)
        return self.score(pairs)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.teacher.jsonl"


def test_a_cross_encoder_from_a_folder_gives_its_logits_and_is_freed(cross_encoder, file, monkeypatch):
    loaded = []
    init = CrossEncoder.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        loaded.append(weakref.ref(self))

    monkeypatch.setattr(CrossEncoder, "__init__", remember)
    scores = Teacher(cross_encoder, file).scores(PAIRS, CPU)
    gc.collect()
    assert [reference() for reference in loaded] == [None]
    monkeypatch.undo()
    expected = CrossEncoder(cross_encoder, device="cpu").predict(PAIRS, activation_fn=torch.nn.Identity())
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert max(scores) - min(scores) > 1


def test_a_cross_encoder_and_its_saved_form_are_teachers_too(cross_encoder, file, tmp_path):
    model = CrossEncoder(cross_encoder, device="cpu")
    expected = Teacher(cross_encoder, file).scores(PAIRS, CPU)
    assert Teacher(model, tmp_path / "a").scores(PAIRS, CPU) == pytest.approx(expected, abs=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    assert Teacher(str(tmp_path / "saved"), tmp_path / "b").scores(PAIRS, CPU) == pytest.approx(expected, abs=1e-5)


def test_the_scores_of_a_model_are_found_again_by_its_weights(cross_encoder, tiny_model, file, tmp_path, monkeypatch):
    first = Teacher(cross_encoder, file).scores(PAIRS, CPU)
    model = CrossEncoder(cross_encoder, device="cpu")
    of_object = Teacher(model, tmp_path / "object").scores(PAIRS, CPU)
    monkeypatch.setattr(CrossEncoder, "predict", None)  # whoever computes now fails
    assert Teacher(cross_encoder, file).scores(PAIRS, CPU) == first
    assert Teacher(model, tmp_path / "object").scores(PAIRS, CPU) == of_object
    other = save_cross_encoder(tmp_path / "other", tiny_model, seed=4)
    with pytest.raises(TypeError):
        Teacher(other, file).scores(PAIRS, CPU)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(TypeError):
        Teacher(model, tmp_path / "object").scores(PAIRS, CPU)


def test_the_scores_of_a_function_are_found_again_by_a_run_that_resumes(file):
    first = Counting()
    scores = Teacher(first, file).scores([*PAIRS, PAIRS[0]], CPU)
    assert scores[-1] == scores[0]
    assert len(first.asked) == len(set(PAIRS)), "a pair is scored once"
    again = Counting()
    assert Teacher(again, file, resume=True).scores(PAIRS, CPU) == scores[:-1]
    assert again.asked == []
    more = [("w1", "w1 w2"), *PAIRS]
    assert Teacher(again, file, resume=True).scores(more, CPU) == [1.0, *scores[:-1]]
    assert again.asked == [("w1", "w1 w2")]
    changed = Counting(lambda pairs: [7.0] * len(pairs))
    assert Teacher(changed, file).scores(PAIRS, CPU) == [7.0] * len(PAIRS), "a new run asks the function"


def test_a_kill_between_two_parts_costs_no_score_that_was_written(file, monkeypatch):
    monkeypatch.setattr(teacher_module, "_PART", 4)
    pairs = list(dict.fromkeys(PAIRS))

    def killed(part):
        if pairs[8] in part:
            raise KeyboardInterrupt
        return shared_words(part)

    counting = Counting(killed)
    with pytest.raises(KeyboardInterrupt):
        Teacher(counting, file).scores(pairs, CPU)
    with open(file, "ab") as torn:
        torn.write(b'{"teacher": "Counting", "scores": {"00')
    rest = Counting()
    assert Teacher(rest, file, resume=True).scores(pairs, CPU) == shared_words(pairs)
    assert rest.asked == pairs[8:]


def test_a_file_that_cannot_be_written_costs_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="could not be written"):
        assert Teacher(shared_words, tmp_path / "no" / "folder").scores(PAIRS, CPU) == shared_words(PAIRS)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda pairs: [float("nan"), *shared_words(pairs[1:])], "NaN or infinity for 1 of them, first for 'w0 w1'"),
        (lambda pairs: [float("inf")] * len(pairs), f"NaN or infinity for {len(PAIRS)} of them"),
        (lambda pairs: shared_words(pairs)[:-1], rf"an array of shape \({len(PAIRS) - 1},\)"),
        (lambda pairs: np.zeros((len(pairs), 2)), rf"an array of shape \({len(PAIRS)}, 2\)"),
        (lambda pairs: torch.zeros(len(pairs), 1), rf"an array of shape \({len(PAIRS)}, 1\)"),
        (lambda pairs: None, "which returned None"),
        (lambda pairs: ["high"] * len(pairs), "which returned"),
        (lambda pairs: [[1.0], [1.0, 2.0]], "which returned"),
        (lambda pairs: 0.5, r"which returned 0\.5"),
    ],
    ids=["nan", "infinity", "too few", "two outputs", "column", "nothing", "words", "ragged", "one number"],
)
def test_a_teacher_that_returns_something_else_is_refused_and_nothing_of_it_is_kept(file, answer, said):
    with pytest.raises(ConfigError, match=said):
        Teacher(answer, file).scores(PAIRS, CPU)
    assert not file.exists()


def test_a_cross_encoder_whose_weights_are_nan_is_refused(cross_encoder, file):
    model = CrossEncoder(cross_encoder, device="cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match="teacher CrossEncoder, which returned NaN"):
        Teacher(model, file).scores(PAIRS, CPU)


def test_models_that_are_no_cross_encoders_with_one_score_are_refused(tiny_model, file, tmp_path):
    save_cross_encoder(tmp_path / "classes", tiny_model, labels=3)
    save_cross_encoder(tmp_path / "two", tiny_model, labels=2)
    CrossEncoder(str(tmp_path / "classes"), device="cpu").save_pretrained(str(tmp_path / "saved"))
    for source, said in (
        (tiny_model, "an embedding model"),
        (f"{tiny_model}/../transformer", "a BertModel"),
        (tmp_path / "classes", "3 scores"),
        (tmp_path / "two", "2 scores"),
        (tmp_path / "saved", "3 scores"),
    ):
        with pytest.raises(ConfigError, match=said):
            Teacher(str(source), file)


def test_teachers_that_are_not_there_damaged_or_unsafe_are_named(tiny_model, file, tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        Teacher(str(tmp_path / "nowhere"), file)
    folder = save_cross_encoder(tmp_path / "teacher", tiny_model)
    weights = tmp_path / "teacher" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:500])
    with pytest.raises(ModelNotFoundError, match="does not load"):
        Teacher(folder, file).scores(PAIRS, CPU)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UnsafeCheckpointError):
        Teacher(folder, file)


def test_the_file_is_beside_the_output_and_holds_no_text(file, tmp_path):
    assert scores_file(tmp_path / "run") == file
    Teacher(shared_words, file).scores([("secret", "text")], CPU)
    (line,) = file.read_text().splitlines()
    assert "secret" not in line
    assert list(json.loads(line)["scores"].values()) == [0.0]
