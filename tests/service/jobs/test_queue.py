import os
import threading
import time

import pytest

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.service.jobs.queue import JobQueue
from tests.helpers.servers import redis_server


@pytest.fixture(scope="module")
def redis_url():
    with redis_server() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.extended)])
def queue_settings(request, service_settings):
    if request.param == "redis":
        return service_settings.model_copy(update={"queue_url": request.getfixturevalue("redis_url")})
    return service_settings


@pytest.fixture
def queue(queue_settings):
    made = JobQueue(queue_settings)
    while made.take(0):
        pass
    yield made
    made.close()


def test_ids_come_out_once_in_their_order(queue):
    for name in "abc":
        queue.put(name)
    assert len(queue) == 3
    assert [queue.take(0) for _ in range(4)] == ["a", "b", "c", None]


def test_another_process_sees_the_messages(queue, queue_settings):
    queue.put("a")
    other = JobQueue(queue_settings)
    assert other.take(0) == "a"
    assert queue.take(0) is None
    other.close()


def test_a_waiting_worker_is_woken_by_a_message_and_by_a_stop(queue):
    threading.Timer(0.3, queue.put, ("a",)).start()
    assert queue.take(10) == "a"
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    assert queue.take(60, stop.is_set) is None
    assert time.monotonic() - started < 30


def test_concurrent_workers_get_each_message_once(queue):
    for number in range(40):
        queue.put(str(number))
    got = []

    def work():
        while (message := queue.take(0)) is not None:
            got.append(message)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got, key=int) == [str(number) for number in range(40)]


def test_a_queue_file_that_is_deleted_is_made_again(service_settings):
    queue = JobQueue(service_settings)
    queue.put("a")
    queue.close()
    for name in os.listdir(service_settings.folder):
        if name.startswith("queue.db"):
            os.remove(service_settings.folder / name)
    queue = JobQueue(service_settings)
    assert queue.take(0) is None
    queue.put("b")
    assert queue.take(0) == "b"
    queue.close()


def test_a_queue_of_another_kind_is_refused(service_settings):
    with pytest.raises(ConfigError, match="redis://"):
        JobQueue(service_settings.model_copy(update={"queue_url": "amqp://localhost"}))
