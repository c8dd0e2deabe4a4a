"""One Ray cluster on this machine for all tests of a process; without Ray there are no tests here."""

import importlib.util

import pytest

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("ray") is None else []


@pytest.fixture(scope="session")
def cluster():
    """A cluster of one node with two CPUs."""
    import ray

    ray.init(
        num_cpus=2,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()
