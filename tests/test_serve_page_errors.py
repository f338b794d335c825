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
from page_server import Cut, PageServer, Reply, delta, event, fails, says

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


def test_only_the_last_message_can_be_tried_again(page: Any, server: PageServer) -> None:
    """A retry takes all that follows away, which an old error's button must not."""
    server.replies = [fails(503, "No replica."), says("Two's."), fails(401, "No key.")]
    retry = page.get_by_role("button", name="Retry")
    ask(page, "One")
    expect(retry).to_have_count(1)
    ask(page, "Two")
    expect(page.locator(".message").nth(1).get_by_role("alert")).to_be_visible()
    expect(retry).to_have_count(0)
    failed = ask(page, "Three")
    page.reload()
    expect(retry).to_have_count(1)
    failed.get_by_role("button", name="Retry").click()
    expect(failed.locator(".content")).to_have_text("Hello there.")
    finished(page)
    assert answers(page) == ["", "Two's.", "Hello there."]
    assert page.locator(".bubble").all_inner_texts() == ["One", "Two", "Three"]


LEFT_OUT = "The beginning of this conversation no longer fits and was left out."


def too_long() -> Reply:
    return fails(400, "The prompt has 999 tokens.", code="context_length_exceeded")


def contents(server: PageServer) -> list[list[Any]]:
    """What was sent in each request: texts, and answers' texts."""
    return [
        [
            content if isinstance(content := message["content"], str) else content[0]["text"]
            for message in asked.body["messages"]
        ]
        for asked in server.asked
    ]


def test_a_conversation_outgrows_the_context(page: Any, server: PageServer) -> None:
    page.locator("#input").fill("/system Be brief.")
    page.locator("#input").press("Enter")
    server.replies = [says(f"{i}!") for i in range(3)]
    for i in range(3):
        ask(page, f"{i}?")
    server.asked.clear()
    server.replies = [too_long(), says("3!")]
    answer = ask(page, "3?")
    note = page.get_by_text(LEFT_OUT)
    expect(answer.locator(".left-out")).to_have_text(LEFT_OUT)
    expect(note).to_have_count(1)
    assert answer.get_by_role("alert").count() == 0
    page.reload()  # all is kept, and what is left out stays left out
    expect(note).to_be_visible()
    assert answers(page) == ["0!", "1!", "2!", "3!"]
    server.replies = [says("4!")]
    ask(page, "4?")
    expect(note).to_have_count(1)
    server.replies = [too_long(), too_long(), says("5!")]
    ask(page, "5?")
    expect(note).to_have_count(2)
    rest = ["2?", "2!", "3?", "3!", "4?", "4!", "5?"]
    assert contents(server) == [
        ["Be brief.", "0?", "0!", "1?", "1!", "2?", "2!", "3?"],
        ["Be brief.", "2?", "2!", "3?"],
        ["Be brief.", "2?", "2!", "3?", "3!", "4?"],
        ["Be brief.", *rest],
        ["Be brief.", *rest[4:]],
        ["Be brief.", *rest[6:]],
    ]


def test_another_models_context_may_be_longer(page: Any, server: PageServer) -> None:
    server.models.append({"id": "large", "chat": True})
    page.reload()
    server.replies = [says("0!"), too_long(), says("1!"), says("2!")]
    ask(page, "0?")
    ask(page, "1?")
    page.get_by_label("Model").select_option("large")
    ask(page, "2?")
    assert contents(server)[-1] == ["0?", "0!", "1?", "1!", "2?"]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "base"])
def test_a_message_that_never_fits(page: Any, server: PageServer, chat: bool) -> None:
    """Is refused in the server's words, and does not stand in the way of the next one."""
    server.models[0]["chat"] = chat
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    ask(page, "0?")
    server.replies = [too_long(), too_long(), says("2!")]
    alert = ask(page, "1?").get_by_role("alert")
    expect(alert.locator("p")).to_have_text("The prompt has 999 tokens.")
    expect(page.get_by_text(LEFT_OUT)).to_have_count(0)
    ask(page, "2?")
    expect(page.get_by_text(LEFT_OUT)).to_have_count(0)
    if chat:
        assert contents(server)[1:] == [
            ["0?", "Hello there.", "1?"],
            ["1?"],
            ["0?", "Hello there.", "2?"],
        ]
    else:
        prompts = [asked.body["prompt"] for asked in server.asked[1:]]
        assert prompts == ["0?Hello there.1?", "1?", "0?Hello there.2?"]


def test_a_model_that_was_renamed(page: Any, server: PageServer) -> None:
    gone = fails(404, "There is no model tiny-sft here.", code="model_not_found")
    server.models = [{"id": "tiny-rl", "chat": True}, {"id": "other", "chat": True}]
    server.replies = [gone]
    alert = ask(page, "Hi").get_by_role("alert")
    expect(alert.locator("p")).to_have_text("There is no model tiny-sft here.")
    expect(page.locator("#model option")).to_have_text(["tiny-rl", "other"])
    expect(page.get_by_label("Model")).to_have_value("tiny-rl")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant .content")).to_have_text("Hello there.")
    assert [asked.body["model"] for asked in server.asked] == ["tiny-sft", "tiny-rl"]


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
