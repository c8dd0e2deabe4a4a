"""Every notebook under examples/ runs from a clean kernel in an empty folder."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# parts of the output that each notebook has to show
SHOWN = {
    "1_finetune_and_index": ["nodes in the collection", "WrongIndexError", "heuristic queries"],
    "2_is_it_better": ["hit@5", "LLM-written queries", "image/png", "v2 against the promoted version v1"],
    "3_coming_from_llama_index_finetuning": ["hit rate", "base", "tuned"],
    "4_several_domains_one_base": ["largest difference: ", "library", "base"],
    "5_qwen3_on_a_gpu": ["lasttoken", "Instruct: Given a web search query", "tuned"],
}


def test_every_notebook_has_expected_outputs():
    assert {path.stem for path in NOTEBOOKS} == SHOWN.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert path.stat().st_size < 20_000


LONG = {*SHOWN} - {"5_qwen3_on_a_gpu"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.extended] if path.stem in LONG else []) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_from_a_clean_kernel(path, tmp_path):
    for file in (path, EXAMPLES / "python_queries.json"):
        shutil.copy(file, tmp_path)
    notebook = nbformat.read(tmp_path / path.name, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "\n".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    for part in SHOWN[path.stem]:
        assert part in printed, part
    if path.stem.startswith("4_"):
        difference = printed.split("largest difference: ")[1].split("\\n")[0]
        assert float(difference) < 1e-5
