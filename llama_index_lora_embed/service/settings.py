"""`ServiceSettings`: what server and workers are told by environment variables `LORA_EMBED_...`."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from llama_index_lora_embed.config import DEFAULT_BASE
from llama_index_lora_embed.config.base import Above0, AtLeast1, Text, config_error
from llama_index_lora_embed.config.training import Device
from llama_index_lora_embed.core.files import absolute

DAY = 86_400.0
AllowedModels = Annotated[
    dict[Text, Text], BeforeValidator(lambda v: {name: name for name in v} if isinstance(v, (list, tuple)) else v)
]
"""Public name to folder or Hub id; a list of Hub ids is taken, too."""


class ServiceSettings(BaseSettings):
    """Settings of the service, the same for the server and its workers.

    Each field is read from the environment variable `LORA_EMBED_` and its name in capitals, mappings as JSON.

    Example:
        >>> ServiceSettings(data_dir="/srv/lora-embed", allowed_models={"minilm": "/models/minilm"}).port
        8080
    """

    model_config = SettingsConfigDict(
        env_prefix="LORA_EMBED_", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    data_dir: Path = Path("lora-embed-data")
    """Folder of everything that the service writes: databases, uploaded files, training data, checkpoints, adapters."""
    database_url: str | None = None
    """SQLAlchemy URL of the database, such as `postgresql+psycopg://user:password@host/name`; none is a SQLite file
    in `data_dir`."""
    queue_url: str | None = None
    """`redis://host:6379/0` for a queue on Redis; none is a SQLite file in `data_dir`. The queue only wakes workers:
    what is lost with it is found again in the database."""
    host: Text = "127.0.0.1"
    """Address that the server listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port that the server listens on; 0 takes a free one."""
    auth: Literal["on", "off"] = "on"
    """"off" asks for no tokens, which only a loopback `host` may."""
    log_format: Literal["text", "json"] = "text"
    """How log lines are written to standard error: for people, or a JSON object each."""
    allowed_models: AllowedModels = {DEFAULT_BASE: DEFAULT_BASE}
    """Base models that a request may name: name to folder or Hub id, or a list of Hub ids. Code that a model brings
    along is never run."""
    device: Device | None = None
    """torch device of a worker and of the server's embeddings; none takes a GPU if there is one."""
    executor: Literal["local", "ray"] = "local"
    """"ray" has a worker send jobs to Ray Jobs instead of training them. The database, the queue and `data_dir` must be
    the same on all nodes of the cluster."""
    ray_address: Text | None = None
    """Address of the cluster's dashboard, such as `http://head:8265`; none takes that of this machine."""
    ray_cpus: Above0 = 1.0
    """CPUs that a job on Ray takes."""
    ray_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that a job on Ray takes."""
    max_jobs_per_token: AtLeast1 = 10
    """Jobs of one token that may be queued, running or paused at once."""
    max_queued_jobs: AtLeast1 = 100
    """Jobs of all tokens that may be queued at once."""
    max_rows: AtLeast1 = 100_000
    """Rows of training data (pairs, triplets, nodes) per job, and of validation data."""
    max_row_characters: AtLeast1 = 100_000
    """Characters of one text of the data."""
    max_body_bytes: AtLeast1 = 64 * 2**20
    """Size of a request's body, uploads excepted."""
    max_upload_bytes: AtLeast1 = 512 * 2**20
    """Size of an uploaded file."""
    client_timeout_s: Above0 = 30.0
    """Seconds that a client has for the headers of a request, and again for its body, which has one more for each 1,000
    bytes; slower ones are refused, so that they hold neither connections nor memory."""
    max_texts: AtLeast1 = 2048
    """Texts per request for embeddings; 2048 is OpenAI's limit."""
    max_characters: AtLeast1 = 2_000_000
    """Characters of all texts of a request for embeddings."""
    max_evaluation_texts: AtLeast1 = 20_000
    """Queries and passages of a request for metrics."""
    batch_wait_s: Annotated[float, Field(ge=0, le=1)] = 0.003
    """Seconds for which a request for embeddings waits for others, which are then computed together."""
    max_loaded_models: AtLeast1 = 2
    """Base models that the server has in memory."""
    max_loaded_adapters: AtLeast1 = 32
    """Adapters that the server has in memory with each base model."""
    requests_per_minute: AtLeast1 = 6000
    """Requests of one token."""
    max_job_seconds: Above0 = DAY
    """Seconds that a job may train, over all its attempts; then it fails, and its checkpoint is kept."""
    max_lost_attempts: AtLeast1 = 5
    """Workers that a job may lose in a row without a new checkpoint; then it fails instead of being tried again."""
    checkpoint_steps: AtLeast1 = 50
    """Steps between checkpoints."""
    lease_s: Above0 = 30.0
    """Seconds after which a job goes back to the queue if its worker has not been heard of."""
    heartbeat_s: Above0 = 5.0
    """Seconds between a worker's renewals of its lease, at which it also learns of a wish to cancel or pause."""
    sweep_s: Above0 = 5.0
    """Seconds between searches for expired leases and lost messages, in the server and in each worker."""
    sse_heartbeat_s: Above0 = 15.0
    """Seconds without news after which an event stream sends a heartbeat."""
    shutdown_s: Annotated[int, Field(ge=0)] = 30
    """Seconds that the server waits for requests to end when it is stopped."""
    keep_files_s: Above0 | None = 30 * DAY
    """Age at which an uploaded file is deleted; none keeps all. Jobs have a copy of their data."""
    keep_runs_s: Above0 | None = 30 * DAY
    """Time after a job's end at which its training data and checkpoints are deleted; none keeps all. Adapters are kept
    until their model is deleted."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(type(self), error) from None

    @model_validator(mode="after")
    def _fields_fit_together(self) -> ServiceSettings:
        if self.auth == "off" and not _is_loopback(self.host):
            raise ValueError(
                f"auth='off' with host={self.host!r}: expected auth='on', or a loopback host such as '127.0.0.1'"
            )
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lease_s={self.lease_s:g} with heartbeat_s={self.heartbeat_s:g}: expected a lease of at least two "
                "heartbeats"
            )
        return self

    def environment(self) -> dict[str, str]:
        """Environment variables that give another process these settings."""
        values = self.model_dump(mode="json", include=self.model_fields_set, exclude_none=True)
        values["data_dir"] = str(self.folder)
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        return {f"{self.model_config['env_prefix']}{name}".upper(): text for name, text in texts.items()}

    def without_folders(self, message: str) -> str:
        """A message without the folders of this machine, which are nobody else's business."""
        for name, place in self.allowed_models.items():
            message = message.replace(absolute(place), name)
        return message.replace(str(self.folder), "<data>")

    @property
    def database(self) -> str:
        """The database's URL, SQLite's where none is set."""
        return self.database_url or f"sqlite:///{self.folder / 'service.db'}"

    @property
    def folder(self) -> Path:
        """`data_dir` as an absolute path."""
        return self.data_dir.expanduser().absolute()

    @property
    def files_dir(self) -> Path:
        """Uploaded files, by their ids."""
        return self.folder / "files"

    @property
    def models_dir(self) -> Path:
        """Adapter directories and, beside them, run directories with checkpoints, by the ids of their jobs."""
        return self.folder / "models"

    def report(self, job_id: str) -> Path:
        """The report of a job, a page that stays as long as its adapter."""
        return self.models_dir / f"{job_id}.report.html"

    @property
    def adapters_dir(self) -> Path:
        """The registries of named adapters, a folder for each."""
        return self.folder / "adapters"

    @property
    def labelling_dir(self) -> Path:
        """Grades that people give on the page, a folder for each labelling."""
        return self.folder / "labelling"

    @property
    def jobs_dir(self) -> Path:
        """Training data, in a folder for each job."""
        return self.folder / "jobs"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
