"""One journal for all workers: locked, written once, and released."""

import os
import signal
import time

import pytest
import ray

from llama_index_lora_embed.core.errors import JournalInUseError
from llama_index_lora_embed.data import FirstOf, LLMQueryGenerator
from llama_index_lora_embed.data.llm.journal import Journal
from llama_index_lora_embed.distributed.journal import SharedJournal, shared_journals, start_journals
from tests.helpers.llms import FAST, FakeLLM, journalled

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.usefixtures("cluster")]


def test_answers_are_written_once_and_found_by_all(tmp_path):
    path = tmp_path / "journal.jsonl"
    generator = FirstOf(LLMQueryGenerator(FakeLLM(), journal=path, settings=FAST))
    with shared_journals([generator]) as actors:
        writer, reader = SharedJournal(actors[str(path)]), SharedJournal(actors[str(path)])
        first, again = ({"key": "a", "ok": True, "answer": answer} for answer in "12")
        writer.append([first, again, {"key": "b", "ok": False, "answer": ""}])
        writer.append([again])
        assert reader.get("a") == first
        assert "a" in reader
        assert "c" not in reader
        assert reader.unusable_answers("b") == 1
        with pytest.raises(JournalInUseError):
            Journal(path)
        with pytest.raises(JournalInUseError):
            start_journals([generator])
    Journal(path).close()  # released
    assert [record["answer"] for record in journalled(path)] == ["1", ""]


def test_the_journal_goes_on_when_its_process_is_killed(tmp_path):
    path = tmp_path / "journal.jsonl"
    with shared_journals([LLMQueryGenerator(FakeLLM(), journal=path, settings=FAST)]) as actors:
        journal = SharedJournal(actors[str(path)])
        journal.append([{"key": "a", "ok": True, "answer": "1"}])
        os.kill(ray.get(actors[str(path)].__ray_call__.remote(lambda actor: os.getpid())), signal.SIGKILL)
        time.sleep(0.5)
        assert SharedJournal(actors[str(path)]).get("a") is not None
        journal.append([{"key": "b", "ok": True, "answer": "2"}])
    assert [record["key"] for record in journalled(path)] == ["a", "b"]
