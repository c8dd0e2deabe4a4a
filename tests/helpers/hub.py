"""A local Hugging Face Hub: enough of its HTTP API to create a repository, commit and download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local"


class LocalHub:
    """State of the server.

    Attributes:
        commits: (repository, commit) to its files, by path.
        heads: (repository, branch) to its last commit.
        objects: Uploaded large files (git-lfs), by SHA-256.
        requests: "METHOD path" of every request.
        url: Address of the server.
    """

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.heads: dict[tuple[str, str], str] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""

    def commit(self, repo: str, branch: str, changes: dict[str, bytes]) -> str:
        before = self.heads.get((repo, branch)) or self.heads.get((repo, "main"), "")
        files = {**self.commits.get((repo, before), {}), **changes}
        number = hashlib.sha1(f"{repo} {len(self.commits)}".encode()).hexdigest()
        self.commits[repo, number], self.heads[repo, branch] = files, number
        return number

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        number = self.heads.get((repo, revision), revision)
        return number, self.commits[repo, number]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._download(body=True)

    def do_HEAD(self) -> None:
        self._download(body=False)

    def do_POST(self) -> None:
        hub, parts = self.hub, unquote(urlsplit(self.path).path).strip("/").split("/")
        hub.requests.append(f"POST {self.path}")
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials"}, 401)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._json(self._uploads(json.loads(content)["objects"]))
        if parts == ["verify"]:
            request = json.loads(content)
            uploaded = len(hub.objects.get(request["oid"], b"")) == request["size"]
            return self._json({} if uploaded else {"error": "not uploaded"}, 200 if uploaded else 404)
        if parts == ["api", "repos", "create"]:
            request = json.loads(content)
            repo = "/".join(filter(None, (request.get("organization"), request["name"])))
            exists = (repo, "main") in hub.heads
            if not exists:
                hub.commit(repo, "main", {".gitattributes": b""})
            return self._json({"url": f"{hub.url}/{repo}"}, 409 if exists else 200)
        if parts[:2] == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        repo, verb = "/".join(parts[2:4]), parts[4]
        if verb == "branch":
            hub.heads.setdefault((repo, parts[5]), hub.heads[repo, "main"])
            return self._json({})
        if verb == "preupload":
            files = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False, "oid": None} for f in json.loads(content)["files"]]  # fmt: skip
            return self._json({"files": files})
        assert verb == "commit", self.path
        lines = [json.loads(line) for line in content.splitlines()]
        changes = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        changes |= {x["value"]["path"]: hub.objects[x["value"]["oid"]] for x in lines if x["key"] == "lfsFile"}
        number = hub.commit(repo, parts[5], changes)
        return self._json({"commitUrl": f"{hub.url}/{repo}/commit/{number}", "commitOid": number, "success": True})

    def do_PUT(self) -> None:
        """Receive a large file at the address from `_uploads`."""
        self.hub.requests.append(f"PUT {self.path}")
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        oid = self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(content).hexdigest() != oid:
            return self._json({"error": "content does not match its digest"}, 400)
        self.hub.objects[oid] = content
        return self._json({})

    def _uploads(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        objects = []
        for each in files:
            actions = {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"},
                       "verify": {"href": f"{self.hub.url}/verify"}}  # fmt: skip
            uploaded = each["oid"] in self.hub.objects
            objects.append({**each, "authenticated": True, **({} if uploaded else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def _download(self, body: bool) -> None:
        hub, parts = self.hub, unquote(urlsplit(self.path).path).strip("/").split("/")
        hub.requests.append(f"{self.command} {self.path}")
        try:
            if parts[0] == "api":
                repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                number, files = hub.files(repo, revision)
                if len(parts) > 4 and parts[4] == "tree":
                    entries = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                               for p, c in files.items()]  # fmt: skip
                    return self._json(entries)
                siblings = [{"rfilename": path} for path in files]
                return self._json({"id": repo, "modelId": repo, "sha": number, "siblings": siblings, "private": False})
            number, files = hub.files("/".join(parts[:2]), parts[3])
        except KeyError:
            return self._missing("RepoNotFound")
        if (content := files.get("/".join(parts[4:]))) is None:
            return self._missing("EntryNotFound", number)
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", number)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def _missing(self, what: str, commit: str = "") -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", what)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Keep the test output free of requests."""


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Serve an empty Hub until the block ends."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
