from llama_index_lora_embed import data
from llama_index_lora_embed.data.origins import HEURISTIC, HUMAN, NOT_SYNTHETIC, WRITTEN_BY_LLM
from llama_index_lora_embed.evaluation.verdict import Evidence, evidence_of


def test_the_origin_of_every_generator_is_known():
    classes = [getattr(data, name) for name in data.__all__ if name.endswith("Generator")]
    origins = {name for made in classes if isinstance(name := getattr(made, "name", None), str)}
    assert origins == HEURISTIC | WRITTEN_BY_LLM | {HUMAN}


def test_origins_that_are_not_synthetic_are_stronger_evidence_than_all_others():
    strong, weak = ({evidence_of(origin) for origin in group} for group in (NOT_SYNTHETIC, HEURISTIC | WRITTEN_BY_LLM))
    assert max(e.rank for e in strong) < min(e.rank for e in weak)
    assert {evidence_of(origin) for origin in HEURISTIC} == {Evidence.HEURISTIC}
