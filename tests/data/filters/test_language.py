import pytest

from llama_index_lora_embed.data.filters.language import detect, may_be_same
from tests.helpers.passages import GERMAN, SHIPPING, WARRANTY


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("How long does it take for a parcel to arrive?", "en"),
        ("Wie lange dauert es, bis das Paket ankommt?", "de"),
        ("Combien de temps faut-il pour que le colis arrive ?", "fr"),
        ("¿Cuánto tiempo tarda en llegar el paquete?", "es"),
        ("什么是光合作用？", "zh"),
        ("iPhone 15 的电池容量是多少", "zh"),
        ("光合成とは何ですか", "ja"),
        ("광합성이란 무엇인가요", "ko"),
        ("τι είναι αυτό", "el"),
        ("การสังเคราะห์", "th"),
        ("Сколько времени идёт посылка до Москвы и кто платит пошлину?", "ru"),
        ("كم من الوقت يستغرق وصول الطرد إلى النرويج؟", "ar"),
        ("पार्सल को नॉर्वे पहुँचने में कितना समय लगता है और शुल्क कौन देता है?", "hi"),
        ("How long does it take?\x00\x07 👩‍👩‍👧 does anybody know?", "en"),
    ],
)
def test_languages_are_known_by_their_script_or_their_words(text, language):
    assert detect(text) == language
    assert detect(text) == language


@pytest.mark.parametrize(
    "text", ["", " \n", "\x00\x01", "🎉🎉", "12345", "OK", "東京都", "DHL API v2", "α=0.05", "\ud800"]
)
def test_too_little_text_has_no_language(text):
    assert detect(text) is None
    assert may_be_same(detect(text), detect(GERMAN))


def test_only_known_and_different_languages_are_different():
    def same_language(left, right):
        return may_be_same(detect(left), detect(right))

    assert same_language(SHIPPING, WARRANTY)
    assert not same_language(SHIPPING, GERMAN)
    assert same_language("fibromyalgia symptoms", GERMAN)
    danish, norwegian = "Hvad er hovedstaden i Danmark?", "Hva er hovedstaden i Norge?"
    assert (detect(danish), detect(norwegian)) == ("da", "no")
    assert same_language(danish, norwegian)
