"""/v1/files over HTTP."""

from __future__ import annotations

import pytest


def upload(client, content=b'{"query": "w1", "passage": "w1 w2"}\n', name="train.jsonl", purpose="fine-tune"):
    return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose})


def test_a_file_is_uploaded_shown_read_and_deleted(client):
    content = "ü\r\n\0".encode() * 1000
    made = upload(client, content).json()
    assert {key: made[key] for key in ("object", "bytes", "filename", "purpose", "status")} == {
        "object": "file",
        "bytes": len(content),
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
    }
    assert made["expires_at"] > made["created_at"]
    address = f"/v1/files/{made['id']}"
    assert client.get(address).json() == made
    answer = client.get(f"{address}/content")
    assert answer.content == content
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert client.delete(address).json() == {"id": made["id"], "object": "file", "deleted": True}
    for path in (address, f"{address}/content"):
        assert client.get(path).json()["error"]["code"] == "file_not_found"
    assert client.delete(address).status_code == 404


@pytest.mark.parametrize("order", ["desc", "asc"])
def test_files_are_listed_page_by_page(client, order):
    ids = [upload(client).json()["id"] for _ in range(5)]
    seen, after = [], None
    while True:
        query = {"limit": 2, "order": order, **({"after": after} if after else {})}
        page = client.get("/v1/files", params=query).json()
        seen += [row["id"] for row in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", page["data"][0]["id"], seen[-1])
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == (ids if order == "asc" else ids[::-1])
    assert client.get("/v1/files", params={"purpose": "batch"}).json()["data"] == []
    assert client.get("/v1/files", params={"after": "file-unknown"}).status_code == 404
    assert client.get("/v1/files", params={"limit": 0}).status_code == 400


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a\r\nX-Injected: 1.jsonl", "\0", "C:\\x.jsonl", "ü" * 500, "con", "."]
)
def test_the_name_of_a_file_is_shown_and_never_a_place_on_disk(client, name):
    answer = upload(client, name=name)
    assert answer.status_code == 200
    made = answer.json()
    assert not set(made["filename"]) & set("\r\n\0")
    read = client.get(f"/v1/files/{made['id']}/content")
    assert "X-Injected" not in read.headers
    files = [path.name for path in client.app.state.services.settings.files_dir.iterdir()]
    assert files == [made["id"]]


def test_other_purposes_and_forms_without_a_file_are_refused(client):
    assert upload(client, purpose="assistants").json()["error"]["param"] == "purpose"
    assert client.post("/v1/files", data={"purpose": "fine-tune"}).json()["error"]["param"] == "file"
    assert client.post("/v1/files", files={"file": ("a", b"x")}).json()["error"]["param"] == "purpose"
    broken = {"Content-Type": "multipart/form-data"}
    assert client.post("/v1/files", content=b"--x", headers=broken).status_code == 400
    assert list(client.app.state.services.settings.files_dir.iterdir()) == []


@pytest.mark.parametrize("file_id", ["..%2f..%2fservice.db", "file-..%2f..", "%2e%2e%2fservice.db", "file-%00"])
def test_no_id_reaches_beyond_the_folder_of_files(client, file_id):
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert client.get(path).status_code in (400, 404)
    assert client.delete(f"/v1/files/{file_id}").status_code in (400, 404)
    assert client.app.state.services.settings.folder.joinpath("service.db").exists()
