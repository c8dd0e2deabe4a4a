import asyncio
import re

import pytest
from fastapi.testclient import TestClient

from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.web.pages import POLICY
from llama_index_lora_embed.service.web.routers import ROUTERS
from llama_index_lora_embed.service.web.session import SESSION, VISIT, check_form
from tests.helpers.pages import Visitor

PAGES = ["/", "/jobs/new", "/jobs/ftjob-x", "/jobs/ftjob-x/events", "/jobs/progress?ids=a", "/reports/ftjob-x",
         "/adapters", "/try", "/label", "/label/label-x", "/label/label-x/dataset.json"]  # fmt: skip


def test_a_token_in_a_cookie_opens_the_pages_and_logging_out_closes_them(visit, app):
    visitor = visit()
    answer = visitor.client.get("/?after=x", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2F%3Fafter%3Dx")
    row, token = app.state.services.tokens.create("someone", ["read"])
    answer = visitor.send("/login", {"token": f" {token}\n", "next": "/jobs/ftjob-x"}, "/login")
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs/ftjob-x")
    cookie = answer.headers["set-cookie"]
    assert f"{SESSION}={token}" in cookie
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie, "the test's address is http"
    assert "There are no jobs yet" in visitor.get("/")
    app.state.services.tokens.revoke(row.id)
    visitor.get("/", 303)
    other = visit("read")
    assert other.send("/logout", {}, "/").status_code == 303
    other.get("/", 303)


@pytest.mark.parametrize("path", PAGES)
def test_no_page_opens_without_a_token_or_with_a_wrong_one(visit, path):
    visitor = visit()
    assert visitor.get(path, 303) == ""
    visitor.client.cookies.set(SESSION, "lora-embed-wrong")
    assert visitor.get(path, 303) == ""


def test_an_upload_of_a_stranger_is_not_read(app):
    sent = []

    async def receive():
        raise AssertionError("read")

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {
        "type": "http", "method": "POST", "path": "/jobs", "query_string": b"", "headers": headers, "scheme": "http",
        "server": ("127.0.0.1", 80), "root_path": "", "http_version": "1.1",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert (sent[0]["status"], dict(sent[0]["headers"])[b"location"]) == (303, b"/login")


def test_a_wrong_token_is_said_and_not_kept(visit):
    visitor = visit()
    answer = visitor.log_in("lora-embed-wrong")
    assert answer.status_code == 401
    assert "unknown or was revoked" in answer.text
    assert SESSION not in visitor.client.cookies


@pytest.mark.parametrize(
    "place", ["//evil.example", "/\\evil.example", "https://evil.example", "javascript:alert(1)", "/a\nb"]
)
def test_a_login_never_leads_to_another_site(visit, app, place):
    token = app.state.services.tokens.create("someone", ["read"])[1]
    answer = visit().send("/login", {"token": token, "next": place}, "/login")
    assert answer.headers["location"] == "/"


def test_the_cookie_is_secure_over_https(app):
    with TestClient(app, "https://127.0.0.1") as client:
        token = app.state.services.tokens.create("someone", ["read"])[1]
        answer = Visitor(client).log_in(token)
    assert "Secure" in answer.headers["set-cookie"].split("; ")


def test_a_form_of_another_site_changes_nothing(visit, app):
    visitor = visit("read", "train")
    stranger = visit("read", "train")
    form = {"training": ("a.jsonl", b'{"query": "q", "passage": "p"}')}
    csrf = visitor.csrf("/jobs/new")
    wrong = [
        ({}, {}),
        ({"csrf": "0" * 64}, {}),
        ({"csrf": "\ud800é".encode("utf-8", "surrogatepass")}, {}),
        ({"csrf": stranger.csrf("/jobs/new")}, {}),
        ({"csrf": csrf}, {"Origin": "https://evil.example"}),
        ({"csrf": csrf}, {"Origin": "null"}),
    ]
    for fields, headers in wrong:
        answer = visitor.client.post("/jobs", data=fields, headers=headers, files=form, follow_redirects=False)
        assert answer.status_code == 403, (fields, headers)
        assert "not from this page" in answer.text
    visitor.client.cookies.delete(VISIT)
    answer = visitor.client.post("/jobs", data={"csrf": csrf}, files=form, follow_redirects=False)
    assert answer.status_code == 403
    assert app.state.services.jobs.list()[0] == []
    assert app.state.services.files.list()[0] == []


def test_every_form_of_the_service_checks_where_it_is_from():
    posts = [route for router in ROUTERS for route in router.routes if "POST" in route.methods]
    assert len(posts) >= 4
    for route in posts:
        assert check_form in [dependency.dependency for dependency in route.dependencies], route.path


@pytest.mark.parametrize(
    "path", ["/login", "/", "/jobs/new", "/jobs/none", "/adapters", "/static/page.js", "/static/none"]
)
def test_every_page_forbids_what_is_not_its_own(visit, path):
    answer = visit("read", "train").client.get(path)
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.findall(r"<script>|<style|\sstyle=|\son\w+=|javascript:", answer.text)
    assert not re.findall(r'(?:src|href|action)="(?!/)', answer.text.replace('href="#main"', ""))


def test_pages_and_buttons_are_those_of_the_tokens_scopes(visit):
    reader = visit("read")
    assert "New job" not in reader.get("/")
    assert "Try a query" not in reader.get("/")
    assert "without the scope" in reader.get("/jobs/new", 403)
    assert "New job" in visit("read", "train").get("/")
    assert "New job" in visit("admin").get("/")
    assert "without the scope" in visit("embed").get("/", 403)
    csrf = {"csrf": reader.csrf("/")}
    assert reader.client.post("/jobs/ftjob-x/cancel", data=csrf).status_code == 403


def test_the_cookie_opens_no_api(visit):
    assert visit("admin").client.get("/v1/finetune").status_code == 401


def test_without_tokens_the_pages_are_open_and_their_forms_are_checked(service_settings):
    with TestClient(create_app(service_settings), "http://127.0.0.1") as client:
        visitor = Visitor(client)
        page = visitor.get("/")
        assert "Log out" not in page
        assert client.post("/jobs/ftjob-x/cancel", data={}).status_code == 403
        assert visitor.send("/jobs/ftjob-x/cancel", {}, "/jobs/new").status_code == 404
