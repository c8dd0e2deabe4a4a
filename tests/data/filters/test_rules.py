import random

import pytest

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.filters.rules import QueryFilterReport, filter_queries
from tests.helpers.filters import CORPUS, HashedWords, make, run
from tests.helpers.passages import GERMAN, SHIPPING, WARRANTY


def test_good_queries_of_every_origin_stay():
    queries = [
        ("How long does a parcel to Norway take?", "shipping"),
        ("norway parcel duration", "shipping", "human"),
        ("Shipping to Norway", "shipping", "title"),
        (
            "The warranty covers faults of material for two years from the date of purchase.",
            "warranty",
            "inverse_cloze",
        ),
        (GERMAN, "password", "neighbour"),
        ("reset password of a member", "password"),
        ("👋 my battery died 🔋, is that covered by the warranty?", "warranty"),
        ("Wie lange gilt die Garantie auf die Batterie? 保修", "warranty", "human"),
    ]
    kept, report = run(make(queries))
    assert len(kept) == len(queries), str(report)
    assert report.dropped == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("???", "no letter or digit"),
        (" \n ", "no letter or digit"),
        ("🎉🎉", "no letter or digit"),
        ("How long\x00 does it take?", "control characters"),
        ("how " * 61, "more than 60 words"),
        ("保修期" * 201, "more than 600 characters"),
    ],
)
def test_unreadable_and_overlong_queries_go_but_human_written_ones_stay(text, reason):
    dataset = make([(text, "shipping"), (text, "warranty", "human"), ("How long does it take?", "shipping")])
    kept, report = run(dataset)
    assert kept == ["q1", "q2"]
    assert report.dropped == {reason: 1}
    off = QueryFilterSettings(
        unreadable=False, max_words=None, max_characters=None, other_language=False, near_duplicate_queries=None
    )
    assert run(dataset, off)[0] == ["q0", "q1", "q2"]


def test_a_neighbouring_chunk_may_be_long():
    text = " ".join(f"word{i}" for i in range(900))
    assert run(make([(text, "shipping", "neighbour"), (text + " more", "shipping", "neighbour")]))[0] == ["q0", "q1"]


def test_a_query_that_repeats_another_about_the_same_passage_goes_and_human_written_ones_stay():
    queries = [
        ("Is water damage covered?", "warranty"),
        ("is water  damage COVERED?", "warranty", "human"),
        ("Is water damage covered?", "warranty", "human"),
        ("Is water damage covered?", "shipping", "human"),
    ]
    kept, report = run(make(queries))
    assert kept == ["q1", "q3"]
    assert report.dropped == {"repeats an earlier query about the same passage": 2}
    off = QueryFilterSettings(repeated=False, near_duplicate_queries=None)
    assert run(make(queries), off)[0] == ["q0", "q1", "q2", "q3"]


def test_the_same_query_with_a_further_answer_is_no_repetition():
    dataset = make([("Is it covered?", "warranty", "human"), ("Is it covered?", "warranty", "human")])
    dataset.relevant_docs["q1"] = ["warranty", "shipping"]
    assert run(dataset)[0] == ["q0", "q1"]


def test_nearly_the_same_query_about_a_document_is_kept_once():
    queries = [
        ("How long is the link for a new password valid?", "password"),
        ("How long is the link for a new password valid", "shipping"),
        ("How long is the link for the new passwords valid?", "warranty"),
    ]
    dataset = make(queries, source_documents={"password": "manual", "shipping": "manual", "warranty": "other"})
    kept, report = run(dataset)
    assert kept == ["q0", "q2"]
    assert report.dropped == {"nearly repeats an earlier query about the same document": 1}
    assert run(dataset, QueryFilterSettings(near_duplicate_queries=None))[0] == ["q0", "q1", "q2"]


def test_queries_that_differ_in_a_number_or_a_letter_are_different():
    queries = [
        ("What was the revenue from services in the year 2020?", "warranty"),
        ("What was the revenue from services in the year 2021?", "warranty"),
        ("What is the recommended daily dose of vitamin B for adults?", "warranty"),
        ("What is the recommended daily dose of vitamin D for adults?", "warranty"),
    ]
    assert run(make(queries))[0] == ["q0", "q1", "q2", "q3"]


