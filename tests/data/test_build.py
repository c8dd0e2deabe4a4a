from collections import Counter

from llama_index_lora_embed import LoraFinetuneEngine
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.data import near_duplicates
from llama_index_lora_embed.data.questions.base import embed_text


def test_a_run_from_nodes_hashes_each_passage_once_for_near_duplicates(nodes, tiny_model, tmp_path, monkeypatch):
    """Filters, split, report, mining of two rounds and training compare passages; queries are another set of texts."""
    hashed = Counter()
    shingles = near_duplicates._shingles

    def counting(text, characters):
        hashed["query" if characters else text] += 1
        return shingles(text, characters)

    monkeypatch.setattr(near_duplicates, "_shingles", counting)
    engine = LoraFinetuneEngine.from_nodes(
        nodes,
        tiny_model,
        str(tmp_path / "adapter"),
        mining=MiningSettings(rounds=2, num_negatives=1, show_progress_bar=False),
        val_fraction=0.3,
        batch_size=4,
        epochs=1,
        device="cpu",
        show_progress_bar=False,
    )
    result = engine.finetune()
    assert len(result.mined) == 2
    assert result.data_report.split is not None
    assert hashed.pop("query") > 0
    assert hashed == dict.fromkeys(map(embed_text, nodes), 1)
