"""Reading an export, and loading one that ONNX Runtime or OpenVINO computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer

from llama_index_lora_embed.core.errors import AdapterError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.models.adapter_directory import check_digests

EXPORT_NAME = "export.json"
MODEL_FILES = {"onnx": "model.onnx", "openvino": "model.xml", "merged": "model.safetensors"}
TOKENIZER = "tokenizer"
_EXPORT_AGAIN = "Export again."
_Run = Callable[[list[np.ndarray[Any, Any]]], Any]

Backend = Literal["onnx", "openvino", "merged"]
Precision = Literal["fp32", "int8"]


@dataclass(frozen=True)
class Export:
    """`export.json`: the exported model, its source and its certificate.

    Attributes:
        fingerprint: SHA-256 of everything here that determines the exported model's vectors.
        source: Fingerprint of the model that was exported.
        name: That model's `model_name`.
        inputs: Names of the graph's inputs; none of a merged model.
        prompts: "query" and "document".
        certificate: See `export.Certificate`.
        files: SHA-256 of every file.
        created: UTC, ISO 8601.
    """

    fingerprint: str
    source: str
    name: str
    backend: Backend
    precision: Precision
    inputs: list[str]
    dimensions: int
    max_seq_length: int
    prompts: dict[str, str]
    certificate: dict[str, Any]
    files: dict[str, str]
    created: str

    @classmethod
    def read(cls, folder: Path) -> Export:
        """Read an export's description and compare every file with its digest.

        Raises:
            AdapterError: A file is missing or changed.
        """
        try:
            data = json.loads((folder / EXPORT_NAME).read_text(encoding="utf-8"))
            facts = cls(**{field.name: data[field.name] for field in fields(cls)})
            digests, _ = dict(facts.files), MODEL_FILES[facts.backend]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(f"an unreadable {folder / EXPORT_NAME} ({error})") from error
        if facts.fingerprint != facts.compute_fingerprint():
            raise _damaged(f"{str(folder / EXPORT_NAME)!r}, which was changed")
        check_digests(folder, digests, _EXPORT_AGAIN)
        return facts

    def compute_fingerprint(self) -> str:
        """The value that `fingerprint` must have."""
        parts = (self.source, self.backend, self.precision, self.inputs, self.max_seq_length, self.prompts, self.files)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class ExportedModel:
    """An exported model with the attributes of a `SentenceTransformer` that `encode` uses.

    Raises:
        AdapterError: The graph cannot be loaded.
        MissingExtraError: The backend is not installed.
    """

    truncate_dim: int | None = None

    def __init__(self, folder: Path, facts: Export) -> None:
        self.device = torch.device("cpu")
        self.facts = facts
        self.prompts = dict(facts.prompts)
        self.max_seq_length = facts.max_seq_length
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder / TOKENIZER))
        file = str(folder / MODEL_FILES[facts.backend])
        try:
            self._run = (_onnx if facts.backend == "onnx" else _openvino)(file, facts.inputs)
        except (RuntimeError, ValueError, OSError) as error:
            raise _damaged(f"{file!r}, which {facts.backend} does not load ({error})") from error

    def __getitem__(self, index: int) -> ExportedModel:
        """It is its own only module."""
        return self

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.facts.dimensions

    def preprocess(self, texts: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        """Token tensors [texts, tokens]."""
        encoded = self.tokenizer(
            [(prompt or "") + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_seq_length,
            return_tensors="pt",
        )
        return {name: encoded[name] for name in self.facts.inputs}

    def __call__(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        """Vectors [texts, dimensions], float32."""
        arrays = [features[name].numpy() for name in self.facts.inputs]
        return {"sentence_embedding": torch.from_numpy(self._run(arrays))}


def _damaged(got: str) -> AdapterError:
    return AdapterError(got, "the original file", _EXPORT_AGAIN)


def _onnx(file: str, inputs: list[str]) -> _Run:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, dict(zip(inputs, arrays, strict=True)))[0]


def _openvino(file: str, inputs: list[str]) -> _Run:
    core = require("openvino").Core()
    # OpenVINO's default on CPUs with bfloat16 is bfloat16, which changes the search results
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = core.compile_model(file, "CPU", settings).create_infer_request()
    return lambda arrays: request.infer(arrays)[0].copy()
