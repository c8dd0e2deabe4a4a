"""Exporting an embedding model, with a certificate of its agreement with the original."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llama_index_lora_embed.config.base import is_share
from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.core.errors import ConfigError, ExportError, OutputDirectoryError
from llama_index_lora_embed.core.files import replace_directory, staging_beside
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.embedding.encode import encode
from llama_index_lora_embed.embedding.exported import (
    EXPORT_NAME,
    MODEL_FILES,
    TOKENIZER,
    Backend,
    Export,
    ExportedModel,
    Precision,
)
from llama_index_lora_embed.models.adapter_directory import digests
from llama_index_lora_embed.models.tokens import check_texts
from llama_index_lora_embed.models.windows import window_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

_MIN_TEXTS = 20  # for a certificate
_QUERIES, _TOP = 200, 10
_CALIBRATION_TEXTS = 200  # for int8's ranges
# minimum median cosine, and minimum share of the ten nearest texts that both models have in common
_LIMITS: dict[str, tuple[float, float]] = {"fp32": (0.9999, 0.99), "int8": (0.97, 0.85)}
_OPSET = 18
_ONNX_BYTES = 1.9e9  # protobuf's limit of 2 GB, minus the size of the graph


@dataclass(frozen=True)
class Certificate:
    """Agreement of an exported model with the original on the user's own texts."""

    texts: int
    """Number of texts that were compared."""
    queries: int
    """Number of queries that were searched with."""
    median_cosine: float
    lowest_cosine: float
    agreement: float
    """Mean share of the ten nearest texts that both models have in common, 0 to 1."""
    identical: float
    """Share of the queries for which both models have the same ten nearest texts, 0 to 1."""

    def __str__(self) -> str:
        return (
            f"cosine {self.median_cosine:.5f} (lowest {self.lowest_cosine:.5f}) on {self.texts} texts; "
            f"{self.agreement:.1%} of the ten nearest texts are the same, all ten for {self.identical:.1%} of "
            f"{self.queries} queries"
        )


