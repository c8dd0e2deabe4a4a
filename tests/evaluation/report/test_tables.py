import io

import pytest
from rich.console import Console

from llama_index_lora_embed import compare_retrieval
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.evaluation import Table, metrics_table, print_comparison, to_markdown
from tests.conftest import make_dataset
from tests.helpers.evaluation import noisy_evaluation


@pytest.fixture(scope="module")
def comparison():
    dataset = make_dataset(passages=60)
    base, tuned = noisy_evaluation(3.0, dataset), noisy_evaluation(1.0, dataset)
    return compare_retrieval(base, tuned, dataset, regression_set=(base, tuned), names=("MiniLM", "handbook"))


def test_markdown_has_verdict_metrics_slices_and_queries(comparison):
    text = to_markdown(comparison)
    assert text.startswith(f"**BETTER** on {comparison.comparison.queries} human-written queries: nDCG@10 ")
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        lines = table.splitlines()
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, "every row has every cell"
    hit = comparison.metrics["hit@5"]
    assert f"| hit@5 | {hit.base:.3f} | {hit.tuned:.3f} | {hit.difference:+.3f} |" in text
    assert "| metric | MiniLM | handbook |" in text
    assert "source: document0" in text.replace("\\", "")
    assert "Regression set: passed" in text
    assert "| relevant: w" in text


def test_markup_in_texts_is_escaped():
    table = Table("Queries [/x]", ("query", "score [y]"), [("what | is [bold]this[/bold]\nhere ?", "1")])
    assert "| what \\| is \\[bold\\]this\\[/bold\\] here ? | 1 |" in table.to_markdown()
    assert "&lt;img src=x&gt;" in Table("t", ("a",), [("<img src=x>",)]).to_markdown()
    console = Console(file=io.StringIO(), width=100)
    console.print(table.to_rich())
    for expected in ("what | is [bold]this[/bold] here ?", "Queries [/x]", "score [y]"):
        assert expected in console.file.getvalue()


def test_markdown_is_latin_text(comparison):
    text = to_markdown(comparison)
    assert text.encode("cp1252").decode("cp1252") == text


def test_a_comparison_fits_a_terminal_of_any_width(comparison):
    for width in (60, 80, 200):
        console = Console(file=io.StringIO(), width=width)
        print_comparison(comparison, console=console)
        printed = console.file.getvalue()
        assert printed.startswith("BETTER on ")
        assert "Improved queries" in printed
        assert max(map(len, printed.splitlines())) <= width


def test_any_number_of_models_side_by_side(comparison):
    third = noisy_evaluation(0.5, comparison.dataset)
    table = metrics_table({"base": comparison.base, "tuned": comparison.tuned, "third": third})
    assert table.columns[:3] == ("", "hit@1", "hit@5")
    assert [row[0] for row in table.rows] == ["base", "tuned", "third"]
    assert table.rows[2][1] == f"{third.metrics['hit@1']:.3f}"
    assert table.to_markdown().count("\n") == 6
    with pytest.raises(ConfigError, match="no evaluations"):
        metrics_table({})
