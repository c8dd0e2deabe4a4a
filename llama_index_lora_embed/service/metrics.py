"""Metrics for Prometheus: requests of this process, and the jobs of the whole service as the database has them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_index_lora_embed.service.jobs.state import Status
from llama_index_lora_embed.service.services import Services


class Metrics:
    """The metrics of an application; `registry` takes more of them.

    Args:
        services: Of the application.
    """

    def __init__(self, services: Services) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lora_embed_requests", "Answered requests", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "lora_embed_request_seconds", "Time until an answer begins", ["route"], registry=self.registry
        )
        self.registry.register(_Jobs(services))


class _Jobs(Collector):
    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("lora_embed_jobs", "Jobs by status", labels=["status"])
        counts = self._services.jobs.counts()
        for status in get_args(Status):
            jobs.add_metric([status], counts.get(status, 0))
        yield jobs
        yield GaugeMetricFamily("lora_embed_queue_messages", "Messages in the queue", value=len(self._services.queue))

    def describe(self) -> list[Metric]:
        return []  # without asking the database


class MetricsMiddleware:
    """Counts requests by their route's template, so that ids in paths make no series of their own.

    Args:
        app: The application below.
        metrics: Where to count.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unknown")
                self.metrics.requests.labels(scope["method"], route, message["status"]).inc()
                self.metrics.seconds.labels(route).observe(time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, counted)
