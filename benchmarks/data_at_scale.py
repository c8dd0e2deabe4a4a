"""Time and memory of heuristic query generators, filters and the split, as the corpus grows.

    python benchmarks/data_at_scale.py --nodes 10000 100000

Each size runs in its own process, on nodes of 120 random words: ten per document, every twentieth a near-duplicate,
every second with a title. Memory is the peak of the process above its size before the nodes were created; the nodes'
own share is reported as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.data import NeighbourQueryGenerator, dataset_from_nodes, split_by_source, split_report
from llama_index_lora_embed.data.build import default_query_generators

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", action="store_true", help="measure the first size in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.nodes[0])))
        return
    runs = []
    for count in args.nodes:
        command = [sys.executable, __file__, "--one", "--nodes", str(count)]
        runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps({"runs": runs, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
