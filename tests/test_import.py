import subprocess
import sys

import pytest

import llama_index_lora_embed


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, llama_index_lora_embed as package; "
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'peft', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_constructing_an_engine_imports_no_torch(tmp_path, tiny_model):
    code = (
        "import sys; from llama_index_lora_embed import LoraFinetuneEngine; "
        "data = dict(queries={'q': 'a'}, corpus={'p': 'c', 's': 'd'}, relevant_docs={'q': ['p']}); "
        f"LoraFinetuneEngine(data, {tiny_model!r}, {str(tmp_path / 'out')!r}, val_fraction=0); "
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'peft'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    # -S would hide the package; an installed llama-index-finetuning imports torch by itself and is hidden instead
    hide = "import sys; sys.modules['llama_index.finetuning'] = None; "
    done = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", llama_index_lora_embed.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(llama_index_lora_embed, name).__doc__


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="Lora2"):
        _ = llama_index_lora_embed.Lora2
