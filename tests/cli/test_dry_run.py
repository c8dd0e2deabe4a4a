"""`train --dry-run` and `doctor`."""

from pathlib import Path

from tests.helpers.cli import lora_embed, result_of


def test_a_dry_run_writes_nothing(workplace):
    before = sorted(Path().rglob("*"))
    found = result_of("train --config run.yaml --dry-run")
    assert found["trial"]["steps"] == 24
    text = lora_embed("train --config run.yaml --dry-run").stdout
    for word in ("training: 48 queries", "truncation: ", "steps: 24 of 8", "memory: ", "time: about ", "MB free"):
        assert word in text
    assert sorted(Path().rglob("*")) == before


def test_the_doctor_says_what_will_happen_and_exits_with_1_where_a_run_would_fail(workplace):
    assert result_of("doctor --config run.yaml")["run"]["trial"]["steps"] == 24
    done = lora_embed("doctor --config run.yaml --dataset missing.json")
    assert done.exit_code == 1
    assert "problem: got 'missing.json'" in done.stdout
    assert "versions: python" in done.stdout
