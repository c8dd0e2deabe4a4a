import json

import pytest

from llama_index_lora_embed.data.questions.parsing import parse_queries


def texts(answer, **kwargs):
    return [query.text for query in parse_queries(answer, **kwargs)]


@pytest.mark.parametrize(
    "answer",
    [
        "What is LoRA?\nHow big is an adapter?",
        "Here are two questions:\n1. What is LoRA?\n2. How big is an adapter?",
        "Sure! Here are the queries you asked for:\n\n1) What is LoRA?\n\n2) How big is an adapter?\n\nLet me know if "
        "you would like more.",
        "- **What is LoRA?**\n- **How big is an adapter?**",
        '* "What is LoRA?"\n• “How big is an adapter?”',
        "Question 1: What is LoRA?\nQuestion 2: How big is an adapter?",
        "Q1. What is LoRA?\nQ2. How big is an adapter?",
        "(1) What is LoRA?\n(2) How big is an adapter?",
        "a) What is LoRA?\nb) How big is an adapter?",
        "<think>They want questions: 1. Why?</think>\nWhat is LoRA?\nHow big is an adapter?",
        '```json\n["What is LoRA?", "How big is an adapter?"]\n```',
        '{"queries": [{"style": "x", "query": "What is LoRA?"}, {"query": "How big is an adapter?"}]}',
        "What is LoRA?\r\nHow big is an adapter?\r\n\r\nI'm sorry, I cannot write more.",
        "What is LoRA?\nwhat  is lora?\nHow big is an adapter?",
        "What is\x00 LoRA?\n\x07How big is an adapter?\x1b",
        "1.What is LoRA?\n2.How big is an adapter?",
        "## Queries:\nWhat is LoRA?\nHow big is an adapter?\nNote: these are short.",
        "Here are two search queries this text answers\nquestion: What is LoRA?\nkeywords: How big is an adapter?",
        'Here are the queries:\n```json\n["What is LoRA?", "How big is an adapter?"]\n```',
        '["What is LoRA?", "How big is an adapter?"]\n\nLet me know!',
        '{"query": "What is LoRA?"}\n{"query": "How big is an adapter?"}',
        '[{"type": "question", "text": "What is LoRA?"}, {"question": "How big is an adapter?", "answer": "Small."}]',
        '{"question": "What is LoRA?", "keywords": "How big is an adapter?"}',
        '["What is LoRA?", "How big is an adapter?", "cut of',
        '{"queries": [{"style": "question", "query": "What is LoRA?"}, {"query": "How big is an adapter?"}, {"q',
        "[question] What is LoRA?\n(keywords) How big is an adapter?",
        "<question>What is LoRA?</question>\n<keywords>How big is an adapter?</keywords>",
        "Frage: What is LoRA?\nStichwörter: How big is an adapter?",
        "问题：What is LoRA?\n关键词：How big is an adapter?",
        '["What is LoRA? \\ud83d", "How big is an adapter?"]',
        "**1.** What is LoRA?\n**2.** **How big is an adapter?**",
        "**Q1:** What is LoRA?\n**Question 2**: How big is an adapter?",
        "**1. What is LoRA?**\n__2. How big is an adapter?__",
        '1. ***"What is LoRA?"***\n2. „How big is an adapter?“',
        "«What is LoRA?»\n「How big is an adapter?」",
        "**question:** **What is LoRA?**\n- *keywords*: `How big is an adapter?`",
        '- "What is LoRA?"\n- "How big is an adapter?',
    ],
)
def test_the_same_two_queries_are_found_in_every_format(answer):
    assert texts(answer) == ["What is LoRA?", "How big is an adapter?"]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   \n\n",
        "I'm sorry, but I can't help with that.",
        "I cannot generate questions from this text.",
        "As an AI language model, I have no access to it.",
        "Es tut mir leid, das geht nicht.",
        "抱歉，我无法回答。",
        "Here are two questions:",
        "@@@### $$$ %%% ^^^ &&&",
        "<html><body>502 Bad Gateway</body></html>",
        "12345\n67890",
        "{}",
        "[]",
        "x" * 5000,
        "[" * 100_000,
        "None",
        "N/A",
        "No queries.",
        "Unable to generate queries.",
        "I'm not able to help.",
        "The text does not contain enough information to generate search queries.",
        "Please provide the text you would like me to generate queries for.",
        "Error code: 429 - rate limit exceeded",
        '{"error": {"message": "Rate limit reached for gpt-4", "type": "requests"}}',
        "| Style | Query |\n|---|---|\n| question | how do I reset? |",
        "A: Click the button.",
        "Извините, я не могу.",
        "无法生成查询。",
        None,
        ValueError("an exception object"),
        42,
    ],
)
def test_answers_without_a_query_give_none(answer):
    assert texts(answer) == []