def test_chunks_of_a_document_may_share_its_title():
    dataset = make([("Manual", p, "title") for p in CORPUS], source_documents=dict.fromkeys(CORPUS, "manual"))
    assert len(run(dataset)[0]) == 3


def test_words_that_suit_every_passage_go():
    corpus = {f"p{i}": " ".join(random.Random(i).sample([f"w{j}" for j in range(500)], 40)) for i in range(4)}
    queries = [("What is the main topic?", p) for p in corpus] + [("What is the main topic?", "p0", "human")]
    kept, report = run(make(queries, corpus))
    assert kept == ["q4"]
    assert report.dropped == {
        "repeats an earlier query about the same passage": 1,
        "same wording for more than 3 passages": 3,
    }
    assert len(run(make(queries[:3], corpus))[0]) == 3, "three passages are not too many"
    assert len(run(make(queries, corpus), QueryFilterSettings(max_passages_per_wording=None))[0]) == 4


def test_the_first_copy_of_a_passage_keeps_its_queries():
    copy = WARRANTY.replace("two years", "two long years")
    corpus = {"no queries": WARRANTY.upper(), "first": WARRANTY, "copy": copy, "shipping": SHIPPING}
    queries = [
        ("Is water damage covered?", "copy"),
        ("How long is the battery covered?", "first"),
        ("Who pays duty?", "shipping"),
        ("who repairs it", "copy", "human"),
    ]
    settings = QueryFilterSettings(near_duplicate_passages=0.8)
    kept, report = run(make(queries, corpus), settings)
    assert kept == ["q1", "q2", "q3"]
    assert report.dropped == {"about a copy of an earlier passage": 1}
    assert len(run(make(queries, corpus), QueryFilterSettings(near_duplicate_passages=None))[0]) == 4


def test_a_query_copied_from_its_passage_goes_and_keywords_stay():
    queries = [
        ("Is a parcel above thirty kilograms travels by road freight instead of by air?", "shipping"),
        ("customs duty in advance", "shipping"),
        ("Who has to pay the customs duty in advance if the parcel weighs more than thirty kilograms?", "shipping"),
        ("a parcel above thirty kilograms travels by road freight", "shipping", "human"),
        ("The sender pays the customs duty in advance", "shipping", "inverse_cloze"),
    ]
    kept, report = run(make(queries))
    assert kept == ["q1", "q2", "q3", "q4"]
    assert report.dropped == {"copied from the passage": 1}
    assert len(run(make(queries), QueryFilterSettings(max_copied=None))[0]) == 5


def test_copying_is_checked_against_the_text_that_is_trained_against():
    query = "a parcel above thirty kilograms travels by road freight instead of by air"
    dataset = make([(query, "shipping")], training_passages={"q0": "Parcels to Norway leave on weekdays."})
    assert run(dataset)[0] == ["q0"]
    dataset.training_passages = None
    assert run(dataset)[0] == []


def test_copying_is_seen_where_no_spaces_are_written():
    passage = "光合作用是植物利用阳光把二氧化碳和水转化为有机物并释放氧气的过程，它是地球上几乎所有生命的能量来源。"
    queries = [
        ("植物利用阳光把二氧化碳和水转化为有机物并释放氧气的过程", "p"),
        ("植物为什么需要阳光才能生长和制造养分呢？", "p"),
    ]
    kept, report = run(make(queries, {"p": passage}))
    assert kept == ["q1"]
    assert report.dropped == {"copied from the passage": 1}


