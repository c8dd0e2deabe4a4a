import re
import warnings

import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed import (
    EmbeddingQAFinetuneDataset,
    LoraEmbedError,
    LoraFinetuneEngine,
)
from llama_index_lora_embed.core.errors import (
    DatasetError,
    SplitError,
)
from llama_index_lora_embed.data import FirstOf, LeadQueryGenerator, LLMQueryGenerator, TitleQueryGenerator
from llama_index_lora_embed.data.questions.base import embed_text
from tests.conftest import make_dataset, shown
from tests.engines.conftest import QUIET
from tests.helpers.llms import FakeLLM


def test_from_nodes(tiny_model, nodes, out):
    engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, val_fraction=0.2, batch_size=4, **QUIET)
    training = engine.config.training
    assert (training.epochs, training.learning_rate, training.adapter_scale) == (1, 5e-4, 0.5)
    assert not engine.dataset.overlap(engine.val_dataset)
    assert set(engine.dataset.query_origins.values()) == {"title", "lead"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = engine.finetune()
    assert "Only real queries show whether users are served better" in result.summary
    assert result.data_report.queries == {"lead": 4, "title": 8}
    assert len(engine.get_finetuned_model().get_query_embedding("w1")) == 32


def test_from_nodes_with_human_written_queries_as_validation(tiny_model, nodes, val_dataset, out):
    engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, val_dataset=val_dataset, **QUIET)
    assert engine.val_dataset == val_dataset
    assert len(engine.dataset.queries) == 12


def test_from_nodes_can_be_validated_on_human_written_queries_about_the_same_nodes(tiny_model, nodes, out):
    asked = EmbeddingQAFinetuneDataset(
        queries={"a": "w9 or w8 ?", "b": nodes[0].metadata["title"].upper()},
        corpus={node.node_id: embed_text(node) for node in nodes},
        relevant_docs={"a": ["n3"], "b": ["n0"]},
    )
    engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, val_dataset=asked, **QUIET)
    assert len(engine.dataset.queries) == 11, "the title that somebody asked for is not trained on"
    assert "n3" in engine.dataset.answer_ids()
    with pytest.raises(DatasetError, match="1 of 2 validation queries"):
        LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, val_dataset=asked, on_overlap="raise", **QUIET)


def test_headings_of_trained_passages_do_not_refuse_the_validation_set_that_from_nodes_holds_out(tiny_model, out):
    texts = make_dataset(passages=40).corpus
    nodes = [
        TextNode(id_=i, text=f"{text}. {text[::-1]} and.", metadata={"title": f"title {i}"})
        for i, text in texts.items()
    ]
    engine = LoraFinetuneEngine.from_nodes(
        nodes, tiny_model, out, query_generators=[LeadQueryGenerator()], on_overlap="raise", **QUIET
    )
    assert engine.val_dataset.origins() == {"title": 40}
    assert engine.val_dataset.overlap(engine.dataset)


def test_from_nodes_with_one_document_says_so(tiny_model, nodes, out):
    with pytest.raises(SplitError, match="one source document"):
        LoraFinetuneEngine.from_nodes(nodes[:2], tiny_model, out)
    assert LoraFinetuneEngine.from_nodes(nodes[:2], tiny_model, out, val_fraction=0).val_dataset is None


def test_from_nodes_filters_llm_written_queries_by_the_retrieval_of_the_base(tiny_model, nodes, out, tmp_path):
    class Llm(FakeLLM):
        def answer(self, prompt):
            words = re.findall(r"w[0-9]+", prompt)
            return f"question: {' '.join(words[:5])}\nkeywords: {'w199 ' * 4}{words[-1]} says this passage"

    generator = LLMQueryGenerator(llm=Llm(), journal=str(tmp_path / "journal.jsonl"))
    engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, query_generators=[generator], device="cpu")
    report = engine.data_report
    assert report.llm_reports["llm"].answered == 12
    assert report.filtered.given == 24
    assert report.filtered.dropped["refers to the passage"] == 12
    assert report.split.val_queries == len(engine.val_dataset.queries)
    assert report.validated_on == {}
    assert set(report.queries) == {"llm/question"}
    assert "12 answered with 12 calls" in str(report)
    unfiltered = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, query_generators=[generator], filters=None)
    assert len(unfiltered.dataset.queries) + len(unfiltered.val_dataset.queries) == 24
    assert unfiltered.data_report.filtered is None


