"""README and docs: every Python block is executed as it stands, with a tiny model in place of the base."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import MetadataMode
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, core
from llama_index_lora_embed.core import LoraEmbedError
from tests.conftest import make_dataset, make_engine, make_tiny_model
from tests.helpers.adapters import peft_adapter
from tests.helpers.cli import commands
from tests.helpers.llms import FakeLLM

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BASE = "sentence-transformers/all-MiniLM-L6-v2"
NOT_EXECUTED = re.compile(r"<!-- not executed: \S.+ -->")
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        file: Name of the file that it is, from `title="..."`; None of a block that is no file.
        executed: Whether it has no marker that says why it cannot be.
    """

    page: str
    line: int
    language: str
    file: str | None
    code: str
    executed: bool


def blocks_of(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        marker = before.rstrip().rsplit("\n", 1)[-1]
        line = before.count("\n") + 2
        found.append(Block(page, line, match[1], match[2], match[3], not NOT_EXECUTED.fullmatch(marker)))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON_PAGES = list(dict.fromkeys(block.page for block in BLOCKS if block.language == "python" and block.executed))
SLOW = ("docs/training.md", "docs/query-side.md", "docs/embedding.md", "docs/data.md")  # more than about three seconds


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As wide as MiniLM and with as many positions, so that the settings of the pages fit."""
    path = tmp_path_factory.mktemp("base")
    return str(make_tiny_model(path, width=384, positions=512, max_seq_length=256))


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "adapter"
    make_engine(base, path, epochs=2, learning_rate=1e-3).finetune()
    return path


@pytest.fixture
def namespace(base, trained, nodes, tmp_path, monkeypatch) -> dict[str, Any]:
    """What the pages take for given: files in the working directory, adapters in `runs`, `nodes` and `llm`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(tmp_path / "llama_index"))
    make_dataset().save_json("train.json")
    make_dataset(passages=8, seed=3).save_json("general.json")
    corpus = {node.node_id: node.get_content(MetadataMode.EMBED) for node in nodes}
    EmbeddingQAFinetuneDataset(
        queries={f"v{place}": " ".join(text.split()[-4:]) for place, text in enumerate(corpus.values())},
        corpus=corpus,
        relevant_docs={f"v{place}": [node_id] for place, node_id in enumerate(corpus)},
        query_origins={f"v{place}": "human" for place in range(len(corpus))},
    ).save_json("val.json")
    rows = [f"w{i} w{i + 1},w{i} w{i + 2 + 50 * (i % 2)},{1 - i % 2}" for i in range(40)]
    Path("pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    Path("query_log.csv").write_text("typed,clicked\nw1 w2,w1 w2 w3 w4\nw5 w6,w5 w6 w7 w8\n")
    Path("nodes.jsonl").write_text("".join(f"{node.to_json()}\n" for node in [*nodes, nodes[0]]))
    Path("log.jsonl").write_text('{"query": "w1 w2", "passage": "w1 w2 w3 w4"}\n')
    for name in ("handbook", "legal", "hr"):
        shutil.copytree(trained, f"runs/{name}")
    peft_adapter(base, Path("runs/peft"))
    return {"nodes": nodes, "llm": FakeLLM(), "__name__": "page"}


def execute(page: str, namespace: dict[str, Any], base: str) -> None:
    """Run the blocks of a page one after another in one namespace; a traceback names page and line."""
    for block in blocks_of(page):
        if block.file is not None:
            Path(block.file).write_text(block.code.replace(BASE, base), encoding="utf-8")
        if block.language == "python" and block.executed:
            code = ast.parse(block.code.replace(BASE, base), f"{block.page}:{block.line}")
            ast.increment_lineno(code, block.line - 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(code, block.page, "exec"), namespace)


# what a page promises besides running: page to a function of its namespace and of what it printed


def check_readme(names: dict[str, Any], printed: str) -> None:
    assert "tuned" in printed
    assert names["index"].as_retriever(similarity_top_k=2).retrieve("w1 w2")
    assert names["engine"].val_dataset is not None
    assert "12 answered with 12 calls" in printed


def check_configuration(names: dict[str, Any], printed: str) -> None:
    page = PAGES["docs/configuration.md"].read_text(encoding="utf-8")
    problems = page.split("```text\n")[1].split("```")[0]
    assert problems in printed
    assert Path("runs/from-nodes/finetune.json").exists()


def check_data(names: dict[str, Any], printed: str) -> None:
    assert names["pairs_report"].pairs == 2
    assert str(names["mining_report"]) in printed
    assert len(names["train_pairs"]) + len(names["val_pairs"]) == 40


def check_training(names: dict[str, Any], printed: str) -> None:
    manifest = json.loads(Path("runs/handbook-2/finetune.json").read_text())
    assert manifest["parent"]["path"].endswith("runs/handbook")
    assert len(names["short"].get_text_embedding("w1 w2")) == 128
    taught = json.loads(Path("runs/taught/finetune.json").read_text())
    assert taught["settings"]["teacher"]["name"] == "shared_words"


def check_query_side(names: dict[str, Any], printed: str) -> None:
    assert names["engine"].config.training.tune == "query"
    assert len(names["engine"].dataset.corpus) == 12
    assert names["index"].as_retriever(similarity_top_k=2).retrieve("w1 w2")
    mapped = names["mapped"]
    assert mapped.fingerprint == names["map_engine"].get_finetuned_model().fingerprint
    assert mapped.passage_fingerprint == names["embed_model"].fingerprint


def check_embedding(names: dict[str, Any], printed: str) -> None:
    complete = SentenceTransformer("runs/complete", device="cpu").encode("w1").tolist()
    assert complete == pytest.approx(names["theirs"].get_text_embedding("w1"), abs=1e-5)
    assert len(names["vectors"]) == 3
    assert names["exported"].get_text_embedding("w1") == pytest.approx(
        names["embed_model"].get_text_embedding("w1"), abs=1e-4
    )


def check_deployment(names: dict[str, Any], printed: str) -> None:
    from llama_index_lora_embed.deployment import read_index_stamp

    assert read_index_stamp(names["index"]).fingerprint == names["embed_model"].fingerprint
    assert names["registry"].promoted().name == "v1"


def check_evaluation(names: dict[str, Any], printed: str) -> None:
    assert "95 % interval" in printed
    assert "Regression set" in printed
    assert Path("report.html").stat().st_size > 100_000


def check_coming_from(names: dict[str, Any], printed: str) -> None:
    from llama_index.core.embeddings import resolve_embed_model

    local = resolve_embed_model("local:test_model")
    vector = names["embed_model"].get_text_embedding("w1 w2")
    assert local.get_text_embedding("w1 w2") == pytest.approx(vector, abs=1e-5)
    two_layers, below = names["embed_model_2layer"], names["base_embed_model"]
    assert two_layers.get_text_embedding("w1 w2") == below.get_text_embedding("w1 w2")


def check_troubleshooting(names: dict[str, Any], printed: str) -> None:
    assert printed.startswith("ModelNotFoundError\n")


def check_index(names: dict[str, Any], printed: str) -> None:
    assert printed.splitlines()[-1] == names["result"].verdict.value
    assert names["index"].as_retriever(similarity_top_k=2).retrieve("w1 w2")


def check_scale(names: dict[str, Any], printed: str) -> None:
    assert printed.startswith("1 of 13 rows repeat an earlier one")
    assert Path("distinct/dropped.csv").read_text().count("\n") == 2
    assert names["pairs_report"].pairs == 1


def check_serving(names: dict[str, Any], printed: str) -> None:
    assert names["certificate"].median_cosine > 0.9999
    theirs = SentenceTransformer("runs/merged", device="cpu").encode("w1").tolist()
    assert theirs == pytest.approx(names["served"].get_text_embedding("w1"), abs=1e-5)


CHECKS = {
    "README.md": check_readme,
    "docs/index.md": check_index,
    "docs/data.md": check_data,
    "docs/configuration.md": check_configuration,
    "docs/training.md": check_training,
    "docs/query-side.md": check_query_side,
    "docs/embedding.md": check_embedding,
    "docs/deployment.md": check_deployment,
    "docs/serving.md": check_serving,
    "docs/scale.md": check_scale,
    "docs/evaluation.md": check_evaluation,
    "docs/coming-from-llama-index-finetuning.md": check_coming_from,
    "docs/troubleshooting.md": check_troubleshooting,
}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in PYTHON_PAGES]
)
def test_the_python_of_a_page_runs_as_it_stands(page, namespace, base, capsys):
    execute(page, namespace, base)
    CHECKS[page](namespace, capsys.readouterr().out)


