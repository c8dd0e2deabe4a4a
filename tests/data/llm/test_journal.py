import json
import os
import subprocess
import sys

import pytest

from llama_index_lora_embed.core.errors import JournalError, JournalInUseError
from llama_index_lora_embed.data.llm.journal import Journal


def record(key, answer="an answer", ok=True):
    return {"key": key, "ok": ok, "answer": answer}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "journal.jsonl"


def test_an_answer_is_found_again_by_another_process(path):
    with Journal(path) as journal:
        journal.append([record("a", "first"), record("b", "zweite 🚀")])
        assert journal.get("a")["answer"] == "first"
    with Journal(path) as journal:
        assert "a" in journal
        assert journal.get("b")["answer"] == "zweite 🚀"
        assert "c" not in journal
        assert journal.get("c") is None


def test_the_first_usable_answer_counts_and_unusable_ones_are_counted_across_runs(path):
    with Journal(path) as journal:
        journal.append([record("a", "", ok=False)])
    with Journal(path) as journal:
        journal.append([record("a", "", ok=False), record("a", "one"), record("a", "two")])
        assert journal.unusable_answers("a") == 2
        assert journal.get("a")["answer"] == "one"
        assert journal.unusable_answers("b") == 0


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_is_moved_aside_and_the_rest_stays(path, cut):
    with Journal(path) as journal:
        journal.append([record("a", "kept"), record("b", "torn")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path) as journal:
        assert journal.get("a")["answer"] == "kept"
        assert ("b" in journal) == (cut == 1)  # only the line's end was missing
        journal.append([record("b", "again"), record("c")])
    with Journal(path) as journal:
        assert journal.get("b")["answer"] == ("torn" if cut == 1 else "again")
        assert "c" in journal
        assert journal.unreadable == 0
    torn = path.with_name(path.name + ".torn")
    assert torn.exists() == (cut > 1)


def test_lines_that_are_not_records_are_skipped_and_stay(path):
    with Journal(path) as journal:
        journal.append([record("a")])
    with open(path, "ab") as file:
        file.write(b'garbage\n{"no": "key"}\n\xff\xfe\n[1]\n\n{"key": 5}\n')
    with Journal(path) as journal:
        assert journal.unreadable == 6
        journal.append([record("b")])
    with Journal(path) as journal:
        assert "a" in journal
        assert "b" in journal
    assert b"garbage" in path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        '{"format": "llama-index-lora-embed journal", "version": 2}\n',
        '{"queries": {}}\n',
        "some text",
        "\x00\x01\x02",
        '[1, 2]\n{"key": "a"}\n',
    ],
)
def test_a_file_of_another_format_or_version_is_refused_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(JournalError, match="journal of version 1"):
        Journal(path)
    assert path.read_text() == content
    with pytest.raises(JournalError, match="journal of version 1"):  # and the lock was given back
        Journal(path)


def test_an_empty_file_becomes_a_journal(path):
    path.parent.mkdir()
    path.touch()
    with Journal(path) as journal:
        journal.append([record("a")])
        assert "a" in journal


def test_a_folder_in_its_place_is_an_error_that_names_it(tmp_path):
    with pytest.raises(JournalError, match=str(tmp_path)):
        Journal(tmp_path)


@pytest.mark.slow
def test_one_process_at_a_time(path):
    code = f"from llama_index_lora_embed.data.llm.journal import Journal; Journal({str(path)!r})"
    with Journal(path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode != 0
        assert "another run has open" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_full_disk_removes_the_half_written_line_and_says_so(path):
    code = f"""
import resource, signal
from llama_index_lora_embed.data.llm.journal import Journal
from llama_index_lora_embed.core.errors import JournalError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal({str(path)!r})
journal.append([{{"key": "a", "ok": True, "answer": "kept"}}])
resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 50, -1))
try:
    journal.append([{{"key": "b", "ok": True, "answer": "x" * 10000}}])
except JournalError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
journal.append([{{"key": "c", "ok": True, "answer": "after"}}])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "make room" in run.stdout, run.stderr
    with Journal(path) as journal:
        assert ["a" in journal, "b" in journal, "c" in journal] == [True, False, True]
        assert journal.unreadable == 0


def test_memory_does_not_grow_with_the_journal(path):
    Journal(path).close()
    with open(path, "a") as file:
        for number in range(100_000):
            file.write(json.dumps(record(f"{number:032d}", "x" * 400)) + "\n")
    assert os.path.getsize(path) > 40e6
    code = f"""
import resource, sys
from llama_index_lora_embed.data.llm.journal import Journal
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Journal({str(path)!r}) as journal:
    assert journal.get("{99_999:032d}")["answer"] == "x" * 400
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 8e6, "an index in memory would take 10 MB and more"


def test_a_link_to_the_file_is_the_same_journal(path, tmp_path):
    Journal(path).close()
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    with Journal(path), pytest.raises(JournalInUseError):
        Journal(link)


def test_a_broken_index_overwrites_no_answer(path):
    with Journal(path) as journal:
        journal._index.execute("DROP TABLE answers")
        with pytest.raises(JournalError):
            journal.append([record("a")])
        with pytest.raises(JournalError):
            journal.append([record("b")])
    with Journal(path) as journal:
        assert "a" in journal
        assert "b" in journal
        assert journal.unreadable == 0


def test_every_answer_that_was_appended_survives_a_kill(path):
    code = f"""
from itertools import count
from llama_index_lora_embed.data.llm.journal import Journal
journal = Journal({str(path)!r})
for number in count():
    journal.append([{{"key": f"{{number}}.{{part}}", "ok": True, "answer": "x" * 20_000}} for part in range(3)])
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if int(line) == 10:
                run.kill()
                break
        last = [10, *map(int, run.stdout.read().split())][-1]
    with Journal(path) as journal:
        assert all(f"{number}.{part}" in journal for number in range(last + 1) for part in range(3))
        assert journal.unreadable == 0


def test_a_read_only_folder_is_an_error_that_names_it(path):
    path.parent.mkdir()
    path.parent.chmod(0o500)
    if os.access(path.parent, os.W_OK):
        pytest.skip("this user can write everywhere")
    with pytest.raises(JournalError, match="cannot be written"):
        Journal(path)
    path.parent.chmod(0o700)
