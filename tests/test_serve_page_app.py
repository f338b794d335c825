"""The page with the real application and small models behind it."""

# ruff: noqa: F401, F811 (fixtures come by import)

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from page_browser import ask, browser, finished, send, sync_api, watch
from page_server import PREFIX
from serve_models import SmallHost, app_of, running, small_host
from starlette.applications import Starlette
from starlette.routing import Mount

pytestmark = pytest.mark.slow
expect = sync_api.expect


@pytest.fixture(scope="module")
def host() -> Iterator[SmallHost]:
    host = small_host()
    yield host
    host.close()


def wait_until_idle(host: SmallHost) -> None:
    deadline = time.monotonic() + 10
    while host.busy_slots():
        assert time.monotonic() < deadline, "a slot is still busy"
        time.sleep(0.01)


def test_the_page_and_the_application(browser: Any, host: SmallHost) -> None:
    app = Starlette(routes=[Mount(PREFIX, app_of(host, api_keys=("s3cret",)))])
    page = browser.new_page()
    problems = watch(page.context)
    with running(app) as url:
        page.goto(f"{url}{PREFIX}/")
        expect(page.locator("#notices p")).to_contain_text("key")
        page.keyboard.press("Alt+s")
        page.get_by_label("API key").fill("s3cret")
        page.keyboard.press("Escape")
        expect(page.locator("#model option")).to_have_text(
            ["chat", "calculating", "base (continues text)"]
        )
        _calculates(page, host)
        _stops(page, host)
        _outgrows_the_context(page)
        page.get_by_label("Model").select_option("base")
        page.get_by_role("button", name="New conversation").click()
        ask(page, "Once upon a time")
        expect(page.locator(".stats")).to_contain_text("base · ")
        expect(page.get_by_role("alert")).to_have_count(0)
        page.locator("#input").fill("x" * 9_000)
        page.locator("#input").press("Enter")
        expect(page.get_by_role("alert").locator("p")).not_to_be_empty()
        page.close()
    assert problems == []


def _calculates(page: Any, host: SmallHost) -> None:
    """A tool call is shown, and with it sent back the second turn finds the first in the cache."""
    page.get_by_label("Model").select_option("calculating")
    command = page.locator("#input")
    command.fill("/temperature 0")
    command.press("Enter")
    answer = ask(page, "What is six times seven? " * 4)
    expect(answer.locator(".tool")).to_have_text("6*7=42")
    expect(answer.locator(".content")).to_have_text("=6*7=42yz")
    stats = host.model("calculating").engine.stats
    computed = stats()["cached_tokens"]
    ask(page, "Sure?")
    expect(page.locator(".tool")).to_have_count(2)
    assert stats()["cached_prompt_tokens"] == computed > 100


def _stops(page: Any, host: SmallHost) -> None:
    page.get_by_label("Model").select_option("chat")
    page.get_by_role("button", name="New conversation").click()
    send(page, "Go")
    page.keyboard.press("Escape")
    finished(page)
    wait_until_idle(host)


def _outgrows_the_context(page: Any) -> None:
    """Of 400 tokens: the third exchange does not fit beside the first two."""
    page.get_by_label("Model").select_option("calculating")
    page.get_by_role("button", name="New conversation").click()
    for _ in range(4):
        ask(page, "x" * 120)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator(".tool")).to_have_count(4)
    expect(page.get_by_text("no longer fits and was left out")).to_have_count(1)