def test_every_page_that_is_executed_has_a_check():
    assert set(CHECKS) == set(PYTHON_PAGES)


def test_every_block_is_executed_checked_or_marked_with_a_reason():
    known = {"python", "sh", "text"}  # and files, which the Python of their page reads
    unknown = [b for b in BLOCKS if b.executed and b.file is None and b.language not in known]
    assert not unknown, "name the block's language, or mark it <!-- not executed: why -->"


def test_commands_name_targets_scripts_and_options_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in BLOCKS:
        if block.language != "sh" or not block.executed:
            continue
        for line in filter(None, (line.split("#")[0].split() for line in block.code.splitlines())):
            where = f"{block.page}:{block.line}: {' '.join(line)}"
            match line:
                case ["make", target, *_]:
                    assert target in targets, where
                case ["python", script, *arguments]:
                    text = (ROOT / script).read_text(encoding="utf-8")
                    assert all(f'"{name}"' in text for name in arguments if name.startswith("--")), where
                case ["pip", "install", *_]:
                    pass
                case ["lora-embed", *arguments]:
                    words, flags = " ".join(arguments[:2]), [name for name in arguments if name.startswith("--")]
                    command = commands().get(words) or commands()[arguments[0]]
                    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
                    assert set(flags) <= known, where
                case _:
                    pytest.fail(f"{where}: neither make nor python; mark it with a reason")


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
        assert not [link for link in links if not (ROOT / link).exists()], name


