"""An embedding model for ONNX Runtime or OpenVINO, with a certificate of how near it is to the plain one."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

_FEWEST = 20  # texts that a certificate takes
_QUERIES, _TOP = 200, 10
_CALIBRATION = 200  # texts by which int8's ranges are set
# (median cosine, share of the ten nearest that is the same) below which an export is refused
_LIMITS: dict[str, tuple[float, float]] = {"fp32": (0.9999, 0.99), "int8": (0.97, 0.85)}
_OPSET = 18
_ONNX_BYTES = 1.9e9  # protobuf's 2 GB, less what the graph itself takes


@dataclass(frozen=True)
class Certificate:
    """How near an exported model's vectors are to the plain one's, on the user's own texts.

    Attributes:
        texts: How many were compared.
        queries: How many of them, or of the queries given, were searched with.
        median_cosine: Of each text's two vectors.
        lowest_cosine: The same.
        agreement: Mean share of the ten nearest texts that is the same with both models, 0 to 1.
        identical: Share of the queries whose ten nearest are the same.
    """

    texts: int
    queries: int
    median_cosine: float
    lowest_cosine: float
    agreement: float
    identical: float

    def __str__(self) -> str:
        return (
            f"cosine {self.median_cosine:.5f} (lowest {self.lowest_cosine:.5f}) on {self.texts} texts; of the ten "
            f"nearest {self.agreement:.1%} are the same, all ten for {self.identical:.1%} of {self.queries} queries"
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
    """Write a model as a folder that `LoraEmbedding(path)` loads, computed by ONNX Runtime or OpenVINO.

    The LoRA is merged; pooling and normalisation are in the graph. int8 is ONNX Runtime's dynamic quantisation of
    matrix products by channel, and in OpenVINO NNCF's post-training quantisation with ranges from `texts`. What was
    written is loaded again and compared with the plain model, and refused if it is too far off.

    Args:
        embed_model: With an adapter, merged, or a base alone; it is unchanged.
        path: Folder to write; what was there stays as `<path>.previous`.
        texts: Some of the texts that will be embedded, 20 or more, better some hundred: what the certificate is about,
            and what int8 is calibrated with.
        queries: Some of the queries; None searches with the first 200 texts.
        backend: "onnx" or "openvino".
        precision: "fp32" or "int8".
        min_cosine: Median cosine of both models' vectors below which it is refused; None for 0.9999 with fp32 and 0.97
            with int8.
        min_agreement: Mean share of the ten nearest texts that must be the same; None for 0.99 with fp32 and 0.85 with
            int8.

    Raises:
        ConfigError: An argument is wrong, or the model reads texts in windows, or shares its base with others.
        ExportError: It cannot be exported, or the export is too far from the plain model; nothing was written.
        MissingExtraError: The extra "onnx" or "openvino" is not installed.
        OutputDirectoryError: The folder cannot be written.
    """
    texts = list(dict.fromkeys(check_texts(texts)))
    asked = texts[:_QUERIES] if queries is None else list(dict.fromkeys(check_texts(queries)))[:_QUERIES]
    limits = _checked(backend, precision, texts, asked, min_cosine, min_agreement)
    model = _exportable(embed_model)
    target = _free(Path(path).expanduser().resolve(), embed_model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging_beside(target) as staging, embed_model._lock:
            inputs = _write_graph(model, staging, backend, precision, texts)
            facts = _facts(embed_model, model, staging, backend, precision, inputs)
            certificate = _certify(model, ExportedModel(staging, facts), texts, asked)
            if not (certificate.median_cosine >= limits[0] and certificate.agreement >= limits[1]):  # NaN is neither
                raise ExportError(
                    f"an export to {backend} in {precision} that is too far from the plain model: {certificate}",
                    f"a median cosine of {limits[0]} and an agreement of {limits[1]:.0%} or more",
                    "Export in fp32, or lower min_cosine and min_agreement and measure the index (evaluate_index).",
                )
            written = replace(facts, certificate=asdict(certificate))
            (staging / EXPORT_NAME).write_text(json.dumps(asdict(written), indent=2) + "\n", encoding="utf-8")
            replace_directory(staging, target)
    except OSError as error:
        raise OutputDirectoryError(
            f"an export that cannot be written to {str(target)!r} ({error})",
            "a folder that can, with room",
            "Free some space, or name another path.",
        ) from error
    return certificate


def _free(target: Path, embed_model: LoraEmbedding) -> Path:
    """The folder to write, if nothing but an export is there, nor in `<path>.previous`, which it becomes."""
    sources = [Path(p).resolve() for p in (embed_model.adapter_path, embed_model.base_model) if p and Path(p).exists()]
    for folder in (target, target.with_name(target.name + ".previous")):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if folder in sources or (taken and not (folder / EXPORT_NAME).is_file()):
            raise OutputDirectoryError(
                f"{str(folder)!r}, which holds something else than an export",
                "a new or empty folder, or one that export has written",
                "Name another path; nothing was changed.",
            )
    return target


def _checked(
    backend: Any, precision: Any, texts: list[str], queries: list[str], min_cosine: Any, min_agreement: Any
) -> tuple[float, float]:
    problems = []
    if backend not in MODEL_FILES:
        problems.append(f"backend={backend!r}: expected 'onnx' or 'openvino'")
    if precision not in _LIMITS:
        problems.append(f"precision={precision!r}: expected 'fp32' or 'int8'")
    for name, value in (("min_cosine", min_cosine), ("min_agreement", min_agreement)):
        if value is not None and not is_share(value):
            problems.append(f"{name}={value!r}: expected a number from 0 to 1")
    if len(texts) < _FEWEST:
        problems.append(f"{len(texts)} different texts: expected {_FEWEST} or more of those that will be embedded")
    if not queries:
        problems.append("no queries: expected some, or queries=None")
    if problems:
        raise ConfigError(f"{len(problems)} wrong argument(s)", "what export takes", "Correct these:", problems)
    cosine, agreement = _LIMITS[precision]
    return (cosine if min_cosine is None else min_cosine, agreement if min_agreement is None else min_agreement)


def _exportable(embed_model: LoraEmbedding) -> SentenceTransformer:
    from llama_index_lora_embed.models.windows import window_of

    model = embed_model._own_model()
    if window_of(model) is not None:
        raise ConfigError(
            "a model that reads long texts in windows", "one that reads each text at once", "Train one without window=."
        )
    if model.truncate_dim is not None:
        raise ConfigError("a model with truncate_dim", "one with all its dimensions", "Leave truncate_dim=None.")
    if not embed_model.merge and embed_model.adapter_path is not None:
        raise ConfigError("merge=False", "a merged adapter", "LoraEmbedding(path).export(...)")
    prompts = [model.prompts.get(task) for task in ("query", "document")]
    if any(prompts) and any(getattr(module, "include_prompt", True) is False for module in model):
        raise ConfigError(
            "a model whose pooling leaves the prompt's tokens out",
            "one that pools all tokens",
            "It cannot be exported.",
        )
    return model


class _Graph(nn.Module):
    """Token tensors by position to vectors, as an exporter wants it."""

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
    # two texts of different lengths, so that padding is part of the example
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
    except Exception as error:  # exporters raise of everything
        raise ExportError(
            f"a {type(model[0].auto_model).__name__} that {backend} cannot be given ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})",
            "an architecture whose graph can be traced",
            "Try the other backend, or serve the plain model.",
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
            f"a model of {size / 1e9:.1f} GB", "one of less than 2 GB, which an ONNX file holds", 'backend="openvino"'
        )
    # sizes that no example fixes, so that any batch and any length can be computed
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
        batches = [model.preprocess([text], prompt=prompt, task="document") for text in texts[:_CALIBRATION]]
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
    return replace(facts, fingerprint=facts.decided())


def _certify(plain: SentenceTransformer, exported: Any, texts: list[str], queries: list[str]) -> Certificate:
    """Compare both on the same texts and queries."""
    both = (plain, exported)
    passages = [encode(model, texts, "document") for model in both]
    return certificate_of(passages, [encode(model, queries, "query") for model in both])


def certificate_of(passages: Sequence[Any], asked: Sequence[Any]) -> Certificate:
    """How near a model's vectors are to another's.

    Args:
        passages: Of both models, the plain one first, [texts, dimension].
        asked: Of both, [queries, dimension].

    Raises:
        ExportError: There are NaN or infinite ones.
    """
    passages, asked = [_unit(each) for each in passages], [_unit(each) for each in asked]
    if not all(np.isfinite(vectors).all() for vectors in (*passages, *asked)):
        raise ExportError("vectors with NaN or infinity in them", "numbers", "Serve the model plainly, in float32.")
    cosines = (passages[0] * passages[1]).sum(axis=1)
    top = min(_TOP, len(cosines) - 1)
    nearest = [np.argsort(-(q @ p.T), axis=1, kind="stable")[:, :top] for q, p in zip(asked, passages, strict=True)]
    same = [len(set(a) & set(b)) / top for a, b in zip(*nearest, strict=True)]
    return Certificate(
        len(cosines),
        len(same),
        float(np.median(cosines)),
        float(cosines.min()),
        float(np.mean(same)),
        float(np.mean([share == 1 for share in same])),
    )


def _unit(vectors: Any) -> Any:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what exporters tell of their own progress."""
    root = logging.getLogger()  # which quantisation itself writes to; a filter holds nothing else back
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
