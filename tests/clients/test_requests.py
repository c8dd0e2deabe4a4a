"""Scripts with `requests`, as people write them for a fine-tuning service: pairs in, poll, evaluate."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_index_lora_embed import LoraEmbedding, evaluate_retrieval
from tests.conftest import make_dataset
from tests.helpers.service import pairs_of
from tests.helpers.service_processes import commands, environment, until

# api/test_evaluate.py has the same forms without training
pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.filterwarnings("ignore")]
PACKAGE = "llama_index_lora_embed.service"
DICTIONARIES = """
    import json, sys, time
    import requests

    BASE_URL = "http://localhost:8000"
    data = json.load(open("data.json"))

    response = requests.post(f"{BASE_URL}/v1/finetune", json={"pairs": data["pairs"]})
    if response.status_code != 200:
        sys.exit(response.text)
    job_id = response.json()["job_id"]

    while True:
        status = requests.get(f"{BASE_URL}/v1/finetune/{job_id}").json()
        print(status["status"], status["progress"], status["metrics"].get("loss"), file=sys.stderr)
        if status["status"] == "completed":
            break
        if status["status"] == "failed":
            sys.exit(status["error"])
        time.sleep(0.2)

    results = {}
    for model in ("tiny", job_id):
        result = requests.post(
            f"{BASE_URL}/v1/evaluate",
            json={
                "model": model,
                "queries": data["queries"],
                "corpus": data["corpus"],
                "relevance": data["relevance"],
            },
        )
        result.raise_for_status()
        results[model] = result.json()
    print(json.dumps({"tuned": job_id, "results": [results["tiny"], results[job_id]]}))
"""
LISTS = """
    import json, time
    import requests

    API = "http://localhost:8000/v1"
    data = json.load(open("data.json"))
    session = requests.Session()

    job = session.post(
        API + "/finetune",
        json={
            "model": "tiny",
            "pairs": [[pair["query"], pair["passage"]] for pair in data["pairs"]],
            "epochs": 2,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "lora_r": 8,
            "lora_alpha": 16,
        },
        timeout=30,
    )
    job.raise_for_status()
    job_id = job.json()["job_id"]
    while (job := session.get(f"{API}/finetune/{job_id}").json())["status"] not in ("completed", "failed", "cancelled"):
        time.sleep(0.2)
    assert job["status"] == "completed", job

    queries, corpus = list(data["queries"].items()), list(data["corpus"].items())
    row = {passage_id: i for i, (passage_id, _) in enumerate(corpus)}
    relevant = [data["relevance"][query_id] for query_id, _ in queries]
    beir = {passage_id: {"title": "", "text": text} for passage_id, text in corpus}
    texts = {"queries": [text for _, text in queries], "corpus": [text for _, text in corpus]}
    by_id = {"queries": data["queries"], "corpus": data["corpus"]}
    bodies = [
        {**texts, "relevance": [[row[i] for i in ids] for ids in relevant]},
        {**texts, "relevance": {n: [row[i] for i in ids] for n, ids in enumerate(relevant)}},
        {**texts, "relevance": [row[ids[0]] for ids in relevant]},
        {**by_id, "corpus": beir, "relevance": {q: {i: 1 for i in ids} for q, ids in data["relevance"].items()}},
        {**by_id, "relevance": {q: ids[0] for q, ids in data["relevance"].items()}},
    ]
    model = job["fine_tuned_model"]
    results = [session.post(API + "/evaluate", json={"model": model, **body}).json() for body in bodies]
    print(json.dumps({"tuned": job_id, "results": results}))
"""


@pytest.fixture(scope="module")
def service(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and data folder of a service without tokens, as on somebody's own machine."""
    folder = tmp_path_factory.mktemp("service") / "data"
    env = environment(folder, {"tiny": tiny_model})
    port = env["LORA_EMBED_PORT"]
    with commands(env, PACKAGE, f"{PACKAGE}.jobs.worker"):
        until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").status == 200, 120, "the server")
        yield f"localhost:{port}", folder


@pytest.mark.parametrize("script", [DICTIONARIES, LISTS], ids=["dictionaries", "lists"])
def test_a_script_trains_polls_and_evaluates(service, script, tmp_path, tiny_model):
    address, folder = service
    data = make_dataset(passages=12, seed=3)
    given = {"pairs": pairs_of(), "queries": data.queries, "corpus": data.corpus, "relevance": data.relevant_docs}
    (tmp_path / "data.json").write_text(json.dumps(given))
    (tmp_path / "script.py").write_text(textwrap.dedent(script).replace("localhost:8000", address))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tuned = LoraEmbedding(folder / "models" / found["tuned"], device="cpu")
    expected = [evaluate_retrieval(tuned, data).metrics] * len(found["results"])
    if script is DICTIONARIES:
        expected[0] = evaluate_retrieval(LoraEmbedding(base_model=tiny_model, device="cpu"), data).metrics
    names = {"mrr": "mrr@10", "ndcg_at_10": "ndcg@10", "map": "map@100"}
    names |= {f"recall_at_{k}": f"recall@{k}" for k in (1, 5, 10)}
    for result, metrics in zip(found["results"], expected, strict=True):
        assert {name: result[name] for name in names} == pytest.approx({n: metrics[m] for n, m in names.items()})
