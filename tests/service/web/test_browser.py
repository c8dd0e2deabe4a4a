"""A whole job in headless Chromium, with a real server and a real worker, at the width of a desktop and of a phone."""

import importlib
import json
import os
import re

import pytest

from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset
from tests.helpers.browser import BROWSER, QUIET
from tests.helpers.running_service import running_service
from tests.helpers.service import pairs_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None and not os.environ.get("LORA_EMBED_BROWSER"), reason="no Chromium; CI has one and must run this"
    ),
]
ROWS = pairs_of(60)


@pytest.fixture
def service(tmp_path, tiny_model):
    with running_service(tmp_path / "service", tiny_model) as running:
        yield running


@pytest.fixture
def browser():
    assert BROWSER, "LORA_EMBED_BROWSER asks for this test, and there is no Chromium"
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield started
        started.close()


class Clicks:
    """A page on which a test clicks; nothing may overflow, and nothing may be written to the console."""

    def __init__(self, browser, width, scheme):
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page.set_default_timeout(60_000)
        self.width, self.messages, self.requests = width, [], []
        self.page.on("console", lambda message: self.messages.append(message.text))  # violations of the policy, too
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def menu(self, name):
        self.page.get_by_role("navigation").get_by_role("link", name=name, exact=True).click()
        self.fits()

    def fits(self):
        page = self.page.locator("html")  # waits for it, where a page is about to open
        assert page.evaluate("element => element.scrollWidth") <= self.width, self.page.url

    def start_job(self, data, suffix, epochs):
        self.menu("Jobs")
        self.page.get_by_role("link", name="New job").click()
        self.fits()
        fields = {"Name": suffix, "Epochs": str(epochs), "Batch size": "8", "Learning rate": "5e-3"}
        for name, value in {**fields, "Further settings": '{"precision": "fp32"}'}.items():
            self.page.get_by_label(name).fill(value)
        self.page.get_by_label("Training data").set_input_files(data)
        self.page.get_by_label("Who wrote the queries").select_option("human")
        self.page.get_by_role("button", name="Start").click()
        self.page.get_by_role("status").wait_for()
        self.fits()


@pytest.mark.parametrize(("width", "scheme"), [pytest.param(1280, "light", marks=pytest.mark.extended), (390, "dark")])
def test_a_whole_job_by_clicking(service, browser, tmp_path, width, scheme):
    clicks = Clicks(browser, width, scheme)
    page = clicks.page
    page.goto(service.url)
    clicks.fits()
    page.keyboard.type(service.token)  # the field has the focus
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Jobs").wait_for()

    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    clicks.start_job(data, "mine", 40)
    page.locator("[data-part=loss]").wait_for()  # the curve, while the job runs
    clicks.fits()
    assert page.locator("progress").evaluate("bar => bar.value") > 0
    path = page.locator("[data-part=path]").get_attribute("d")
    page.wait_for_function("old => document.querySelector('[data-part=path]').getAttribute('d') !== old", arg=path)
    assert "Training loss from" in page.get_by_role("img").get_attribute("aria-label")
    first = page.url

    clicks.start_job(data, "other", 600)  # waits for the worker, or runs already
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Resume").wait_for()
    assert page.get_by_role("status").inner_text() == "cancelled"

    clicks.menu("Jobs")
    page.goto(first)
    page.locator(".verdict").wait_for()  # the page loads itself anew at the end
    assert page.get_by_role("status").inner_text() == "completed"
    page.locator("[data-part=loss]").wait_for()
    clicks.fits()
    page.get_by_role("link", name="Report").click()
    assert page.locator(".verdict").bounding_box()["y"] < 200
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 500)")
    page.go_back()

    clicks.menu("Adapters")
    page.get_by_label("Adapter").fill("handbook")
    page.get_by_role("button", name="Add").click()
    page.get_by_role("button", name="Use v1 of handbook").click()
    page.get_by_text("v1 is in use").wait_for()
    clicks.fits()

    clicks.menu("Try a query")
    page.get_by_label("Passages", exact=True).select_option(index=1)  # of the job
    page.get_by_label("Query").fill(ROWS[0]["query"])
    page.get_by_role("button", name="Search").click()
    page.get_by_text("The best of 60 passages").wait_for()
    clicks.fits()
    assert [side.locator("li").count() for side in page.locator(".sides > div").all()] == [5, 5]
    assert ROWS[0]["passage"] in page.locator(".sides > div").nth(1).inner_text()

    clicks.menu("Label")
    page.get_by_label("Passages", exact=True).select_option(index=1)
    page.get_by_label("Queries").fill("\n".join([ROWS[0]["query"], ROWS[4]["query"]]))
    page.get_by_role("button", name="Begin").click()
    page.get_by_text("Passage 1 of").wait_for()
    clicks.fits()
    grades, undone = {}, False
    while not page.get_by_text("All passages are graded").count():
        query, passage = page.get_by_role("heading", level=1).inner_text(), page.locator(".passage").inner_text()
        grade = 3 if {"query": query, "passage": passage} in ROWS else len(grades) % 2
        grades[query, passage] = grade
        with page.expect_navigation():
            page.keyboard.press(str(grade))
        if len(grades) == 2 and not undone:  # the last answer is taken back, and the page left and opened again
            undone = True
            with page.expect_navigation():
                page.keyboard.press("u")
            assert page.locator(".passage").inner_text() == passage
            clicks.menu("Label")
            page.get_by_role("table").get_by_role("link").click()
            assert page.locator(".passage").inner_text() == passage
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "labels.json")
    labels = EmbeddingQAFinetuneDataset.from_json(tmp_path / "labels.json").check()
    found = {(labels.queries[q], labels.corpus[p]) for q, ids in labels.relevant_docs.items() for p in ids}
    assert found == {pair for pair, grade in grades.items() if grade == 3}
    assert labels.origins() == {"human": 2}

    assert clicks.messages == []
    hosts = {re.match(r"data:|\w+://[^/]+", url)[0] for url in clicks.requests}
    assert hosts - {"data:"} == {service.url}, "nothing is loaded from elsewhere"
    page.get_by_role("button", name="Log out").click()
    page.get_by_label("API token").wait_for()
