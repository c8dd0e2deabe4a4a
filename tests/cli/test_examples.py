"""Every example of every help page is executed."""

import pytest

from tests.helpers.cli import examples, lora_embed

INPUT = {"lora-embed label": "3\n0\n" * 200}


ELSEWHERE = (
    *("lora-embed serve", "lora-embed worker"),  # they run until they are stopped: test_serve.py
    "lora-embed train --config run.yaml --launcher torchrun --num-workers 2",  # tests/engines/test_launcher.py
)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in examples() if line not in ELSEWHERE])
def test_an_example_of_a_help_page_runs(line, workplace):
    typed = next((text for start, text in INPUT.items() if line.startswith(start)), None)
    done = lora_embed(line, input=typed)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()
