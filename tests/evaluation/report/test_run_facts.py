from llama_index_lora_embed.evaluation.report.run_facts import read_log


def test_repeated_steps_of_a_log_count_once_and_incomplete_lines_are_skipped(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 0, "eval_x": 1}\n{"step": 5, "loss": 1.0}\nnonsense\n{"step": 3, "loss": 2.0}\n{"step": 4, "lo'
    )
    assert [line["step"] for line in read_log(log)] == [0, 3]
    assert read_log(tmp_path / "none") == []
