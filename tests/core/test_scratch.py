import os
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_index_lora_embed.core.errors import OutputDirectoryError
from llama_index_lora_embed.core.scratch import ScratchTexts, scratch_array
from tests.helpers.full_disk import full_disk


def open_files(folder):
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [place for link in links if (place := os.readlink(link)).startswith(str(folder))]


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_array_is_zeros_until_it_is_written(tmp_path, in_memory):
    array = scratch_array((3, 4), np.int64, None if in_memory else tmp_path)
    assert array.shape == (3, 4)
    assert not array.any()
    array[1] = 7
    assert array.sum() == 28


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_file_has_no_name_and_is_gone_with_what_it_held(tmp_path):
    array = scratch_array((1000,), np.uint32, tmp_path)
    with ScratchTexts(tmp_path) as texts:
        texts.append("text")
        assert list(tmp_path.iterdir()) == []
        assert len(open_files(tmp_path)) == 2
    del array
    assert open_files(tmp_path) == []


def test_texts_come_back_by_number_in_any_order(tmp_path):
    with ScratchTexts(tmp_path) as texts:
        for text in ("first", "", "Größe 🎉\n", "broken \ud800"):
            texts.append(text)
        assert [texts[number] for number in (3, 0, 2, 1)] == ["broken ?", "first", "Größe 🎉\n", ""]
        assert len(texts) == 4


def test_a_full_disk_is_an_error_before_a_mapped_page_is_written(tmp_path):
    assert scratch_array((1000,), np.int64, tmp_path).size == 1000
    with full_disk(10_000), pytest.raises(OutputDirectoryError, match=r"0 MB cannot be written.*Free some space"):
        scratch_array((10_000,), np.int64, tmp_path)


@pytest.mark.parametrize("size", [1000, 4000])
def test_a_full_disk_is_an_error_when_texts_are_written_or_read(tmp_path, size):
    def write_and_read():
        with ScratchTexts(tmp_path) as texts:
            for _ in range(12_000 // size):
                texts.append("x" * size)
            texts[0]

    with full_disk(10_000), pytest.raises(OutputDirectoryError, match="Free some space"):
        write_and_read()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputDirectoryError, match="file"):
        scratch_array((10,), np.int64, tmp_path / "file")
    with pytest.raises(OutputDirectoryError, match="nowhere"):
        ScratchTexts(tmp_path / "nowhere")
