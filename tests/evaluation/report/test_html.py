import importlib
import os
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from llama_index_lora_embed import LabelledPairs, LoraFinetuneEngine, compare_retrieval
from llama_index_lora_embed.core.errors import AdapterError, ConfigError, MissingExtraError, OutputDirectoryError
from llama_index_lora_embed.evaluation import RunFacts, write_report
from tests.conftest import make_dataset, make_engine
from tests.helpers.browser import BROWSER, QUIET
from tests.helpers.evaluation import labels_and_similarities, noisy_evaluation, pair_evaluation

PLOTS = {"curves", "metrics", "similarities", "slices", "map"}


@pytest.fixture(scope="module")
def comparison():
    dataset = make_dataset(passages=60)
    dataset.queries["q0-0"] = "<script>document.title = 'hacked'</script> & so on ?"
    dataset.queries["q1-0"] = "half a character \ud800 and $x^^$ of it ?"
    dataset.source_documents["p2"] = dataset.source_documents["p3"] = "budget_$_2024_$^\\alpha.pdf"
    dataset.corpus["p0"] += " <img src=x onerror=alert(1)> " + "x" * 500
    ids = list(dataset.queries)
    return compare_retrieval(
        noisy_evaluation(3.0, dataset),
        noisy_evaluation(1.0, dataset),
        dataset,
        slices={r"C:\$users$": ids[:20]},
        names=("$a$", "b [$^^$]"),
    )


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The result of a run on nodes."""
    from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

    made = make_dataset(passages=40)
    nodes = [
        TextNode(id_=i, text=text, metadata={"title": " ".join(text.split()[:3])},
                 relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=made.source_documents[i])})
        for i, text in made.corpus.items()
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("report") / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = LoraFinetuneEngine.from_nodes(nodes, tiny_model, str(path), val_fraction=0.4, batch_size=4,
                                               show_progress_bar=False, device="cpu")  # fmt: skip
        return engine.finetune()


def test_the_page_of_a_run_is_self_contained_and_complete(run, tmp_path):
    page = run.write_report(figures=tmp_path / "figures")
    assert str(page) == f"{run.adapter_path}.run/report.html"
    text = page.read_text(encoding="utf-8")
    assert f'<p class="verdict">{run.verdict.value}</p>' in text
    assert text.index('class="verdict"') < text.index("<img"), "the verdict comes first"
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "nothing is loaded"
    assert not re.findall(r"https?://", text)
    for expected in ("How the model was trained", "batch size", "fingerprint", run.fingerprint, "passages of 40 nodes",
                 "Truncated texts", "length after", "sentence-transformers", "learning rate"):  # fmt: skip
        assert expected in text, expected
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == PLOTS
    for path in (tmp_path / "figures").iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 5, f"{path.name} is empty"


def test_the_pages_of_a_comparison_and_of_pairs(comparison, tmp_path):
    page = write_report(tmp_path / "new" / "folder" / "page.html", comparison, title="<Handbook>")
    text = page.read_text(encoding="utf-8")
    assert "&lt;Handbook&gt;" in text
    assert text.count("<img") == 4
    assert "How the model was trained" not in text
    labels, weak = labels_and_similarities()
    pairs = (pair_evaluation(weak, labels), pair_evaluation(weak + 0.1 * labels, labels))
    text = write_report(tmp_path / "pairs.html", pairs).read_text(encoding="utf-8")
    assert "BETTER" in text
    assert "ROC-AUC" in text
    assert text.count("<img") == 1


def test_the_page_of_a_run_on_pairs(tiny_model, tmp_path):
    rng = np.random.default_rng(0)
    texts = list(make_dataset(passages=80).corpus.values())
    pairs = LabelledPairs(texts[:40], texts[40:], rng.integers(0, 2, 40).astype(float).tolist())
    val = LabelledPairs(texts[:30], texts[30:60], [0.0, 1.0] * 15)
    engine = make_engine(tiny_model, tmp_path / "a", pairs, val_dataset=val, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = engine.finetune()
    text = result.write_report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img") == 2
    with pytest.raises(ConfigError, match="not evaluated on queries"):
        result.compare()


def test_wrong_arguments_are_refused_and_an_existing_page_is_unchanged(comparison, adapter, tiny_model, tmp_path):
    page = write_report(tmp_path / "page.html", comparison)
    before = page.read_text(encoding="utf-8")
    with pytest.raises(AdapterError, match=r"finetune\.json"):
        write_report(page, comparison, run=tiny_model)
    for wrong in (None, (1, 2), comparison.base):
        with pytest.raises(ConfigError, match="compare_retrieval"):
            write_report(page, wrong)
    with pytest.raises(OutputDirectoryError, match="cannot be written"):
        write_report(page / "below-a-file.html", comparison)
    assert page.read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_without_the_extra_the_error_is_the_install_command(comparison, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llama-index-lora-embed\[report\]'"):
        write_report(tmp_path / "page.html", comparison)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_log_has_no_curves(run, comparison, tmp_path):
    shutil.copytree(run.adapter_path, tmp_path / "moved")
    facts = RunFacts.read(tmp_path / "moved")
    assert facts.log == []
    assert "curves" not in write_report(tmp_path / "page.html", comparison, run=facts).read_text(encoding="utf-8")


@pytest.mark.skipif(
    BROWSER is None and not os.environ.get("LORA_EMBED_BROWSER"), reason="no Chromium; CI has one and must run this"
)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_renders_in_a_browser(run, comparison, tmp_path, width):
    assert BROWSER, "LORA_EMBED_BROWSER asks for this test, and there is no Chromium"
    playwright = importlib.import_module("playwright.sync_api")
    page_file = write_report(tmp_path / "page.html", comparison, run=run.adapter_path)
    messages, requests = [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        assert page.title().endswith("BETTER"), "texts are escaped"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing overflows"
        sizes = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
        assert len(sizes) == len(PLOTS)
        assert all(complete and natural > 500 and shown > 100 for complete, natural, shown in sizes)
        # number of colours of each plot as the browser renders it
        colours = page.evaluate(
            """[...document.images].map(image => {
                const canvas = document.createElement('canvas');
                canvas.width = 200; canvas.height = 100;
                const context = canvas.getContext('2d');
                context.drawImage(image, 0, 0, 200, 100);
                return new Set(new Uint32Array(context.getImageData(0, 0, 200, 100).data.buffer)).size;
            })"""
        )
        assert min(colours) > 20, "no plot is empty"
        assert page.locator(".verdict").bounding_box()["y"] < 200
        browser.close()
    assert messages == []
    assert requests == [page_file.as_uri(), *[url for url in requests[1:] if url.startswith("data:")]]