@pytest.mark.parametrize(
    "query",
    [
        "3D printing costs",
        "1.5 V battery life",
        "2 factor login",
        "I can't log in to my account",
        "401k rollover rules",
        "C++ move semantics",
        "什么是适配器？",
        "как настроить адаптер",
        "how do I 🚀 deploy",
        "C: drive full",
        "no questions asked return policy",
        "No refund after 30 days?",
        "What does error 404 mean?",
        "Error handling in Python",
        "Keywords for SEO",
        "`__init__` method",
        "__init__ vs __new__",
        "difference between *args and **kwargs",
        "**kwargs in a `lambda`",
        "_private attributes of a class_name_",
        '"foo" or "bar"',
        "what does 'self' or 'cls'",
        "'90s music on a 27\"",
    ],
)
def test_a_query_that_looks_like_a_list_or_a_refusal_is_kept(query):
    assert texts(query) == [query]


def test_styles_are_read_from_tags_and_json():
    lines = (
        "question: What is LoRA?\nKeywords: lora rank alpha\n**conversational**: so what is this thing?\nother: why?"
    )
    assert [(q.style, q.text) for q in parse_queries(lines)][:3] == [
        ("question", "What is LoRA?"),
        ("keywords", "lora rank alpha"),
        ("conversational", "so what is this thing?"),
    ]
    structured = json.dumps({"queries": [{"style": "Keyword search", "query": "lora rank"}]})
    assert [(q.style, q.text) for q in parse_queries(structured)] == [("keywords", "lora rank")]


def test_claims_and_titles_count_only_where_asked_for():
    answer = "Title: Search queries\nwhat is LoRA\nlora rank"
    assert texts(answer) == ["what is LoRA", "lora rank"]
    assert texts('{"title": "Search queries", "queries": ["what is LoRA"]}') == ["what is LoRA"]
    lines = "claim: LoRA adds few weights.\nTitel: LoRA im Überblick\nwhat is LoRA"
    assert [(q.style, q.text) for q in parse_queries(lines, styles=("claim", "title"))] == [
        ("claim", "LoRA adds few weights."),
        ("title", "LoRA im Überblick"),
    ]
    structured = json.dumps({"queries": [{"style": "claim", "query": "LoRA adds few weights."}]})
    assert [(q.style, q.text) for q in parse_queries(structured, styles=("claim",))] == [
        ("claim", "LoRA adds few weights.")
    ]


@pytest.mark.parametrize(
    "query", ["I can't access my account, what do I do?", "note 7 battery recall", "Sorry! board game rules"]
)
def test_a_line_with_a_style_tag_is_a_query(query):
    assert texts(f"conversational: {query}") == [query]


def test_there_are_no_more_queries_than_the_limit():
    assert texts("one thing\nanother thing\nthird thing", limit=2) == ["one thing", "another thing"]


def test_an_identifier_in_a_list_or_in_quotes_keeps_its_underscores():
    answer = "1. `__init__` method\n2. **what is `__call__`**\n3. `__slots__`\n4. '__setattr__'"
    assert texts(answer) == ["`__init__` method", "what is `__call__`", "__slots__", "__setattr__"]
