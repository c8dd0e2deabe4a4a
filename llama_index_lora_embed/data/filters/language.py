"""Language detection that says None rather than guess."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

_LONGEST = 500  # characters looked at; more change no result and take time
_SURE = 0.7  # of the probability; below it, short names and keywords in any language get wrong results
_FEWEST_LATIN, _FEWEST_OTHER = 12, 4  # letters
_SHARE = 0.6  # of the letters that must be of one script

# scripts of one living language with an ISO 639-1 code: the letters are enough
_SCRIPT_LANGUAGES = {
    "HANGUL": "ko",
    "GREEK": "el",
    "THAI": "th",
    "LAO": "lo",
    "KHMER": "km",
    "MYANMAR": "my",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "TAMIL": "ta",
    "TELUGU": "te",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "SINHALA": "si",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "ORIYA": "or",
}
# scripts of several languages: the model chooses among these only
_SHARED_SCRIPTS = {
    "CYRILLIC": frozenset(["ru", "uk", "bg", "be", "mk", "sr", "kk", "ky", "mn", "tg", "tt", "ba"]),
    "ARABIC": frozenset(["ar", "fa", "ur", "ps", "ug", "ku"]),
    "DEVANAGARI": frozenset(["hi", "mr", "ne", "sa"]),
    "BENGALI": frozenset(["bn", "as"]),
    "HEBREW": frozenset(["he", "yi"]),
    "ETHIOPIC": frozenset(["am", "ti"]),
}
_OTHER_SCRIPT_LANGUAGES = frozenset(_SCRIPT_LANGUAGES.values()).union(
    ["zh", "ja"], *(languages - {"ku"} for languages in _SHARED_SCRIPTS.values())
) - {"sr"}  # Serbian is written in Latin letters too

# the model's labels for varieties that users do not tell apart
_VARIETIES = {"nn": "no", "nb": "no", "pcm": "en", "ary": "ar", "arz": "ar", "ext": "es", "sdh": "ku", "hbo": "he"}
# too similar to be told apart in a short query
_ALIKE = {
    language: family[0]
    for family in (
        ("no", "da"), ("hr", "bs", "sr"), ("id", "ms"), ("cs", "sk"), ("es", "gl", "pt"), ("nl", "af", "fy"),
        ("bg", "mk"), ("hi", "mr", "ne", "sa"), ("ru", "be"),
    )
    for language in family
}  # fmt: skip

_ADDRESS = re.compile(r"https?://\S+|www\.\S+|\S+@\S+")
# characters that are frequent in Chinese and not used in Japanese
_CHINESE_ONLY = frozenset(
    "什么吗呢们这怎哪谁您她吧嗎們這麼妳從對說沒還給讓从对时说没还给让电车书长东门问间见话语请计认识业产务办动发变处"
    "图场报应实审质设论证词页预领题额风飞马验"
)
_FEWEST_HAN = 12  # a title in kanji alone is shorter


def detect(text: str) -> str | None:
    """Detect the language of a text.

    The script comes first, since few letters decide it. Where several languages share the script, a naive Bayes model
    of byte n-grams (py3langid) decides, and only if one language has at least 0.7 of the probability: for keywords,
    names and code the result is None rather than a guess.

    Args:
        text: Any text; addresses, digits, emoji and control characters are ignored.

    Returns:
        ISO 639-1 code ("no" for both kinds of Norwegian), or None where the text is too short or mixed to say.
    """
    text = _ADDRESS.sub(" ", text[:_LONGEST])
    scripts = Counter(filter(None, map(_script, text)))
    letters = scripts.total()
    if scripts["KANA"] + scripts["CJK"] >= max(2, _SHARE * letters / 2):  # one such character counts as a word
        return _east_asian(text, scripts)
    if not letters:
        return None
    script, count = scripts.most_common(1)[0]
    if count < _SHARE * letters or count < (_FEWEST_LATIN if script == "LATIN" else _FEWEST_OTHER):
        return None
    if script in _SCRIPT_LANGUAGES:
        return _SCRIPT_LANGUAGES[script]
    return _by_model(text, script)


def may_be_same(left: str | None, right: str | None) -> bool:
    """Whether two results of `detect` may be one language; False only where both are known and differ.

    Languages that a short text cannot tell apart (Danish and Norwegian, Spanish and Portuguese, ...) count as one.
    """
    return left is None or right is None or _ALIKE.get(left, left) == _ALIKE.get(right, right)


def _east_asian(text: str, scripts: Counter[str]) -> str | None:
    kana, han = scripts["KANA"], scripts["CJK"]
    if kana >= 2 and kana >= 0.1 * (kana + han):  # a Chinese text may quote a Japanese word
        return "ja"
    if kana == 0 and han < _FEWEST_HAN and not _CHINESE_ONLY.intersection(text):
        return None  # a name or a keyword; both languages write these in Han characters
    return "zh" if han >= 2 else None


def _by_model(text: str, script: str) -> str | None:
    probabilities: Counter[str] = Counter()
    for label, probability in _model().rank(" ".join(text.split())):
        probabilities[_VARIETIES.get(label, label)] += probability
    among = _SHARED_SCRIPTS.get(script) or probabilities.keys() - _OTHER_SCRIPT_LANGUAGES
    possible = [(probability, language) for language, probability in probabilities.items() if language in among]
    probability, language = max(possible, default=(0.0, ""))
    total = sum(probability for probability, _ in possible)
    # "zxx" is the model's label for no language; other codes of three letters are not ISO 639-1
    return language if len(language) == 2 and probability >= _SURE * total else None


@lru_cache(maxsize=4096)
def _script(character: str) -> str | None:
    """First word of a letter's Unicode name, which is its script; None for other characters."""
    if not unicodedata.category(character).startswith("L"):
        return None
    name = unicodedata.name(character, "").split(" ")[0]
    if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"):
        return "KANA"
    return "LATIN" if name == "FULLWIDTH" else name or None


@lru_cache(maxsize=1)
def _model() -> Any:
    """py3langid's model, loaded only where a text needs it: it takes a second and 100 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
