"""The chat page in headless Chromium: the server's errors, lost connections, API keys."""

# ruff: noqa: F401, F811 (fixtures come by import)

from __future__ import annotations

from typing import Any

import pytest
from page_browser import (
    _running_server,
    answers,
    ask,
    browser,
    context,
    finished,
    page,
    server,
    sync_api,
)
from page_server import Cut, PageServer, Reply, delta, event, fails

pytestmark = pytest.mark.slow
expect = sync_api.expect


def test_the_servers_words_and_a_retry(page: Any, server: PageServer) -> None:
    server.replies = [
        fails(429, "32 requests are waiting <b>already</b>.", **{"retry-after": "3"}),
        fails(400, "messages[0] has 9,000 characters."),
    ]
    answer = ask(page, "Hi")
    alert = answer.get_by_role("alert")
    expect(alert.locator("p")).to_have_text(
        "32 requests are waiting <b>already</b>. Try again in 3 s."
    )
    alert.get_by_role("button", name="Retry").click()
    expect(alert.locator("p")).to_have_text("messages[0] has 9,000 characters.")
    finished(page)
    page.reload()
    expect(alert.locator("p")).to_have_text("messages[0] has 9,000 characters.")
    ask(page, "Shorter")
    assert answers(page) == ["", "Hello there."]
    # What was refused is not sent again; what was only not answered is.
    assert server.asked[2].body["messages"] == [{"role": "user", "content": "Shorter"}]
    server.replies = [fails(503, "No replica.")]
    ask(page, "One")
    ask(page, "Two")
    assert server.asked[4].body["messages"][-1] == {"role": "user", "content": "One\n\nTwo"}


CLOSED = "The connection was closed before the answer was complete."
FAILURES = {
    "error event": ([event({"error": {"message": "Too late."}})], "Too late."),
    "no end": ([], CLOSED),
    "no chunks": ([event("null"), event("[]")], CLOSED),
    "lost": ([Cut()], "The connection to the server was lost."),
    "no JSON": ([event("{oops")], "The server sent something that is not JSON."),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_came_before_a_failure_stays(page: Any, server: PageServer, failure: str) -> None:
    pieces, words = FAILURES[failure]
    server.replies = [Reply([delta("It began"), *pieces])]
    answer = ask(page, "Hi")
    expect(answer.locator(".content")).to_have_text("It began")
    expect(answer.get_by_role("alert").locator("p")).to_have_text(words)
    answer.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant .content")).to_have_text("Hello there.")


def test_answers_that_are_none(page: Any, server: PageServer) -> None:
    server.replies = [
        Reply(status=502, body=b"<h1>Bad gateway</h1>"),
        Reply(status=204),
    ]
    error = page.locator(".error p")
    ask(page, "Hi")
    expect(error).to_have_text("The server answered 502 Bad Gateway.")
    page.get_by_role("button", name="Retry").click()
    expect(error).to_have_text("The server did not answer with a stream.")
    page.context.set_offline(True)
    page.get_by_role("button", name="Retry").click()
    expect(error).to_have_text("The server cannot be reached.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant .content")).to_have_text("Hello there.")


def test_an_api_key_is_kept_in_the_tab_only(context: Any, page: Any, server: PageServer) -> None:
    server.key = "s3cret"
    page.reload()
    expect(page.locator("#notices")).to_have_text("Incorrect API key provided.")
    page.keyboard.press("Alt+s")
    page.get_by_label("API key").fill("s3cret")
    page.keyboard.press("Escape")
    expect(page.locator("#model")).to_be_enabled()
    ask(page, "Hi")
    assert server.asked[0].headers["authorization"] == "Bearer s3cret"
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    assert "s3cret" not in page.evaluate("JSON.stringify({...localStorage})")
    other = context.new_page()
    other.goto(server.url)
    expect(other.locator("#notices")).to_have_text("Incorrect API key provided.")
    server.replies = [fails(401, "The key has expired.")]
    answer = ask(page, "Again")
    answer.get_by_role("button", name="Enter a key").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()


def test_models_come_late(page: Any, server: PageServer) -> None:
    """A page that was opened while the server was starting needs no reload."""
    models, server.models = server.models, []
    page.reload()
    expect(page.locator("#model")).to_have_text("No models")
    server.models = models
    page.locator("#input").fill("Hi")
    page.locator("#input").press("Enter")
    expect(page.locator(".assistant .content")).to_have_text("Hello there.")


def test_a_list_of_models_that_is_none(page: Any, server: PageServer) -> None:
    server.models = {}  # type: ignore[assignment]
    page.reload()
    expect(page.locator("#notices")).to_have_text("The server's list of models cannot be read.")
