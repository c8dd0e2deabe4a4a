"""Publish an adapter directory on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from llama_index_lora_embed.config import MANIFEST_NAME
from llama_index_lora_embed.core.errors import AdapterError, ConfigError, HubError
from llama_index_lora_embed.models import adapter_directory
from llama_index_lora_embed.models.model_card import model_card

_CARD = "README.md"


def push_to_hub(
    adapter_path: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an adapter directory as one commit; `LoraEmbedding(repo_id, revision=...)` loads it.

    Every file is checked against its digest first. Only files that `finetune()` wrote are uploaded, without paths of
    this computer. The model card is the directory's README.md; unless a user has edited it, its examples name the
    repository.

    Args:
        adapter_path: A directory that this package wrote.
        repo_id: "user/name"; a missing repository is created.
        base_model: Hub id of the base model; required if the adapter was trained on a base in a folder. Loading the
            adapter checks that the base has the weights that it was trained on.
        private: Visibility of a repository that is created now; None for the account's default.
        revision: Branch to commit to; None for the main branch.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: None for a message with the verdict and the fingerprint.
        token: Hub token; None for the one stored by `hf auth login`.

    Returns:
        The commit hash, 40 hexadecimal digits, for `LoraEmbedding(revision=...)`.

    Raises:
        AdapterError: The directory is damaged, or this package did not write it.
        ConfigError: The base is in a folder, where other users cannot find it, or base_model is not a Hub id.
        HubError: The Hub cannot be reached or refuses the upload; nothing was committed.

    Example:
        >>> push_to_hub("runs/handbook", "me/handbook-lora")  # doctest: +SKIP
        '5f0c2b6d8e...'
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    path = Path(adapter_path).expanduser()
    manifest = adapter_directory.check_files(path)
    if manifest is None:
        raise AdapterError(
            f"{str(path)!r} without a {MANIFEST_NAME}",
            "an adapter directory that this package wrote",
            "Pass the model_output_path of a run.",
        )
    if base_model is not None and (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model) or base_model.startswith(".") or Path(base_model).exists()
    ):
        raise ConfigError(
            f"base_model={base_model!r}",
            "the Hub id of the base model",
            'base_model="sentence-transformers/all-MiniLM-L6-v2"',
        )
    if base_model is None and manifest.base.get("revision") is None:
        raise ConfigError(
            f"an adapter for the base in the folder {manifest.base.get('model_id')!r}",
            "a base on the Hub, where other users can find it",
            'push_to_hub(path, repo_id, base_model="sentence-transformers/all-MiniLM-L6-v2")',
        )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder) / "adapter"
        for name in (*manifest.files, MANIFEST_NAME, _CARD):  # no other files of the user
            if (path / name).exists():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path / name, staging / name)
        _remove_local_paths(staging, manifest, repo_id, base_model)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staging,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message
                or f"{manifest.verdict.split(':')[0] or 'LoRA adapter'}, fingerprint {manifest.fingerprint[:12]}",
            )
        except (HfHubHTTPError, OfflineModeIsEnabled, HTTPError, OSError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise HubError(
                f"no commit to {repo_id!r} ({type(error).__name__}: {reason})",
                "a repository with write access",
                "Log in with `hf auth login` or pass token=, and check the name and HF_HUB_OFFLINE.",
            ) from error
    return commit.oid


def _remove_local_paths(
    directory: Path, manifest: adapter_directory.Manifest, repo_id: str, base_model: str | None
) -> None:
    """Replace the paths of this computer in a copy of an adapter directory."""
    card, config = directory / _CARD, directory / adapter_directory.CONFIG_NAME
    edited = card.exists() and card.read_text(encoding="utf-8", errors="replace") != model_card(manifest)
    if base_model is not None:
        manifest = replace(manifest, base={**manifest.base, "model_id": base_model, "revision": None})
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": manifest.base["model_id"], "revision": manifest.base["revision"]}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    if manifest.parent is not None:
        manifest = replace(manifest, parent={**manifest.parent, "path": ""})
    local = [parent for parent in manifest.parents if Path(parent["path"]).is_absolute()]
    manifest = replace(manifest, parents=[{**p, "path": ""} if p in local else p for p in manifest.parents])
    if not edited:
        card.write_text(model_card(manifest, repo_id, base_on_hub=True), encoding="utf-8")
    manifest = replace(manifest, files=adapter_directory.digests(directory))
    (directory / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2), encoding="utf-8")
