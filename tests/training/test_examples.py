import pytest

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.training.examples import make_groups
from tests.conftest import make_dataset


def test_use_all_docs_trains_every_relevant_passage():
    dataset = make_dataset(passages=4, questions=1)
    dataset.relevant_docs["q0-0"] = ["p0", "p1"]
    assert len(make_groups(dataset, use_all_docs=True)[1].query_ids) == 2
    assert len(make_groups(dataset, use_all_docs=False)[1].query_ids) == 1


def test_one_passage_alone_cannot_be_trained_on():
    with pytest.raises(DatasetError, match="one passage"):
        make_groups(make_dataset(passages=1), False)
