import pytest
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.tokens import count_tokens, longest_input
from llama_index_lora_embed.models.windows import add_windows, takes_windows
from llama_index_lora_embed.training.lengths import MOSTLY_CUT, choose_length, choose_window


@pytest.fixture
def model(tiny_model):
    return SentenceTransformer(tiny_model, device="cpu")


def words(count):
    return " ".join(["w1"] * count)


def test_tokens_are_counted_with_prompt_and_special_tokens_and_uncut(model):
    assert count_tokens(model, [words(3), words(100)]) == [5, 102]
    assert count_tokens(model, [words(3)], prompt="query: ") == [7]
    assert count_tokens(model, [words(1)] * 2500) == [3] * 2500


def test_the_length_is_the_shortest_that_covers_95_percent(model):
    passages = [words(i) for i in range(20, 40)]  # 22 to 41 tokens; 95 % are at most 40
    truncation = choose_length(model, [words(3)] * 100, passages, 0.95, None)
    assert model.max_seq_length == truncation.length_after == 40
    assert (truncation.length_before, truncation.cut_before) == (16, 20)
    assert (truncation.cut_after, truncation.longest, truncation.texts) == (1, 41, 120)
    assert "20 of 120" in str(truncation)


def test_many_short_queries_do_not_hide_long_passages(model):
    assert choose_length(model, [words(3)] * 1000, [words(30)] * 10, 0.95, None).cut_after == 0


def test_the_length_stops_at_the_models_positions(model):
    truncation = choose_length(model, [words(3)], [words(100)] * 3, 0.95, None)
    assert (model.max_seq_length, truncation.cut_after) == (64, 3)
    assert "window=64 reads them whole" in str(truncation)


def test_windows_are_suggested_only_if_they_read_more(model):
    assert choose_length(model, [words(3)], [words(100)], 0.95, 24).window is None, "the user's own length"
    add_windows(model, 32)
    assert choose_length(model, [words(3)], [words(9000)], 0.95, None).window is None


def test_short_training_texts_do_not_lower_the_bases_own_limit(model):
    assert choose_length(model, [words(1)], [words(2)], 0.95, None).length_after == 16


def test_the_users_own_length_wins(model):
    assert choose_length(model, [words(1)], [words(30)], 0.95, 24).cut_after == 1
    assert model.max_seq_length == 24


def test_more_than_the_positions_is_refused(model):
    with pytest.raises(ConfigError, match="at most 64"):
        choose_length(model, ["w1"], ["w2"], 0.95, 65)


def test_a_text_just_at_the_limit_still_embeds(model):
    choose_length(model, [words(3)], [words(100)], 0.95, None)
    assert model.encode(words(500)).shape == (32,)


def test_roberta_positions_start_after_the_padding(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    class Wrapper:
        transformers_model = RobertaModel(
            RobertaConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=8,
                max_position_embeddings=34,
                pad_token_id=1,
            )
        )
        config = transformers_model.config

    assert longest_input(Wrapper()) == 32


def mixed(cut, whole=100):
    return [words(100)] * cut + [words(20)] * (whole - cut)


def test_windows_are_chosen_where_many_passages_are_longer_than_the_positions(model):
    most = int(100 * MOSTLY_CUT)
    assert choose_window(model, mixed(most)) is None
    assert choose_window(model, mixed(most + 1)) == 64
    assert choose_window(model, []) is None
    model.prompts["document"] = "passage " * 50
    assert choose_window(model, mixed(0)) == 64, "the prompt counts"


def test_of_many_passages_a_sample_of_all_decides_on_windows(model):
    passages = mixed(2_000, 4_500)
    assert choose_window(model, sorted(passages)) == choose_window(model, sorted(passages, reverse=True)) == 64


def test_a_model_that_cannot_have_windows_or_has_its_own_gets_none(model):
    without_pooling = SentenceTransformer(modules=[model[0]], device="cpu")
    assert not takes_windows(without_pooling)
    assert choose_window(without_pooling, mixed(100)) is None
    add_windows(model, 32)
    assert choose_window(model, mixed(100)) is None
