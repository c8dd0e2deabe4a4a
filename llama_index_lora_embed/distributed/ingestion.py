"""Steps of LlamaIndex's `RayIngestionPipeline` that keep order, survive what fails, and share a journal."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.distributed.cluster import check_resources, check_travels, check_workers, connect
from llama_index_lora_embed.distributed.data import FATAL
from llama_index_lora_embed.distributed.journal import start_journals, stop_journals, use_journals

if TYPE_CHECKING:
    from llama_index.ingestion.ray import RayTransformComponent

ERROR_KEY = "ingestion_error"
"""Metadata key of a node that a step failed for; it is neither embedded nor shown to an LLM."""


def ray_transform(
    transform: TransformComponent | Callable[[], TransformComponent],
    *,
    num_workers: int = 1,
    batch_size: int = 64,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
) -> RayTransformComponent:
    """A step of a `RayIngestionPipeline`: a query generator, `LoraEmbedding`, or any other transformation.

    The plain `RayTransformComponent` loses the order of the nodes, runs in batches of one or two, loses the whole run
    to one exception, and does not start an actor again whose arguments are large. Here the order is kept (Ray Data's
    `preserve_order`, which stays set in this process); a node that a step fails for is passed on with the error in its
    metadata (`ERROR_KEY`); and the transformation is sent through Ray's object store. LLM query generators of all
    workers share their journal, which one process on this machine has open as long as the step exists, so that no
    journalled answer is paid for twice when a worker dies. Pipelines hold all nodes in this process; for more, see
    `embed_dataset` and `generate_queries`.

    Args:
        transform: What the workers get a copy of, or a function without arguments that makes it there.
        num_workers: Worker processes.
        batch_size: Nodes that a worker gets at once.
        cpus_per_worker: Processors of each.
        gpus_per_worker: GPUs of each.

    Raises:
        ConfigError: The transformation cannot be pickled, or a number is wrong.
        ClusterError: The cluster is missing, too small, or without this package.
        JournalError: A journal cannot be used, for example because another run has it open.
        MissingExtraError: llama-index-ingestion-ray is not installed.
    """
    step = require("llama_index.ingestion.ray").RayTransformComponent
    from ray.data import ActorPoolStrategy, DataContext

    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}", "at least 1", "64 is the default.")
    connect()
    check_travels(transform=transform)
    check_resources(num_workers, {"CPU": cpus_per_worker, "GPU": gpus_per_worker})
    check_workers()
    DataContext.get_current().execution_options.preserve_order = True
    journals = start_journals([transform])
    sent = [ray.put((transform, journals))]
    made: RayTransformComponent = step(
        GuardedTransform,
        {
            "batch_size": batch_size,
            "compute": ActorPoolStrategy(size=num_workers),
            "num_cpus": cpus_per_worker,
            "num_gpus": gpus_per_worker,
        },
        {"sent": sent},
    )
    weakref.finalize(made, stop_journals, journals).atexit = False  # Ray's own end of a process stops the actors
    return made


class GuardedTransform(TransformComponent):
    """A transformation in a worker, which fails for single nodes alone."""

    sent: Any
    """A list with the reference to (transformation, actors of journals)."""

    _transform: Any = PrivateAttr(default=None)

    def _loaded(self) -> Any:
        if self._transform is None:
            transform, journals = ray.get(self.sent[0])
            self._transform = transform if isinstance(transform, TransformComponent) else transform()
            use_journals([self._transform], journals)
        return self._transform

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Transform the nodes together, or one by one if that fails."""
        kwargs.pop("show_progress", None)  # the pipeline passes it on, and not every transformation takes it
        transform = self._loaded()
        try:
            return list(transform(nodes, **kwargs))
        except FATAL:
            raise
        except Exception:
            return [done for node in nodes for done in self._one(transform, node, kwargs)]

    @staticmethod
    def _one(transform: Any, node: BaseNode, kwargs: dict[str, Any]) -> Sequence[BaseNode]:
        try:
            return list(transform([node], **kwargs))
        except FATAL:
            raise
        except Exception as error:
            node.metadata[ERROR_KEY] = f"{type(error).__name__}: {error}"
            node.excluded_embed_metadata_keys.append(ERROR_KEY)
            node.excluded_llm_metadata_keys.append(ERROR_KEY)
            return [node]
