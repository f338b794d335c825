"""Chromium for the page's tests, which are skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from page_server import PREFIX, PageServer, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
sync_api.expect.set_options(timeout=20_000)  # of a busy machine
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


# Of a module, not of the session: while playwright runs, the thread has an event loop, and tests of
# other modules that start one would fail.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium)")
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []  # it refuses to run as root otherwise
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def _running_server() -> Iterator[PageServer]:
    server = PageServer()
    with serving(server.app()) as url:
        server.url = f"{url}{PREFIX}/"
        yield server


@pytest.fixture
def server(_running_server: PageServer) -> PageServer:
    """The scripted server, as new."""
    _running_server.reset()
    return _running_server


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A browser profile of its own. Errors on any of its pages' consoles fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(20_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    problems = watch(context)
    yield context
    context.close()
    assert problems == []


def watch(context: Any) -> list[str]:
    """Collects what goes wrong: exceptions, errors on the console (CSP violations are some)."""
    problems: list[str] = []

    def on_console(message: Any) -> None:
        # Chromium itself notes every answer that is no 200; those the tests ask for.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    context.on("console", on_console)
    context.on("weberror", lambda error: problems.append(str(error.error)))
    return problems


@pytest.fixture
def page(context: Any, server: PageServer) -> Any:
    """The chat page, ready."""
    return open_page(context, server)


def open_page(context: Any, server: PageServer) -> Any:
    """Another tab with the page, ready."""
    page = context.new_page()
    page.goto(server.url)
    sync_api.expect(page.locator("#model")).to_be_enabled()
    return page


def send(page: Any, text: str) -> Any:
    """Types a message, sends it, and returns the answer's element without waiting for its end."""
    before = page.locator(".message").count()
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")
    sync_api.expect(page.locator(".message")).to_have_count(before + 2)
    return page.locator(".message").last


def ask(page: Any, text: str) -> Any:
    """Sends a message and waits for the end of the answer."""
    answer = send(page, text)
    finished(page)
    return answer


def finished(page: Any) -> None:
    sync_api.expect(page.locator("#send.stop")).to_have_count(0)
    sync_api.expect(page.locator(".streaming")).to_have_count(0)


def answers(page: Any) -> list[str]:
    """The texts of all answers, as they are seen."""
    texts: list[str] = page.locator(".assistant .content").all_inner_texts()
    return texts