def test_llm_written_queries_are_validated_on_headings_that_were_not_trained_on(tiny_model, out, tmp_path):
    class Llm(FakeLLM):
        def answer(self, prompt):
            return f"question: {' '.join(re.findall(r'w[0-9]+', prompt)[:5])}"

    nodes = [TextNode(text=f"# w{i} w{i + 50}\n\n" + " ".join(f"w{i + n}" for n in range(12))) for i in range(40)]
    engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, llm=Llm(), filters=None, val_fraction=0.2, **QUIET)
    origins = engine.val_dataset.origins()
    assert origins["title"] == 40
    report = engine.data_report
    assert report.validated_on == origins
    assert report.split.val_queries == origins["llm/question"] == len(engine.val_dataset.queries) - 40
    assert f"evaluated on {len(engine.val_dataset.queries)} queries, with headings:" in str(report)
    assert engine.dataset.origins().keys() == {"llm/question"}
    written = engine.dataset.subset([*engine.dataset.queries], engine.dataset.corpus)
    of_dataset = LoraFinetuneEngine(written, tiny_model, out, val_fraction=0.2, **QUIET)
    held_out = of_dataset.val_dataset
    assert held_out.origins().get("title", 0) >= 30, "the same for a dataset whose queries an LLM wrote"
    assert "Headings of the passages were added" in of_dataset._run.hold_out_note


@pytest.mark.parametrize(
    "wrong",
    [{"epoch": 3}, {"batch_size": 0}, {"val_dataset": "/nowhere.json"}, {"val_fraction": 5}, {"filters": True},
     {"learning_rate": "x"}, {"model_id": "/nowhere"}, {"best_metric": "ndgc"}, {"quantized": True, "device": "cpu"},
     {"teacher": "./nowhere"}, {"objective": "distillation"}, {"query_prompt": 5}, {"seed": 2**33},
     {"allow_changes": ["nope"]}, {"val_fraction": 0, "early_stopping_patience": 2}, {"loss": lambda: 1}],
    ids=shown,
)  # fmt: skip
def test_from_nodes_checks_its_arguments_before_it_calls_an_llm(tiny_model, nodes, out, tmp_path, wrong):
    llm = FakeLLM()
    generator = LLMQueryGenerator(llm=llm, journal=str(tmp_path / "journal.jsonl"))
    arguments = {"model_id": tiny_model, "model_output_path": out, "query_generators": [generator], **wrong}
    with pytest.raises((LoraEmbedError, TypeError)):
        LoraFinetuneEngine.from_nodes(nodes, **arguments)
    assert llm.calls == 0


def test_the_report_of_an_llm_inside_other_generators_is_kept(tiny_model, nodes, out, tmp_path):
    def generator(name):
        return LLMQueryGenerator(llm=FakeLLM(), journal=str(tmp_path / name))

    generators = [FirstOf(TitleQueryGenerator(), generator("a")), generator("b")]
    engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, out, query_generators=generators, filters=None)
    answered = {name: report.answered for name, report in engine.data_report.llm_reports.items()}
    assert answered == {"llm": 4, "llm #2": 12}


def test_without_llm_written_queries_from_nodes_loads_no_model(nodes, out, tmp_path):
    (tmp_path / "empty").mkdir()
    engine = LoraFinetuneEngine.from_nodes(nodes, str(tmp_path / "empty"), out)
    assert engine.data_report.filtered is not None
