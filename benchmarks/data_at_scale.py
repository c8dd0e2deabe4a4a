"""Time and memory of making data, as the corpus grows.

    python benchmarks/data_at_scale.py --nodes 10000 100000                  # generators, filters and the split
    python benchmarks/data_at_scale.py near-duplicates --nodes 10000 100000  # in memory and on disk
    python benchmarks/data_at_scale.py sample --nodes 100000 1000000         # of a stream of pairs, and all of it

Each size runs in its own process. The nodes have 120 random words: ten per document, every twentieth a near-duplicate,
every second with a title. Memory is the peak of the process above its size before the nodes were created; the nodes'
own share is reported as well. The others work on a JSONL file of queries and texts, of 120 and of 30 random words,
where every twentieth differs from the one before in its last word; their memory is the peak of what is not a page of a
file.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from memory import Measured

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.data import (
    NeighbourQueryGenerator,
    dataset_from_nodes,
    dataset_from_pairs,
    drop_near_duplicates,
    split_by_source,
    split_report,
)
from llama_index_lora_embed.data.build import default_query_generators
from llama_index_lora_embed.data.near_duplicates import near_duplicate_groups

WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu", "se", "ran") for b in ("b", "d", "st", "v", "nd") for c in
         ("en", "ior", "al", "um", "esh", "ity", "os", "ance")]  # fmt: skip


def make_nodes(count: int, seed: int = 0) -> list[TextNode]:
    rng = random.Random(seed)
    nodes: list[TextNode] = []
    text = ""
    for number in range(count):
        if number % 20 != 19:
            sentences = (" ".join(rng.choices(WORDS, k=12)) for _ in range(10))
            text = ". ".join(f"{sentence} {rng.randrange(10**6)}" for sentence in sentences) + "."
        title = {"title": " ".join(rng.choices(WORDS, k=5))} if number % 2 else {}
        node = TextNode(text=text, id_=f"n{number}", metadata=title)
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"d{number // 10}")
        nodes.append(node)
    return nodes


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)


def measure(count: int) -> dict[str, object]:
    before = peak_mb()
    nodes = make_nodes(count)
    with_nodes = peak_mb()
    started = time.perf_counter()
    dataset, report = dataset_from_nodes(nodes, [*default_query_generators(), NeighbourQueryGenerator()])
    made, with_queries = time.perf_counter(), peak_mb()
    dataset, report = dataset_from_nodes(
        nodes, [*default_query_generators(), NeighbourQueryGenerator()], filters=QueryFilterSettings()
    )
    filtered, with_filters = time.perf_counter(), peak_mb()
    train, val = split_by_source(dataset)
    split = split_report(train, val)
    done, at_the_end = time.perf_counter(), peak_mb()
    return {
        "nodes": count,
        "queries_kept": len(dataset.queries),
        "dropped": report.filtered.dropped if report.filtered else {},
        "near_duplicates_across_the_split": split.near_duplicates,
        "seconds": {
            "generators": round(made - started, 1),
            "generators and filters": round(filtered - made, 1),
            "split and its report": round(done - filtered, 1),
        },
        "peak_mb": {
            "nodes": round(with_nodes - before),
            "after generators": round(with_queries - before),
            "after filters": round(with_filters - before),
            "after split": round(at_the_end - before),
        },
        "kb_per_node_beside_the_nodes": round((at_the_end - with_nodes) * 1024 / count, 2),
    }


def measured(work: Callable[[], int]) -> dict[str, float]:
    """Seconds of the processor, megabytes above those before, and what the work returns."""
    with Measured() as run:
        found = work()
    return {"seconds": round(run.figures["processor"], 1), "mb": round(run.figures["mb"]), "found": found}


def rows_file(folder: str, count: int, words: int) -> Path:
    rng, path, text = random.Random(0), Path(folder) / "rows.jsonl", ""
    with open(path, "w") as file:
        for number in range(count):
            if number % 20 != 19:
                text = " ".join(rng.choices(WORDS, k=words))
            row = {"id": number, "query": f"{number} {text[:40]}", "text": f"{text} {number}"}
            file.write(json.dumps(row) + "\n")
    return path


def near_duplicates(count: int) -> dict[str, object]:
    near_duplicate_groups({node.node_id: node.text for node in make_nodes(100)})  # imports
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = rows_file(folder, count, 120)
        on_disk = measured(lambda: drop_near_duplicates(path, f"{folder}/out").dropped)
        size = path.stat().st_size

        def in_memory() -> int:
            rows = map(json.loads, path.read_text().splitlines())
            groups = near_duplicate_groups({str(row["id"]): row["text"] for row in rows})
            return sum(i != first for i, first in groups.items())

        return {"rows": count, "file_mb": size >> 20, "on disk": on_disk, "in memory": measured(in_memory)}


def sample(count: int) -> dict[str, object]:
    import datasets

    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = str(rows_file(folder, count, 30))
        stream = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
        drawn = measured(lambda: len(dataset_from_pairs(stream, max_queries=5000, other_passages=20_000)[0].corpus))
        return {"rows": count, "sample": drawn, "all": measured(lambda: len(dataset_from_pairs(stream)[0].corpus))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["nodes", "near-duplicates", "sample"], default="nodes")
    parser.add_argument("--nodes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", action="store_true", help="measure the first size in this process")
    args = parser.parse_args()
    if args.one:
        work = {"nodes": measure, "near-duplicates": near_duplicates, "sample": sample}[args.what]
        print(json.dumps(work(args.nodes[0])))
        return
    runs = []
    for count in args.nodes:
        command = [sys.executable, __file__, args.what, "--one", "--nodes", str(count)]
        runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps({"runs": runs, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