def test_the_readmes_table_commands_and_picture_have_the_figures_of_the_benchmarks():
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_picture.py"))
    assert script["table"]() in readme
    rows = [row for data in script["figures"]() for row in data["rows"]]
    assert {row["command"] for row in rows if row["command"]} <= set(readme.splitlines()) | {
        line.split("  #")[0] for line in readme.splitlines()
    }
    picture = re.findall(r">(0\.\d{3})<", script["PICTURE"].read_text(encoding="utf-8"))
    drawn = [row for row in rows if row["model"] in script["COLOURS"]]
    assert sorted(picture) == sorted(f"{row[metric]:.3f}" for metric in script["METRICS"] for row in drawn)


def test_every_error_class_has_its_section_in_troubleshooting():
    sections = re.findall(r"^## (\w+Error)$", PAGES["docs/troubleshooting.md"].read_text(), re.MULTILINE)
    classes = [name for name in core.__all__ if issubclass(getattr(core, name), LoraEmbedError)]
    assert sorted(sections) == sorted(classes)


def test_every_folder_that_exports_names_has_an_api_page_with_all_of_them():
    for init in sorted((ROOT / "llama_index_lora_embed").glob("*/__init__.py")):
        imports = [node for node in ast.parse(init.read_text()).body if isinstance(node, ast.ImportFrom)]
        if not (names := {alias.asname or alias.name for node in imports for alias in node.names}):
            continue
        package = f"llama_index_lora_embed.{init.parent.name}"
        page = (ROOT / "docs" / "api" / f"{init.parent.name}.md").read_text()
        assert f"::: {package}\n" in page
        for name in names:  # mkdocstrings takes a name that is a module's, too, for the module
            if (init.parent / f"{name}.py").exists():
                assert f"::: {package}.{name}.{name}\n" in page


def line_of(file: str, name: str) -> int:
    """Where a function or method of the package is defined."""
    body: list[Any] = ast.parse((ROOT / "llama_index_lora_embed" / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        node = next((node for node in body if getattr(node, "name", None) == part), None)
        assert node is not None, f"{file} has no {name}"
        body = node.body
    return node.lineno


def test_the_way_of_a_text_in_contributing_leads_through_functions_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stops = re.findall(r"^\d+\. `([\w/]+\.py):(\d+)` `([\w.]+)`", text, re.MULTILINE)
    assert 10 <= len(stops) <= 15
    for file, line, name in stops:
        assert abs(line_of(file, name) - int(line)) <= 40, f"{file}: {name} is at line {line_of(file, name)} now"