def export_model(
    embed_model: LoraEmbedding,
    path: str | os.PathLike[str],
    *,
    texts: Sequence[str],
    queries: Sequence[str] | None = None,
    backend: Backend = "onnx",
    precision: Precision = "fp32",
    min_cosine: float | None = None,
    min_agreement: float | None = None,
) -> Certificate:
    """Write a model for ONNX Runtime or OpenVINO, or as a full model, into a folder that `LoraEmbedding(path)` loads.

    The LoRA is merged. For ONNX Runtime and OpenVINO, pooling and normalisation are part of the graph. "merged" is what
    `SentenceTransformer(path)` loads, safetensors in float32 and their modules, for other servers (docs/serving.md).
    int8 is ONNX Runtime's dynamic quantisation of matrix products per channel, or, for OpenVINO, NNCF's post-training
    quantisation with ranges from `texts`. The export is loaded and compared with the original, and refused if their
    agreement is too low.

    Args:
        embed_model: A merged adapter, or a base model alone; it is unchanged.
        path: Folder to write; an export in it is kept as `<path>.previous`.
        texts: A sample of the texts to be embedded, at least 20 and better some hundred, with which the two models are
            compared and int8 is calibrated.
        queries: A sample of the queries; None searches with the first 200 texts.
        backend: "onnx", "openvino" or "merged".
        precision: "fp32", or "int8" for the first two.
        min_cosine: Minimum median cosine of both models' vectors; None for 0.9999 with fp32 and 0.97 with int8.
        min_agreement: Minimum mean share of the ten nearest texts that both models have in common; None for 0.99 with
            fp32 and 0.85 with int8.

    Raises:
        ConfigError: An argument is wrong, or the model has windows or shares its base model with others.
        ExportError: The model cannot be exported, or the agreement is too low; nothing was written.
        MissingExtraError: The extra "onnx" or "openvino" is not installed.
        OutputDirectoryError: The folder cannot be written.
    """
    texts = list(dict.fromkeys(check_texts(texts)))
    probes = texts[:_QUERIES] if queries is None else list(dict.fromkeys(check_texts(queries)))[:_QUERIES]
    limits = _check_arguments(backend, precision, texts, probes, min_cosine, min_agreement)
    model = _check_exportable(embed_model)
    target = Path(path).expanduser().resolve()
    _check_target(target, embed_model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging_beside(target) as staging, embed_model.backend.lock:
            if backend == "merged":
                model.save_pretrained(str(staging), create_model_card=False)
                inputs: list[str] = []
            else:
                inputs = _write_graph(model, staging, backend, precision, texts)
            facts = _facts(embed_model, model, staging, backend, precision, inputs)
            written = ExportedModel(staging, facts) if backend != "merged" else _as_others_load_it(staging, model)
            both: tuple[Any, ...] = (model, written)
            certificate = certificate_of(
                [encode(each, texts, "document") for each in both], [encode(each, probes, "query") for each in both]
            )
            if not (certificate.median_cosine >= limits[0] and certificate.agreement >= limits[1]):  # False for NaN
                raise ExportError(
                    f"an export to {backend} in {precision} that differs too much from the original: {certificate}",
                    f"a median cosine of at least {limits[0]} and an agreement of at least {limits[1]:.0%}",
                    "Export in fp32, or lower min_cosine and min_agreement and evaluate the index (evaluate_index).",
                )
            certified = replace(facts, certificate=asdict(certificate))
            (staging / EXPORT_NAME).write_text(json.dumps(asdict(certified), indent=2) + "\n", encoding="utf-8")
            replace_directory(staging, target)
    except OSError as error:
        raise OutputDirectoryError(
            f"an export that cannot be written to {str(target)!r} ({error})",
            "a writable folder with free space",
            "Free some space, or choose another path.",
        ) from error
    return certificate


def _check_target(target: Path, embed_model: LoraEmbedding) -> None:
    """Check that neither the folder nor `<path>.previous`, to which it is moved, contains anything but an export."""
    sources = [Path(p).resolve() for p in (embed_model.adapter_path, embed_model.base_model) if p and Path(p).exists()]
    for folder in (target, target.with_name(target.name + ".previous")):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if folder in sources or (taken and not (folder / EXPORT_NAME).is_file()):
            raise OutputDirectoryError(
                f"{str(folder)!r}, which contains something other than an export",
                "a new or empty folder, or an export",
                "Choose another path; nothing was changed.",
            )


def _check_arguments(
    backend: Any, precision: Any, texts: list[str], queries: list[str], min_cosine: Any, min_agreement: Any
) -> tuple[float, float]:
    """The lower bounds of median cosine and agreement."""
    problems = []
    if backend not in MODEL_FILES:
        problems.append(f"backend={backend!r}: expected 'onnx', 'openvino' or 'merged'")
    if precision not in _LIMITS or (backend == "merged" and precision != "fp32"):
        problems.append(f"precision={precision!r}: expected 'fp32', or 'int8' for 'onnx' and 'openvino'")
    for name, value in (("min_cosine", min_cosine), ("min_agreement", min_agreement)):
        if value is not None and not is_share(value):
            problems.append(f"{name}={value!r}: expected a number from 0 to 1")
    if len(texts) < _MIN_TEXTS:
        problems.append(f"{len(texts)} different texts: expected at least {_MIN_TEXTS} of those to be embedded")
    if not queries:
        problems.append("no queries: expected some, or queries=None")
    if problems:
        raise ConfigError(f"{len(problems)} wrong argument(s)", "arguments of export_model", "Correct these:", problems)
    cosine, agreement = _LIMITS[precision]
    return (cosine if min_cosine is None else min_cosine, agreement if min_agreement is None else min_agreement)


def _check_exportable(embed_model: LoraEmbedding) -> SentenceTransformer:
    model = embed_model.backend.own_model()
    if embed_model.passage_fingerprint != embed_model.fingerprint:
        raise ConfigError(
            'a model that was trained with tune="query", whose queries and passages have different weights',
            "a model with the same weights for both",
            "Export the base for passages, and merge the adapter for queries with LoraEmbedding(path).",
        )
    if window_of(model) is not None:
        raise ConfigError("a model with windows", "a model without windows", "Train one without window=.")
    if model.truncate_dim is not None:
        raise ConfigError("a model with truncate_dim", "a model with all dimensions", "Leave truncate_dim=None.")
    if not embed_model.merge and embed_model.adapter_path is not None:
        raise ConfigError("merge=False", "a merged adapter", "LoraEmbedding(path).export(...)")
    prompts = [model.prompts.get(task) for task in ("query", "document")]
    if any(prompts) and any(getattr(module, "include_prompt", True) is False for module in model):
        raise ConfigError(
            "a model whose pooling excludes the prompt's tokens",
            "a model that pools all tokens",
            "This model cannot be exported; leave its prompts empty, or serve it without export.",
        )
    return model


def _as_others_load_it(folder: Path, model: SentenceTransformer) -> SentenceTransformer:
    """A written model by sentence-transformers alone, without this package's settings."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device=str(model.device), local_files_only=True)


class _Graph(nn.Module):
    """The model as a function of positional token tensors, which exporters require."""

    def __init__(self, model: SentenceTransformer, inputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *tensors: Tensor) -> Tensor:
        vectors: Tensor = self.model(dict(zip(self.inputs, tensors, strict=True)))["sentence_embedding"]
        return vectors


def _write_graph(
    model: SentenceTransformer, folder: Path, backend: Backend, precision: Precision, texts: list[str]
) -> list[str]:
    # two texts of different lengths, so that the example contains padding
    features = model.preprocess([texts[0][:200] + " and more", "short"])
    inputs = [name for name, value in features.items() if isinstance(value, Tensor) and value.ndim == 2]
    example = tuple(features[name].cpu() for name in inputs)
    model.tokenizer.save_pretrained(str(folder / TOKENIZER))
    device = model.device
    write = _to_onnx if backend == "onnx" else _to_openvino
    try:
        with torch.inference_mode(False), torch.no_grad(), _quietly():
            write(_Graph(model.cpu().eval(), inputs), example, folder, precision, model, texts)
    except (ImportError, OSError, ConfigError):
        raise
    except Exception as error:  # exporters raise many kinds of errors
        raise ExportError(
            f"a {type(model[0].auto_model).__name__}, whose export to {backend} failed ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})",
            "an architecture whose graph can be traced",
            "Try the other backend, or serve the model without export.",
        ) from error
    finally:
        model.to(device)
    return inputs


def _to_onnx(
    graph: _Graph, example: tuple[Tensor, ...], folder: Path, precision: Precision, model: Any, texts: list[str]
) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module)
    size = sum(parameter.nbytes for parameter in graph.parameters())
    if size > _ONNX_BYTES:
        raise ConfigError(
            f"a model of {size / 1e9:.1f} GB", "less than 2 GB, the limit of an ONNX file", 'Use backend="openvino".'
        )
    # dynamic, so that batches of any size and length can be computed
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    whole = folder / ("whole.onnx" if precision == "int8" else MODEL_FILES["onnx"])
    torch.onnx.export(
        graph, example, str(whole), dynamo=True, input_names=graph.inputs, output_names=["sentence_embedding"],
        dynamic_shapes=((sizes,) * len(example),), external_data=False, opset_version=_OPSET, verbose=False,
    )  # fmt: skip
    if precision == "int8":
        quantization = require("onnxruntime.quantization")
        quantization.quantize_dynamic(
            str(whole), str(folder / MODEL_FILES["onnx"]), weight_type=quantization.QuantType.QInt8, per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
        )  # fmt: skip
        whole.unlink()


def _to_openvino(
    graph: _Graph, example: tuple[Tensor, ...], folder: Path, precision: Precision, model: Any, texts: list[str]
) -> None:
    openvino = require("openvino")
    converted = openvino.convert_model(graph, example_input=example)
    for number, port in enumerate(converted.inputs):
        port.get_tensor().set_names({graph.inputs[number]})
        converted.reshape({port: [-1, -1] for port in converted.inputs})
    if precision == "int8":
        nncf = require("nncf")
        prompt = model.prompts.get("document") or None
        batches = [model.preprocess([text], prompt=prompt, task="document") for text in texts[:_CALIBRATION_TEXTS]]
        converted = nncf.quantize(
            converted,
            nncf.Dataset(batches, lambda features: [features[name].cpu().numpy() for name in graph.inputs]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
        )
    openvino.save_model(converted, str(folder / MODEL_FILES["openvino"]), compress_to_fp16=False)


def _facts(
    embed_model: LoraEmbedding, model: SentenceTransformer, folder: Path, backend: Backend, precision: Precision,
    inputs: list[str],
) -> Export:  # fmt: skip
    facts = Export(
        fingerprint="",
        source=str(embed_model.fingerprint),
        name=embed_model.model_name,
        backend=backend,
        precision=precision,
        inputs=inputs,
        dimensions=int(model.get_embedding_dimension() or 0),
        max_seq_length=embed_model.max_seq_length,
        prompts={task: model.prompts.get(task) or "" for task in ("query", "document")},
        certificate={},
        files=digests(folder),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return replace(facts, fingerprint=facts.compute_fingerprint())


def certificate_of(passages: Sequence[Any], queries: Sequence[Any]) -> Certificate:
    """Compare two models by their vectors of passages and queries, those of the original first, [texts, dimension].

    Raises:
        ExportError: A vector contains NaN or infinity.
    """
    passages, queries = [unit_norm(each) for each in passages], [unit_norm(each) for each in queries]
    if not all(np.isfinite(vectors).all() for vectors in (*passages, *queries)):
        raise ExportError(
            "vectors with NaN or infinity", "finite vectors", "Serve the model in float32, without export."
        )
    cosines = (passages[0] * passages[1]).sum(axis=1)
    top = min(_TOP, len(cosines) - 1)
    nearest = [np.argsort(-(q @ p.T), axis=1, kind="stable")[:, :top] for q, p in zip(queries, passages, strict=True)]
    same = [len(set(a) & set(b)) / top for a, b in zip(*nearest, strict=True)]
    return Certificate(
        len(cosines),
        len(same),
        float(np.median(cosines)),
        float(cosines.min()),
        float(np.mean(same)),
        float(np.mean([share == 1 for share in same])),
    )


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporters' own progress messages."""
    root = logging.getLogger()  # quantisation logs to it; a logger's filter does not affect its children
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "nncf")]
    before = [logger.level for logger in noisy]
    try:
        root.addFilter(_is_error)
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(_is_error)
        for logger, was in zip(noisy, before, strict=True):
            logger.setLevel(was)
