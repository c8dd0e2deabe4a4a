"""The report of a job, for its page."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.service.settings import ServiceSettings

if TYPE_CHECKING:
    from llama_index_lora_embed.engines.result import FinetuneResult

logger = logging.getLogger(__name__)


def write_report(result: FinetuneResult, settings: ServiceSettings, job_id: str) -> None:
    """Write `settings.report(job_id)`, without the folders of this machine.

    A job has none where the extra "report" is not installed, or nothing was evaluated; it succeeds all the same.
    """
    draft = settings.jobs_dir / job_id / "report.html"
    try:
        result.write_report(draft)
        with whole_file(settings.report(job_id)) as file:
            file.write(settings.without_folders(draft.read_text(encoding="utf-8")))
        draft.unlink()
    except Exception as error:
        logger.warning("no report: %s", error, extra={"job": job_id})
