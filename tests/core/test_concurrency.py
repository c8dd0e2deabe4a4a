import asyncio
import contextvars
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest

from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError

WHO = contextvars.ContextVar("WHO", default="nobody")


async def which_loop():
    await asyncio.sleep(0)
    return id(asyncio.get_running_loop())


def test_all_calls_share_one_loop_from_scripts_threads_and_notebooks():
    async def cell():
        return run_async(which_loop()), id(asyncio.get_running_loop())

    in_script = run_async(which_loop())
    in_notebook, notebooks_own = asyncio.run(cell())
    in_thread = []
    thread = threading.Thread(target=lambda: in_thread.append(run_async(which_loop())))
    thread.start()
    thread.join()
    assert in_script == in_notebook == in_thread[0] != notebooks_own


def test_errors_and_context_variables_cross_the_threads():
    async def fails():
        await asyncio.sleep(0)
        raise ValueError(WHO.get())

    WHO.set("the caller")
    with pytest.raises(ValueError, match="the caller"):
        run_async(fails())


def test_a_synchronous_call_from_within_asynchronous_work_is_refused():
    async def nested():
        return run_async(which_loop())

    with pytest.raises(ConfigError, match="Await"):
        run_async(nested())


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
def test_a_task_that_exits_ends_its_caller_and_not_the_loop(stop):
    async def exits():
        await asyncio.sleep(0)
        raise stop

    async def waits_for_it():
        await asyncio.gather(asyncio.create_task(exits()), asyncio.sleep(30))

    before = run_async(which_loop())
    for work in (exits, waits_for_it):
        with pytest.raises(stop):
            run_async(work())
    assert run_async(which_loop()) == before


def test_work_that_never_suspends_runs_in_the_calling_thread_without_a_loop():
    async def here():
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return threading.current_thread()

    assert run_async(here(), suspends=False) is threading.current_thread()
    with pytest.raises(AssertionError, match="suspended"):
        run_async(asyncio.sleep(0), suspends=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_a_loop_of_its_own():
    run_async(which_loop())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(run_async_in_child).get(timeout=30) == "done"


def run_async_in_child():
    return run_async(asyncio.sleep(0, "done"))


@pytest.mark.parametrize("where", ["script", "notebook"])
def test_an_interrupt_cancels_the_work_and_waits_for_its_clean_up(where):
    code = f"""
import asyncio, os, signal, threading
from llama_index_lora_embed.core.concurrency import run_async
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would have inherited it as ignored

async def work():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        await asyncio.sleep(30)
    finally:
        await asyncio.sleep(0.3)
        print("cleaned up")

def call():
    try:
        run_async(work())
    except KeyboardInterrupt:
        print("interrupted")

async def cell():
    call()

if {where!r} == "script":
    call()
else:
    asyncio.new_event_loop().run_until_complete(cell())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.split("\n")[:2] == ["cleaned up", "interrupted"], run.stderr
