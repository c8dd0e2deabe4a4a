import codecs
import gzip
import json
import uuid

import datasets
import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.questions.query_log import dataset_from_pairs
from llama_index_lora_embed.data.readers.query_logs import Pair, read_pairs, read_queries

MIXED = "Wie geht's? 你好吗 مرحبا שלום здравствуйте 👩‍👩‍👧 नमस्ते"


def written(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def beir(folder, *, corpus=None, queries=None, qrels="query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td2\t1\n"):
    corpus = corpus or [
        {"_id": "d1", "title": "Invoices", "text": "They are sent monthly.", "metadata": {}},
        {"_id": "d2", "title": "", "text": "Refunds take a week."},
        {"_id": "d3", "title": "Nobody asks", "text": "Not judged."},
    ]
    queries = queries or [{"_id": "q1", "text": "when do bills come"}, {"_id": "q2", "text": "how long is a refund"}]
    written(folder / "corpus.jsonl", as_lines(corpus))
    written(folder / "queries.jsonl", as_lines(queries))
    written(folder / "qrels" / "train.tsv", qrels)
    return folder


def pairs_of(*source, **arguments):
    return [pair for _, pair in read_pairs(*source, **arguments)[0]]


def texts_of(dataset):
    """Query text to the texts of its answers."""
    return {dataset.queries[q]: [dataset.corpus[p] for p in ids] for q, ids in dataset.relevant_docs.items()}


def negatives_of(dataset):
    return {dataset.queries[q]: [dataset.corpus[p] for p in ids] for q, ids in (dataset.hard_negatives or {}).items()}


@pytest.mark.parametrize(
    ("query", "passage"),
    [
        ("query", "passage"),
        ("question", "answer"),
        ("anchor", "positive"),
        ("sentence1", "sentence2"),
        ("Sentence_1", "SENTENCE-2"),
        ("User Query", "Context"),
        ("search_query", "document"),
        ("q", "text"),
        ("query_text", "chunk"),
        ("utterance", "response"),
        ("prompt", "content"),
    ],
)
def test_usual_names_of_query_and_passage_are_recognised(tmp_path, query, passage):
    path = written(tmp_path / "log.csv", f"number,{query},{passage}\n1,how?,so\n")
    assert pairs_of(path) == [Pair("how?", "so")]


@pytest.mark.parametrize("name", ["node_id", "Doc_ID", "chunk_id", "document_id", "passageId", "corpus-id"])
def test_usual_names_of_the_node_id_are_recognised(tmp_path, name):
    path = written(tmp_path / "log.csv", f"query,{name}\nhow?,n7\n")
    assert pairs_of(path) == [Pair("how?", None, "n7")]


@pytest.mark.parametrize("name", ["label", "Score", "relevance", "rating", "grade", "is_relevant"])
def test_usual_names_of_the_label_are_recognised(tmp_path, name):
    path = written(tmp_path / "log.csv", f"query,passage,{name}\na,b,0.5\n")
    assert [pair.score for pair in pairs_of(path)] == [0.5]


@pytest.mark.parametrize("name", ["url", "source", "File Name", "source_document", "file_path"])
def test_usual_names_of_the_source_document_are_recognised(tmp_path, name):
    path = written(tmp_path / "log.csv", f"query,passage,{name}\na,b,handbook.pdf\n")
    assert [pair.source_document for pair in pairs_of(path)] == ["handbook.pdf"]


@pytest.mark.parametrize("name", ["negative", "neg", "hard_negative", "negative_1", "negative3", "Negative Passage"])
def test_usual_names_of_negatives_are_recognised(tmp_path, name):
    path = written(tmp_path / "log.csv", f"query,passage,{name}\na,b,wrong\n")
    assert [pair.negatives for pair in pairs_of(path)] == [("wrong",)]


def test_a_chunk_id_is_the_node_and_a_document_id_beside_it_the_source(tmp_path):
    path = written(tmp_path / "log.csv", "query,chunk_id,document_id\na,c1,d1\n")
    assert pairs_of(path) == [Pair("a", None, "c1", source_document="d1")]


def test_several_negative_columns_are_all_read_in_their_order():
    rows = [{"anchor": "a", "positive": "b", "negative_2": "y", "negative_1": "x", "negative_10": None}]
    assert [pair.negatives for pair in pairs_of(rows)] == [("y", "x")]


def test_lists_of_positives_and_negatives_become_pairs(tmp_path):
    rows = [
        {"query": "a", "pos": ["b", "c"], "neg": ["x", "", "y"]},
        {"query": "d", "positive_passages": [{"docid": "1", "title": "T", "text": "e"}], "neg": None},
    ]
    rows = [rows[0], {"query": "d", "pos": rows[1]["positive_passages"]}]
    assert pairs_of(written(tmp_path / "flag.jsonl", as_lines(rows))) == [
        Pair("a", "b", negatives=("x", "y")),
        Pair("a", "c", negatives=("x", "y")),
        Pair("d", "T\ne"),
    ]


def test_columns_are_taken_as_they_are_named(tmp_path):
    path = written(tmp_path / "log.csv", "Suchanfrage,Absatz,text,source\nwie?,so,other,web\n")
    columns = {"query": "Suchanfrage", "passage": "Absatz", "source_document": None}
    assert pairs_of(path, columns=columns) == [Pair("wie?", "so")]


def test_unknown_columns_are_an_error_that_says_how_to_name_them(tmp_path):
    path = written(tmp_path / "log.csv", "Suchanfrage,Absatz\nwie?,so\n")
    with pytest.raises(ConfigError, match="'Suchanfrage', 'Absatz'") as caught:
        read_pairs(path)
    assert "columns={" in str(caught.value)
    assert "question" in caught.value.problems[0]
    assert "positive" in caught.value.problems[1]


def test_every_wrong_name_is_named_at_once(tmp_path):
    path = written(tmp_path / "log.csv", "a,b\n1,2\n")
    with pytest.raises(ConfigError) as caught:
        read_pairs(path, columns={"query": "lost", "answer": "b", "passage": "gone"})
    text = "\n".join(caught.value.problems)
    assert all(part in text for part in ("columns['answer']", "'lost'", "'gone'"))
    with pytest.raises(ConfigError, match="a dict"):
        read_pairs(path, columns=["a", "b"])


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_separators_are_told_apart_and_quotes_kept(tmp_path, mark, suffix):
    long = 'He said ""no"",\nthen; left\t| again'
    path = written(tmp_path / f"log{suffix}", f'"query"{mark}passage{mark}label\r\nwhy?{mark}"{long}"{mark}1\r\n')
    assert pairs_of(path) == [Pair("why?", long.replace('""', '"'))]


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.csv.gz", "log.jsonl.gz"])
def test_a_byte_order_mark_and_every_script_are_read(tmp_path, name):
    text = (
        f"query,passage\n{MIXED},{MIXED}!\n" if "csv" in name else as_lines([{"query": MIXED, "passage": f"{MIXED}!"}])
    )
    data = codecs.BOM_UTF8 + text.encode()
    path = written(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    dataset, _ = dataset_from_pairs(path)
    assert texts_of(dataset) == {MIXED: [f"{MIXED}!"]}
    dataset.save_json(tmp_path / "dataset.json")
    assert EmbeddingQAFinetuneDataset.from_json(tmp_path / "dataset.json") == dataset


def test_control_characters_stay_and_cells_without_a_visible_character_are_empty():
    dataset, report = dataset_from_pairs([("a\x07b", "c\x00d"), ("\x00\u200b", "e"), ("f", " \x01 "), ("g", "\ufeff")])
    assert texts_of(dataset) == {"a\x07b": ["c\x00d"]}
    assert report.skipped == {"row without query": 1, "row without passage": 2}


def test_a_torn_last_line_is_counted_with_its_number(tmp_path):
    path = written(tmp_path / "log.jsonl", '{"query": "a", "passage": "b"}\n\n{"query": "c", "pass')
    dataset, report = dataset_from_pairs(path)
    assert texts_of(dataset) == {"a": ["b"]}
    assert report.skipped == {"row that cannot be read": 1}
    assert report.places[0].startswith("log.jsonl, line 3: ")
    assert len(pairs_of(path)) == 1


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_bytes_that_are_not_utf8_are_counted_with_file_and_line(tmp_path, name):
    lines = ["query,passage", "a,b", "caf\xe9,x", "c,d"]
    if name.endswith("jsonl"):
        lines = [""] + [json.dumps({"query": q, "passage": p}, ensure_ascii=False) for q, p in
                        (line.split(",") for line in lines[1:])]  # fmt: skip
    dataset, report = dataset_from_pairs(written(tmp_path / name, "\n".join(lines), "latin-1"))
    assert texts_of(dataset) == {"a": ["b"], "c": ["d"]}
    assert report.places == [f"{name}, line 3: text that is not UTF-8"]
    assert report.rows == 3


def test_half_a_surrogate_pair_in_json_is_counted():
    _, report = dataset_from_pairs([("a", "b"), ("\ud83d", "c")])
    assert report.skipped == {"text that is not UTF-8": 1}


def test_utf16_is_refused_with_a_hint(tmp_path):
    with pytest.raises(DatasetError, match="Save it as UTF-8"):
        read_pairs(written(tmp_path / "log.csv", "query,passage\na,b\n", "utf-16"))


def test_a_table_row_with_missing_cells_is_counted(tmp_path):
    path = written(tmp_path / "log.csv", "query,passage,label\na,b,1\nc,d\ne,f,1,,\n,,\ng,h,1,extra\n")
    dataset, report = dataset_from_pairs(path)
    assert texts_of(dataset) == {"a": ["b"], "e": ["f"]}
    assert report.places[0] == "log.csv, line 3: row that cannot be read (2 cells under 3 columns)"
    assert report.skipped == {"row that cannot be read": 2}


def test_a_quote_that_is_never_closed_is_counted_and_swallows_nothing_silently(tmp_path):
    path = written(tmp_path / "log.csv", 'query,passage\na,b\nc,"d\ne,f\n')
    dataset, report = dataset_from_pairs(path)
    assert texts_of(dataset) == {"a": ["b"]}
    assert report.places[0].startswith("log.csv, lines 3 to 4: ")


def test_a_gzip_file_that_breaks_off_is_read_up_to_there(tmp_path):
    rows = [{"query": f"question {i} {uuid.UUID(int=i * 7919**9)}", "passage": str(i)} for i in range(2000)]
    path = written(tmp_path / "log.jsonl.gz", gzip.compress(as_lines(rows).encode())[:-400])
    dataset, report = dataset_from_pairs(path)
    assert 1000 < len(dataset.queries) < 2000
    assert report.skipped["rest of a file that cannot be read"] == 1


def test_a_json_list_is_read_in_one_line_or_many(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    for name, indent in (("one.json", None), ("many.json", 2)):
        assert len(pairs_of(written(tmp_path / name, json.dumps(rows, indent=indent)))) == 2


def test_lines_of_json_lists_are_pairs(tmp_path):
    path = written(tmp_path / "log.jsonl", '["a", "b"]\n["c", "d", 0]\n5\n[1]\n')
    found, report = read_pairs(path)
    assert [pair for _, pair in found] == [Pair("a", "b"), Pair("c", "d", score=0.0)]
    assert report.skipped.total() == 2


def test_grades_are_divided_by_the_largest():
    dataset, report = dataset_from_pairs([("a", "x", 3), ("a", "y", 1.5), ("b", "x", "1"), ("b", "z", 0)])
    scores = {dataset.corpus[p]: s for p, s in next(iter((dataset.relevance_scores or {}).values())).items()}
    assert scores == {"y": 0.5}
    assert report.largest_grade == 3
    assert {dataset.score(q, p) for q, ids in dataset.relevant_docs.items() for p in ids} == {1.0, 0.5, 1 / 3}
    assert negatives_of(dataset) == {"b": ["z"]}


def test_scores_up_to_one_are_kept():
    assert [pair.score for pair in pairs_of([("a", "b", 0.25), ("a", "c", 0.5), ("a", "d")])] == [0.25, 0.5, 1.0]


def test_labels_in_words_and_invalid_labels():
    rows = [("a", "b", True), ("a", "c", "no"), ("a", "d", -1), ("a", "e", "maybe"), ("a", "f", ""), ("a", "g", "inf")]
    dataset, report = dataset_from_pairs(rows)
    assert texts_of(dataset) == {"a": ["b"]}
    assert negatives_of(dataset) == {"a": ["c", "d"]}
    assert report.skipped == {"label that is not a number": 2, "row with an empty label": 1}
    assert (report.pairs, report.negatives) == (1, 2)


def test_a_dataset_of_the_hub_is_read():
    data = datasets.Dataset.from_dict(
        {"anchor": ["a", "b", None], "positive": ["x", "y", "z"], "negative": ["p", "q", "r"], "label": [1, 2, 2]}
    )
    dataset, report = dataset_from_pairs(data)
    assert texts_of(dataset) == {"a": ["x"], "b": ["y"]}
    assert negatives_of(dataset) == {"a": ["p"], "b": ["q"]}
    assert report.skipped == {"row without query": 1}
    assert report.columns == {"query": "anchor", "passage": "positive", "score": "label", "negatives": "negative"}
    both = datasets.DatasetDict({"train": data, "test": data.select([0])})
    assert len(pairs_of(both, split="test")) == 1
    with pytest.raises(ConfigError, match="'train', 'test'"):
        read_pairs(both, split="dev")
    assert len(pairs_of(data.to_iterable_dataset().take(2))) == 2


def test_a_parquet_file_is_read_twice_with_its_rows_named(tmp_path):
    rows = {
        "query": ["a", "b", None],
        "node_id": ["007", "8", "9"],
        "answers": [["x"], ["y", "z"], []],
        "label": [3, 1, 3],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "log.parquet")
    dataset, report = dataset_from_pairs(tmp_path / "log.parquet", columns={"passage": "answers"})
    assert texts_of(dataset) == {"a": ["x"], "b": ["y", "z"]}
    assert "007" in dataset.corpus
    assert report.largest_grade == 3
    assert report.places == ["log.parquet, row 3: row without query"]


def test_a_data_frame_is_read_by_row():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"query": ["a", "b", None], "node_id": [7, 8, None], "text": ["x", None, "y"]})
    found, report = read_pairs(frame)
    assert [pair for _, pair in found] == [Pair("a", "x", "7"), Pair("b", None, "8")]
    assert report.counts == "row without query: 1"


def test_a_generator_is_read_although_grades_need_two_readings():
    made = (
        row for row in [("a", "b", 4), ("c", "d", 2), "no pair", {"query": "e", "passage": "f", "id": uuid.uuid4()}]
    )
    found, report = read_pairs(made)
    assert [pair.score for _, pair in found] == [1.0, 0.5, 1.0]
    assert "neither a mapping" in report.counts


def test_a_beir_folder_is_read_with_titles_ids_and_grades(tmp_path):
    dataset, report = dataset_from_pairs(beir(tmp_path))
    assert dataset.corpus == {"d1": "Invoices\nThey are sent monthly.", "d2": "Refunds take a week."}
    assert list(dataset.relevant_docs.values()) == [["d1"], ["d2"]]
    assert list(dataset.hard_negatives.values()) == [["d2"]]
    assert [list(scores.values()) for scores in dataset.relevance_scores.values()] == [[0.5]]
    assert report.rows == 3
    assert not report.skipped


def test_what_is_wrong_in_a_beir_folder_is_counted_with_file_and_line(tmp_path):
    corpus = [{"_id": "d1", "text": "one"}, {"_id": "d1", "text": "another"}]
    folder = beir(tmp_path, corpus=corpus, qrels="query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\tgone\t1\nq2\nq2\td1\tx\n")
    dataset, report = dataset_from_pairs(folder)
    assert dataset.corpus == {"d1": "one"}
    assert report.skipped == {
        "row that cannot be read": 1,
        "id that has another text already": 1,
        "qrel of a query or passage that does not exist": 1,
        "label that is not a number": 1,
    }
    assert "corpus.jsonl, line 2: id that has another text already" in report.places
    assert "train.tsv, line 5: label that is not a number" in report.places


def test_a_folder_without_beir_files_says_what_is_missing(tmp_path):
    with pytest.raises(DatasetError) as caught:
        read_pairs(tmp_path)
    assert caught.value.problems == ["no corpus.jsonl", "no queries.jsonl", "no qrels/train.tsv"]
    with pytest.raises(DatasetError, match="splits: train"):
        read_pairs(beir(tmp_path), split="test")


@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl", "log.json"])
@pytest.mark.parametrize("content", [b"", b"\n\n", codecs.BOM_UTF8])
def test_an_empty_file_is_a_dataset_error(tmp_path, name, content):
    with pytest.raises(DatasetError, match="without a usable row"):
        dataset_from_pairs(written(tmp_path / name, content))


def test_missing_files_and_sources_of_another_kind_are_named(tmp_path):
    with pytest.raises(DatasetError, match="nowhere"):
        read_pairs(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match=r"\.jsonl"):
        read_pairs(written(tmp_path / "log.xlsx", "x"))
    with pytest.raises(DatasetError, match="rest of a file that cannot be read"):
        read_pairs(written(tmp_path / "log.parquet", "x"))
    for source in (5, None, b"log.csv"):
        with pytest.raises(ConfigError, match=type(source).__name__):
            read_pairs(source)


def test_queries_are_read_from_lists_mappings_tables_and_lines_of_text(tmp_path):
    texts = ["how to pay", MIXED]
    rows = [{"user_query": text, "clicks": 3} for text in texts]
    expected = [(None, text) for text in texts]
    sources = [
        texts,
        iter(texts),
        rows,
        datasets.Dataset.from_list(rows),
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}),
        [(text, "a passage") for text in texts],
        written(tmp_path / "log.jsonl", as_lines(rows)),
        written(tmp_path / "log.csv", "id,query\n" + "".join(f'1,"{text}"\n' for text in texts)),
        str(written(tmp_path / "log.txt", codecs.BOM_UTF8 + "\r\n".join(texts).encode())),
    ]
    for source in sources:
        assert read_queries(source)[0] == expected
    assert read_queries({"a": texts[0], 7: texts[1]})[0] == [("a", texts[0]), ("7", texts[1])]
    assert read_queries([{"x": "typed", "query": "no"}], column="x")[0] == [(None, "typed")]


def test_rows_without_a_query_are_counted_with_their_place(tmp_path):
    log = written(tmp_path / "log.txt", b"first\n\n \xff\nlast\n")
    found, report = read_queries(log)
    assert [text for _, text in found] == ["first", "last"]
    assert report.rows == 4
    assert report.places == ["log.txt, line 2: row without query", "log.txt, line 3: text that is not UTF-8"]
    assert read_queries(["a", None, 3.0, ["b"], []])[0] == [(None, text) for text in ("a", "3", "b")]
    with pytest.raises(ConfigError, match="the columns 'clicks'"):
        read_queries([{"clicks": 1}])
