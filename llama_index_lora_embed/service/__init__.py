"""Fine-tuning as a service: jobs over HTTP. It needs the extra `server`."""

from llama_index_lora_embed.core.optional import require

for _module in ("fastapi", "huey", "prometheus_client", "pydantic_settings", "python_multipart", "sqlmodel", "uvicorn"):
    require(_module)
