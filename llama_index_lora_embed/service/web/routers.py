"""The routers of all pages."""

from __future__ import annotations

from fastapi import APIRouter

from llama_index_lora_embed.service.web import adapters, jobs, labelling, login, pages, search

ROUTERS: tuple[APIRouter, ...] = tuple(module.router for module in (pages, login, jobs, adapters, search, labelling))