SPEAKING = [
    "What does the passage say about the battery?",
    "According to the document, who pays for repairs?",
    "What does the text above explain about water?",
    "Based on the provided context, how long is the battery covered?",
    "What does the author suggest about repairs?",
    "Which damage is mentioned in this excerpt?",
    "What is the text about?",
    "Was wird in diesem Abschnitt über den Akku gesagt?",
    "Laut dem Text, wer bezahlt die Reparatur?",
    "Was empfiehlt der Autor bei Wasserschäden?",
    "Selon le texte, combien de temps dure la garantie ?",
    "Que dit ce passage sur la batterie ?",
    "Según el texto, ¿cuánto dura la garantía?",
    "¿Qué menciona el autor sobre la batería?",
    "根据上述文章，保修期多长？",
    "这段文字主要讲了什么？",
    "作者认为电池怎么样？",
]
NOT_SPEAKING = [
    "how do I align the text in a cell",
    "How is text aligned in a table?",
    "Who is the author of Faust?",
    "In the context of networks, what is a port?",
    "How long is the passage through the canal?",
    "How do I sign this document?",
    "Was gilt nach dem Artikel 5 des Grundgesetzes?",
    "Wer ist der Autor von Faust?",
    "Selon l'article 5, qui doit payer ?",
    "¿Quién es el autor de Don Quijote?",
    "日本文化的特点是什么？",
    "如何从文本文件中提取关键词？",
    "红楼梦的作者是谁？",
]


@pytest.mark.parametrize("text", SPEAKING)
def test_queries_that_refer_to_the_passage_go(text):
    settings = QueryFilterSettings(other_language=False)
    kept, report = run(make([(text, "warranty"), (text, "shipping", "human")]), settings)
    assert kept == ["q1"]
    assert report.dropped == {"refers to the passage": 1}
    off = QueryFilterSettings(other_language=False, speaks_of_passage=False)
    assert run(make([(text, "warranty")]), off)[0] == ["q0"]


@pytest.mark.parametrize("text", NOT_SPEAKING)
def test_texts_and_authors_may_be_asked_about(text):
    assert run(make([(text, "warranty")]), QueryFilterSettings(other_language=False))[0] == ["q0"]


def test_a_query_in_another_language_than_its_passage_goes():
    corpus = {"german": GERMAN, "english": SHIPPING}
    queries = [
        ("Wie lange dauert es, bis ein Paket in Norwegen ankommt?", "german"),
        ("How long does it take for a parcel to arrive in Norway?", "german"),
        ("Wer muss eigentlich den Zoll für das Paket bezahlen?", "english"),
        ("谁支付关税？什么时候支付？", "english"),
        ("How long does it take until a parcel is in Norway?", "german", "human"),
        ("DHL Norwegen", "english"),
    ]
    kept, report = run(make(queries, corpus))
    assert kept == ["q0", "q4", "q5"]
    assert report.dropped == {"not in the language of its passage": 3}
    assert len(run(make(queries, corpus), QueryFilterSettings(other_language=False))[0]) == 6


def test_a_dataset_without_queries_or_origins_is_fine():
    kept, report = run(make([]), embed_model=HashedWords())
    assert (kept, report) == ([], QueryFilterReport(0, 0))
    dataset = make([("What does the passage say?", "shipping")])
    dataset.query_origins = None
    assert run(dataset)[0] == [], "a query of unknown origin counts as written"


def test_everything_else_in_the_dataset_goes_along():
    dataset = make(
        [("???", "shipping"), ("Who pays the duty?", "shipping")],
        source_documents={"shipping": "manual"},
        training_passages={"q0": "text", "q1": "text"},
        hard_negatives={"q1": ["password"]},
        relevance_scores={"q1": {"shipping": 0.5}},
    )
    result, _ = filter_queries(dataset)
    assert result == dataset.subset(["q1"], dataset.corpus)
    assert result.hard_negatives == {"q1": ["password"]}
    result.check()


def test_the_report_shows_reasons_and_some_examples():
    dataset = make([(f"{'?' * i}", "shipping") for i in range(1, 6)] + [("Who pays the duty?", "shipping")])
    _, report = filter_queries(dataset, QueryFilterSettings(examples=2))
    assert report.examples == {"no letter or digit": ["?", "??"]}
    assert str(report).splitlines() == [
        "1 of 6 queries kept",
        "  5 dropped: no letter or digit",
        "    '?'",
        "    '??'",
    ]


def test_settings_that_cannot_be_used_are_all_named():
    with pytest.raises(ConfigError) as caught:
        filter_queries(make([]), QueryFilterSettings(max_copied=0, round_trip_k=0, repeated="yes"))
    assert len(caught.value.problems) == 3
