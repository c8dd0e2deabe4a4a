"""Connect to a Ray cluster or start one on this machine, and check what would otherwise fail late or wait forever."""

from __future__ import annotations

import io
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fsspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import llama_index_lora_embed
from llama_index_lora_embed.core.errors import ClusterError, ConfigError, OutputDirectoryError

_T = TypeVar("_T")
_CONNECT_SECONDS = 10
_UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "bytes of memory"}


def connect(address: str | None = None, **settings: Any) -> None:
    """Connect this process to a Ray cluster; nothing happens if it is connected already.

    Args:
        address: "auto" for the cluster that runs on this machine, "ray://host:port" or "host:port" for another; None
            takes the environment variable RAY_ADDRESS, and without it starts a cluster on this machine that ends with
            this process.
        settings: Passed on to `ray.init`, e.g. num_cpus=2.

    Raises:
        ClusterError: There is no cluster at the address, or it runs another version of Ray or Python.
    """
    if ray.is_initialized():
        return
    named = address or os.environ.get("RAY_ADDRESS") or "local"  # Ray itself would join a cluster that others left
    if named == "local":  # no port is opened, and no pages are served, unless asked for
        settings = {"include_dashboard": False, **settings}
    try:
        if ":" in named:  # Ray itself tries for minutes, and may end the process
            host, _, port = named.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(named, **{"log_to_driver": False, **settings})
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error)
        if error.__cause__ is not None:  # Ray's own traceback, whose last line says why
            reason += f" ({str(error.__cause__).strip().splitlines()[-1]})"
        raise ClusterError(
            f"no connection to a Ray cluster at {named!r}: {reason}",
            "a running cluster of the same versions of Ray and Python",
            "Start it with `ray start --head`, name its address, or leave the address out for one on this machine. "
            "Where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH.",
        ) from error


def check_resources(workers: int, needs: Mapping[str, float], *, name: str = "num_workers") -> None:
    """Check that the connected cluster can hold workers at the same time; Ray itself would wait for nodes forever.

    Args:
        workers: Number of workers.
        needs: What each worker takes on one node, by Ray's names: "CPU", "GPU", "memory" (bytes), or one of your own.
        name: What the number of workers is called where it was set.

    Raises:
        ConfigError: `workers` is below 1.
        ClusterError: They do not fit; the message says what is missing and how many would fit.
    """
    if workers < 1:
        raise ConfigError(f"{name}={workers}", "at least 1", f"Pass {name}=1 for one worker.")
    wanted = {resource: amount for resource, amount in needs.items() if amount > 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = (
        sum(int(min(node.get(r, 0) / amount for r, amount in wanted.items())) for node in nodes) if wanted else workers
    )
    if fit >= workers:
        return
    total = {r: sum(node.get(r, 0) for node in nodes) for r in wanted}
    missing = {r: amount * workers - total[r] for r, amount in wanted.items() if amount * workers > total[r]}
    lacking = _amounts(missing) if missing else "nodes large enough, because a worker cannot be spread over several"
    smaller = f"{name}={fit} would fit. " if fit else ""
    raise ClusterError(
        f"{len(nodes)} node(s) with {_amounts(total)}, which hold {fit} worker(s)",
        f"room for {workers} worker(s) with {_amounts(wanted)} each",
        f"Missing: {lacking}. {smaller}Otherwise add nodes, or ask for less per worker.",
    )


def _amounts(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:,.12g} {_UNITS.get(resource, resource)}" for resource, amount in amounts.items())


def check_workers(runtime_env: Mapping[str, Any] | None = None) -> None:
    """Check that each node of the connected cluster imports this version of the package.

    Args:
        runtime_env: Ray's runtime environment of the workers, if they get one.

    Raises:
        ClusterError: A node has no importable package, or another version; all such nodes are named.
    """

    def version() -> str:
        try:
            from llama_index_lora_embed import __version__
        except Exception as error:
            return f"no importable package ({type(error).__name__}: {error})"
        return str(__version__)

    ours = llama_index_lora_embed.__version__
    found = on_each_node(version, runtime_env)
    problems = [f"{node}: {what}" for node, what in found.items() if what != ours]
    if problems:
        raise ClusterError(
            f"{len(problems)} of {len(found)} node(s) without this version of llama-index-lora-embed",
            f"version {ours} everywhere",
            f"Run `pip install 'llama-index-lora-embed[ray]=={ours}'` there, or pass "
            "runtime_env={'pip': [...]} to connect().",
            problems,
        )


def on_each_node(function: Callable[[], _T], runtime_env: Mapping[str, Any] | None = None) -> dict[str, _T]:
    """The result of a function on each living node, by the node's address.

    A function inside a function is sent with its code, so that it also runs where the package is missing.
    """
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "runtime_env": dict(runtime_env or {})}
    task = ray.remote(**options)(function)
    asked = {}
    for number, node in enumerate(node for node in ray.nodes() if node["Alive"]):
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[f"node {number} ({node['NodeManagerAddress']})"] = task.options(scheduling_strategy=place).remote()
    return dict(zip(asked, ray.get(list(asked.values())), strict=True))


