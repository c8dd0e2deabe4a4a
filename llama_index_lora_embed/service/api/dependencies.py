"""What routes depend on."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from llama_index_lora_embed.service.security import Caller, require
from llama_index_lora_embed.service.services import Services


async def _services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


ServicesOf = Annotated[Services, Depends(_services)]
"""The application's `Services`."""
Reader = Annotated[Caller, Depends(require("read"))]
"""A caller who may see jobs, files and adapters."""
Trainer = Annotated[Caller, Depends(require("train"))]
"""A caller who may create and change jobs and files."""
