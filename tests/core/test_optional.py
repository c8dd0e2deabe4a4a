import subprocess
import sys

import pytest

from llama_index_lora_embed.core.errors import MissingExtraError
from llama_index_lora_embed.core.optional import _EXTRA_OF, require


@pytest.mark.parametrize("module", sorted(_EXTRA_OF))
def test_each_module_of_an_extra_is_imported(module):
    if module in ("bitsandbytes", "ray", "llama_index.ingestion.ray"):  # large, and not in the extra dev
        pytest.importorskip(module)
    assert require(module).__name__ == module


def test_an_error_for_a_submodule_names_the_extra_of_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(MissingExtraError, match=r"\[report\]"):
        require("rich.table")


@pytest.mark.parametrize("module", sorted(_EXTRA_OF))
def test_a_missing_extra_names_the_install_command(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llama-index-lora-embed\[") as caught:
        require(module)
    assert isinstance(caught.value, ImportError)


@pytest.mark.slow
def test_training_and_evaluation_run_without_any_extra(tiny_model, tmp_path):
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
for module in {sorted(_EXTRA_OF)!r} + ["llama_index.embeddings.huggingface"]:
    sys.modules[module] = None
from llama_index_lora_embed import LoraFinetuneEngine, evaluate_retrieval
from tests.conftest import make_dataset
out = {str(tmp_path / "out")!r}
engine = LoraFinetuneEngine(make_dataset(), {tiny_model!r}, out, batch_size=8, epochs=1, show_progress_bar=False)
engine.finetune()
assert evaluate_retrieval(engine.get_finetuned_model(), engine.val_dataset).metrics
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_importing_the_engine_does_not_configure_logging():
    code = "import logging; from llama_index_lora_embed import LoraFinetuneEngine; "
    code += "root = logging.getLogger(); assert not root.handlers and root.level == logging.WARNING, root.handlers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