def check_storage(path: str | os.PathLike[str], *, what: str = "storage_path") -> None:
    """Check that this process can write to a place, and that all nodes see what it writes and can write there too.

    Args:
        path: A local folder, or any place that fsspec knows ("s3://bucket/runs", "memory://runs"). A local folder has
            to be shared by the nodes if there are several.
        what: What the path is called where it was set.

    Raises:
        OutputDirectoryError: Somebody cannot write there, or does not see the others' files.
    """
    place = os.fspath(path)
    if "://" not in place:
        place = os.path.abspath(os.path.expanduser(place))
    mark = f".writable-{uuid.uuid4().hex}"

    def write_and_see(name: str, seen: str | None) -> str:
        """Why a process cannot write a file there, or see another one; "" if it can."""
        try:
            fs, folder = fsspec.core.url_to_fs(place)
            fs.makedirs(folder, exist_ok=True)
            fs.pipe_file(f"{folder}/{name}", b"x")
            if seen is None:
                return ""
            fs.rm_file(f"{folder}/{name}")
            return "" if fs.exists(f"{folder}/{seen}") else "it does not see the files that others write there"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    problems: dict[str, str] = {}
    if failed := write_and_see(mark, None):
        problems["this process"] = failed
    else:
        if ray.is_initialized() and not place.startswith("memory://"):  # a process's own memory, for tests
            answers = on_each_node(lambda: write_and_see(f"{mark}-{uuid.uuid4().hex}", mark))
            problems = {node: answer for node, answer in answers.items() if answer}
        fs, folder = fsspec.core.url_to_fs(place)
        fs.rm_file(f"{folder}/{mark}")
    if problems:
        raise OutputDirectoryError(
            f"{what}={place!r}, where {len(problems)} place(s) cannot read and write",
            "a folder that this process and all nodes can write and see",
            "Take a folder that all nodes mount, or an object store (s3://bucket/folder), and check the permissions.",
            [f"{where}: {problem}" for where, problem in problems.items()],
        )


def check_travels(**objects: Any) -> None:
    """Check that objects can be sent to workers, which is done by pickling them.

    Args:
        objects: By the names under which they were passed.

    Raises:
        ConfigError: Some cannot; all are named, with the part of each that is the reason.
    """
    problems = []
    for name, value in objects.items():
        try:
            ray.cloudpickle.dumps(value)
        except Exception as error:
            _, reasons = ray.util.inspect_serializability(value, name=name, print_file=io.StringIO())
            parts = ", ".join(sorted({" -> ".join(map(str, reason.path)) for reason in reasons} - {name}))
            problems.append(f"{name}: {type(error).__name__}: {error}" + (f" (in {parts})" if parts else ""))
    if problems:
        raise ConfigError(
            f"{len(problems)} object(s) that cannot be sent to another process",
            "objects that can be pickled",
            "Locks, open files and connections stay where they are: pass paths or settings, and open them there.",
            problems,
        )
