import errno
import os

import pytest

from llama_index_lora_embed.service import files as files_module
from llama_index_lora_embed.service.errors import ServiceError


def test_a_file_lies_under_its_random_id_whatever_its_name(services):
    row = services.files.add([b"one ", b"two"], "../../etc/passwd", owner="t1")
    path = services.files.path(row)
    assert path.parent == services.settings.files_dir
    assert path.name == row.id
    assert path.read_bytes() == b"one two"
    assert (row.bytes, row.filename) == (7, "../../etc/passwd")
    assert os.listdir(services.settings.files_dir) == [row.id]


def test_a_file_is_seen_and_deleted_by_its_owner(services):
    row = services.files.add([b"x"], "a", owner="t1")
    for call in (services.files.get, services.files.delete):
        with pytest.raises(ServiceError) as caught:
            call(row.id, "t2")
        assert caught.value.status == 404
    services.files.delete(row.id, "t1")
    assert os.listdir(services.settings.files_dir) == []
    with pytest.raises(ServiceError):
        services.files.get(row.id)


def test_pages_of_files_hold_each_once(services):
    made = [services.files.add([b"x"], str(number), owner="t1").id for number in range(5)]
    first, more = services.files.list("t1", limit=3)
    rest, end = services.files.list("t1", limit=3, after=first[-1].id)
    assert [row.id for row in first + rest] == made[::-1]
    assert (more, end) == (True, False)
    assert services.files.list("t2") == ([], False)


def test_a_file_that_is_too_large_leaves_nothing(services, monkeypatch):
    monkeypatch.setattr(services.files, "settings", services.settings.model_copy(update={"max_upload_bytes": 10}))
    with pytest.raises(ServiceError, match="more than 10 bytes") as caught:
        services.files.add([b"12345", b"678901"], "a", owner="t1")
    assert caught.value.code == "file_too_large"
    assert os.listdir(services.settings.files_dir) == []
    assert services.files.list() == ([], False)


def test_a_full_disk_is_an_answer_and_leaves_nothing(services, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files_module.whole_file.__globals__["os"], "fsync", full)
    with pytest.raises(ServiceError, match="No space left") as caught:
        services.files.add([b"x"], "a", owner="t1")
    assert (caught.value.status, caught.value.code) == (507, "disk_full")
    assert os.listdir(services.settings.files_dir) == []
