"""Fine-tuning as a service: jobs over HTTP. It needs the extra `server`."""

import llama_index_lora_embed.core.optional as _optional

for _module in (
    *("fastapi", "httptools", "huey", "prometheus_client", "pydantic_settings", "python_multipart"),
    *("sqlmodel", "uvicorn"),
):
    _optional.require(_module)
