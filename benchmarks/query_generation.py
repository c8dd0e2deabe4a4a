"""Time to generate queries with an LLM of fixed latency: llama-index-finetuning 0.4.2 against this package.

    python benchmarks/query_generation.py

Both run in one process, one after the other, with the same nodes and the same fake LLM. The old function sends one
request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import tempfile
import time
from typing import Any

from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.schema import TextNode

from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data import LLMQueryGenerator, dataset_from_nodes


class SlowLLM(CustomLLM):
    """Returns two queries after `latency` seconds."""

    latency: float

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="slow")

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        time.sleep(self.latency)
        return self.answer(prompt)

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        await asyncio.sleep(self.latency)
        return self.answer(prompt)

    def answer(self, prompt: str) -> CompletionResponse:
        mark = f"{hash(prompt) & 0xFFFFFF:06x}"
        return CompletionResponse(text=f"1. What is part {mark} for?\n2. How is part {mark} cleaned?")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds per request")
    parser.add_argument("--in-flight", type=int, default=32)
    args = parser.parse_args()
    old = require("llama_index.finetuning")
    nodes = [
        TextNode(
            text=f"Part {i} of the machine is cleaned every {i % 7 + 2} days with oil and a soft brush.", id_=f"n{i}"
        )
        for i in range(args.nodes)
    ]
    llm = SlowLLM(latency=args.latency)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        generator = LLMQueryGenerator(
            llm=llm, journal=f"{folder}/journal.jsonl", settings=LLMSettings(in_flight=args.in_flight)
        )
        ours, _ = dataset_from_nodes(nodes, [generator])
        ours_seconds = time.perf_counter() - started
        started = time.perf_counter()
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
            theirs = old.generate_qa_embedding_pairs(nodes, llm, output_path=f"{folder}/old.json")
        theirs_seconds = time.perf_counter() - started
    assert len(ours.queries) == len(theirs.queries) == 2 * args.nodes
    report = {
        "nodes": args.nodes,
        "latency_seconds": args.latency,
        "in_flight": args.in_flight,
        "llama_index_finetuning_seconds": round(theirs_seconds, 1),
        "ours_seconds": round(ours_seconds, 1),
        "times_faster": round(theirs_seconds / ours_seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
