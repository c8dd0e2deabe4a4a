"""Prompts for query generation, as LlamaIndex templates, in the language of the node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llama_index.core.prompts import PromptTemplate

Style = Literal["question", "keywords", "paraphrase", "conversational", "claim", "title"]
STYLES: tuple[Style, ...] = ("question", "keywords", "paraphrase", "conversational")
"""The default styles. Claims and titles suit collections that are searched with them: facts to check, literature."""

_STYLES: dict[str, dict[Style, str]] = {
    "en": {
        "question": "a plain question, as typed into a search box",
        "keywords": "two to five search words, no sentence",
        "paraphrase": "a question that avoids the text's own words wherever other words exist",
        "conversational": "what somebody would casually ask a colleague in a chat",
        "claim": "a short statement that the text confirms, as typed in to check a fact, no question",
        "title": "a short title, as typed in to find a text on this subject, no sentence",
    },
    "de": {
        "question": "eine schlichte Frage, wie man sie in ein Suchfeld tippt",
        "keywords": "zwei bis fünf Suchwörter, kein Satz",
        "paraphrase": "eine Frage, die die Wörter des Textes meidet, wo es andere gibt",
        "conversational": "was jemand eine Kollegin beiläufig im Chat fragen würde",
        "claim": "eine kurze Behauptung, die der Text bestätigt, wie man sie zum Nachprüfen eingibt, keine Frage",
        "title": "ein kurzer Titel, wie man ihn eingibt, um einen Text zu diesem Thema zu finden, kein Satz",
    },
    "fr": {
        "question": "une question simple, comme on la tape dans une barre de recherche",
        "keywords": "de deux à cinq mots de recherche, sans phrase",
        "paraphrase": "une question qui évite les mots du texte chaque fois qu'il en existe d'autres",
        "conversational": "ce qu'on demanderait en passant à un collègue dans une messagerie",
        "claim": "une courte affirmation que le texte confirme, comme on la tape pour la vérifier, pas de question",
        "title": "un titre court, comme on le tape pour trouver un texte sur ce sujet, sans phrase",
    },
    "es": {
        "question": "una pregunta sencilla, como se escribe en un buscador",
        "keywords": "de dos a cinco palabras de búsqueda, sin frase",
        "paraphrase": "una pregunta que evita las palabras del texto siempre que existan otras",
        "conversational": "lo que alguien preguntaría de pasada a un compañero en un chat",
        "claim": "una afirmación breve que el texto confirma, como se escribe para comprobarla, sin pregunta",
        "title": "un título corto, como se escribe para encontrar un texto sobre este tema, sin frase",
    },
    "zh": {
        "question": "像在搜索框里输入的简单问题",
        "keywords": "两到五个搜索词，不成句",
        "paraphrase": "尽量不用原文词语、换一种说法的问题",
        "conversational": "同事之间聊天时随口会问的话",
        "claim": "一句能由这段文字证实的简短论断，像是输入来核实的，不是问句",
        "title": "一个简短的标题，像是输入来查找这一主题的文章的，不成句",
    },
}

_SEARCH = {
    "en": """\
People look for information with a search engine. They have not seen the text below, but it holds what they need.

Text:
---
{context_str}
---

Write {num_questions_per_chunk} different search queries that this text answers{language_note}. Each must make sense to
somebody who cannot see the text: name the thing it is about, and never mention "the text", "the passage" or "the
document". Kinds of query:
{styles}

One query a line, its kind in front, nothing else. Like this:
{example}
""",
    "de": """\
Menschen suchen mit einer Suchmaschine. Den Text unten haben sie nicht gesehen, aber in ihm steht, was sie brauchen.

Text:
---
{context_str}
---

Schreibe {num_questions_per_chunk} verschiedene Suchanfragen, die dieser Text beantwortet. Jede muss ohne den Text
verständlich sein: Nenne die Sache, um die es geht, und erwähne nie „den Text“, „den Abschnitt“ oder „das Dokument“.
Arten von Anfragen:
{styles}

Eine Anfrage pro Zeile, davor ihre Art, sonst nichts. So:
{example}
""",
    "fr": """\
Des gens cherchent une information avec un moteur de recherche. Ils n'ont pas vu le texte ci-dessous, mais il contient
ce qu'il leur faut.

Texte :
---
{context_str}
---

Écris {num_questions_per_chunk} requêtes différentes auxquelles ce texte répond. Chacune doit se comprendre sans le
texte : nomme ce dont il s'agit et ne parle jamais du « texte », du « passage » ni du « document ». Sortes de requêtes :
{styles}

Une requête par ligne, précédée de sa sorte, rien d'autre. Ainsi :
{example}
""",
    "es": """\
La gente busca información con un buscador. No ha visto el texto de abajo, pero en él está lo que necesita.

Texto:
---
{context_str}
---

Escribe {num_questions_per_chunk} búsquedas distintas que este texto responda. Cada una debe entenderse sin el texto:
nombra aquello de lo que trata y no menciones nunca «el texto», «el pasaje» ni «el documento». Clases de búsqueda:
{styles}

Una búsqueda por línea, con su clase delante, nada más. Así:
{example}
""",
    "zh": """\
人们用搜索引擎查找信息。他们没有看过下面的文字，但文字里有他们需要的内容。

文字：
---
{context_str}
---

请写出 {num_questions_per_chunk} 条不同的搜索查询，每条都能由这段文字回答。
看不到这段文字的人也要能看懂：请写明所指的对象，不要提到“本文”“这段文字”或“文档”。查询的种类：
{styles}

每行一条查询，前面写明种类，不要写别的内容。格式如下：
{example}
""",
}

EXAM_PROMPT = """\
Material for a course:
---------------------
{context_str}
---------------------

You teach this course. Using the material alone, write {num_questions_per_chunk} varied questions for an examination,
one a line.
"""
"""Asks for exam questions, as the default prompt of llama-index-finetuning does. They differ from what users type."""

JUDGE_PROMPT = """\
Search query: {query_str}

Text:
---
{context_str}
---

Does the text answer the query? Say yes or no, one word.
"""
"""Asks whether a passage answers a query."""


def search_prompt(styles: Sequence[Style], count: int, language: str | None = None) -> PromptTemplate:
    """A template with {context_str} and {num_questions_per_chunk} that asks for search queries of these styles.

    Its example shows `count` lines with the styles in turn. If there is no prompt in the language (ISO 639-1), the
    English one asks for queries in the language of the text.
    """
    known = language if language in _SEARCH else "en"
    return PromptTemplate(
        _SEARCH[known],
        styles="\n".join(f"- {style}: {_STYLES[known][style]}" for style in styles),
        example="\n".join(f"{styles[number % len(styles)]}: ..." for number in range(count)),
        language_note="" if language in (None, known) else ", in the language of the text",
    )
