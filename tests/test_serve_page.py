"""The chat page in headless Chromium: sending, stopping, editing, commands, errors."""

# ruff: noqa: F401, F811 (fixtures come by import)

from __future__ import annotations

import json
import re
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
    send,
    server,
    sync_api,
)
from page_server import PREFIX, Hold, PageServer, Reply, delta, ending, event, fails, says

expect = sync_api.expect


def test_an_answer_streams(page: Any, server: PageServer) -> None:
    hold, late = Hold(), Hold()
    pieces = [delta("Once "), hold, delta("upon **a"), late, delta(" time**."), ending(9)]
    server.replies = [Reply(pieces)]
    answer = send(page, "Tell me a story")
    content = answer.locator(".content")
    expect(content).to_have_text("Once ")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(page.locator("#announcer")).to_be_empty()
    hold.released.set()
    expect(content).to_have_text("Once upon **a")
    page.wait_for_timeout(120)  # so that there is a speed to tell
    late.released.set()
    expect(content.locator("strong")).to_have_text("a time")
    finished(page)
    expect(answer.locator(".stats")).to_have_text(
        re.compile(r"^tiny-sft · 9 tokens · [\d.]+ tokens/s$")
    )
    expect(page.locator("#announcer")).to_have_text("Once upon **a time**.")
    assert page.title() == "Tell me a story · nanoray"
    [asked] = server.asked
    assert asked.path == "/v1/chat/completions"
    assert re.fullmatch("[0-9a-f]{32}", asked.headers["x-session-id"])
    assert "authorization" not in asked.headers
    assert asked.body == {
        "model": "tiny-sft",
        "messages": [{"role": "user", "content": "Tell me a story"}],
        "temperature": 0.6,
        "top_k": 50,
        "max_tokens": 512,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_any_split_of_the_bytes_is_one_answer(page: Any, server: PageServer) -> None:
    raw = (delta("Grüße ") + delta("an 🦔.") + ending()).replace(b"\n", b"\r\n")
    server.replies = [Reply([raw[i : i + 1] for i in range(len(raw))])]
    expect(ask(page, "Hi").locator(".content")).to_have_text("Grüße an 🦔.")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_keeps_what_came(page: Any, server: PageServer, way: str) -> None:
    server.replies = [reply := Reply([delta("Half an ans"), Hold()])]
    answer = send(page, "Hi")
    expect(answer.locator(".content")).to_have_text("Half an ans")
    if way == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.keyboard.press("Escape")
    finished(page)
    assert reply.left.wait(10), "the connection is still open"
    expect(answer.locator(".content")).to_have_text("Half an ans")
    expect(answer.locator(".stats")).to_have_text("tiny-sft · stopped")
    expect(answer.locator(".error")).to_have_count(0)
    ask(page, "Go on")
    parts = [{"type": "text", "text": "Half an ans"}]
    assert server.asked[1].body["messages"][1] == {"role": "assistant", "content": parts}
    assert answers(page) == ["Half an ans", "Hello there."]


def test_enter_does_not_stop_and_loses_nothing(page: Any, server: PageServer) -> None:
    hold = Hold()
    server.replies = [Reply([delta("a"), hold, delta("b"), ending()])]
    send(page, "Hi")
    page.locator("#input").fill("next")
    page.locator("#input").press("Enter")
    hold.released.set()
    finished(page)
    assert answers(page) == ["ab"]
    expect(page.locator("#input")).to_have_value("next")


def test_regenerate(page: Any, server: PageServer) -> None:
    server.replies = [says("First."), says("Second."), says("Third.")]
    ask(page, "Hi")
    ask(page, "And?")
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)  # of the last answer
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant .content").last).to_have_text("Third.")
    finished(page)
    assert answers(page) == ["First.", "Third."]
    assert server.asked[2].body == server.asked[1].body
    sessions = {asked.headers["x-session-id"] for asked in server.asked}
    assert len(sessions) == 1


def test_the_keyboard_goes_on_in_the_field_after_regenerate(page: Any, server: PageServer) -> None:
    """The button that was pressed is gone: without that the focus would be at the page's top."""
    server.replies = [says("First."), fails(503, "No replica."), says("Third.")]
    ask(page, "Hi")
    field = page.locator("#input")
    field.fill("A draft")
    for name, outcome in (("Regenerate", "No replica."), ("Retry", "Third.")):
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("button", name=name)).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator(".assistant")).to_contain_text(outcome)
        finished(page)
        expect(field).to_be_focused()
        expect(field).to_have_value("A draft")
    assert len(server.asked) == 3


def test_edit_and_resend(page: Any, server: PageServer) -> None:
    ask(page, "Hi")
    ask(page, "Bye")
    first = page.locator(".user").first
    first.hover()
    first.get_by_role("button", name="Edit and resend").click()
    field = page.get_by_label("Edit the message")
    expect(field).to_be_focused()
    field.press("Escape")
    expect(first.locator(".bubble")).to_have_text("Hi")
    page.locator("#input").focus()
    page.keyboard.press("ArrowUp")  # edits the last one
    expect(field).to_have_value("Bye")
    page.get_by_role("button", name="Cancel").click()
    first.get_by_role("button", name="Edit and resend").click()
    field.fill("Hello,\nyou")
    field.press("Enter")
    expect(page.locator(".message")).to_have_count(2)
    finished(page)
    expect(page.locator(".bubble")).to_have_text("Hello,\nyou")
    assert server.asked[-1].body["messages"] == [{"role": "user", "content": "Hello,\nyou"}]


def test_copy(page: Any, server: PageServer) -> None:
    code = 'def f(x):\n\n    return "<b>"'
    server.replies = [says(f"So:\n```python\n{code}\n```\n*Done*")]
    answer = ask(page, "Code, *please*")
    clipboard = "() => navigator.clipboard.readText()"
    answer.get_by_role("button", name="Copy code").click()
    expect(page.locator("#toast")).to_have_text("Copied")
    assert page.evaluate(clipboard) == code
    answer.get_by_role("button", name="Copy answer").click()
    expect(answer.locator(".icon-button.done")).to_have_count(1)
    assert page.evaluate(clipboard) == f"So:\n```python\n{code}\n```\n*Done*"
    page.locator(".user").hover()
    page.get_by_role("button", name="Copy message").click()
    expect(page.locator(".icon-button.done")).to_have_count(2)
    assert page.evaluate(clipboard) == "Code, *please*"


def test_tool_calls_are_shown_and_sent_back(page: Any, server: PageServer) -> None:
    parts = [("text", "48/"), ("text", "2 = "), ("python", "48"), ("python", "/2")]
    parts += [("python_output", "24"), ("text", "24 clips")]
    hold = Hold()
    streamed = [delta(text, kind) for kind, text in parts]
    server.replies = [Reply([*streamed[:4], hold, *streamed[4:], ending()])]
    answer = send(page, "How many?")
    card = answer.locator(".tool")
    expect(card).to_have_text("48/2=…")
    hold.released.set()
    finished(page)
    expect(card).to_have_text("48/2=24")
    expect(answer.get_by_role("group", name="Calculator: 48/2 gives 24")).to_be_visible()
    assert page.locator("#announcer").inner_text() == "48/2 = 24 clips"
    ask(page, "Sure?")
    assert server.asked[1].body["messages"][1]["content"] == [
        {"type": "text", "text": "48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 clips"},
    ]


def test_a_base_model_continues_text(page: Any, server: PageServer) -> None:
    server.models.append({"id": "tiny-base", "chat": False})
    page.reload()
    page.get_by_label("Model").select_option("tiny-base")
    expect(page.locator("#welcome-model")).to_contain_text("goes on with your text")
    expect(page.locator("#model option")).to_have_text(["tiny-sft", "tiny-base (continues text)"])
    chunks = [
        event({"choices": [{"text": text, "finish_reason": None}]}) for text in (" *is*\n", "so")
    ]
    server.replies = [Reply([*chunks, ending(2, "length")])]
    answer = ask(page, "The sky ")
    expect(answer.locator(".content")).to_have_text(" *is*\nso")
    expect(answer.locator(".stats")).to_contain_text("cut at the limit")
    ask(page, " that")
    assert [asked.path for asked in server.asked] == ["/v1/completions"] * 2
    assert [asked.body["prompt"] for asked in server.asked] == [
        "The sky ",
        "The sky  *is*\nso that",
    ]


def command(page: Any, text: str) -> str:
    """What the page says to a command."""
    page.evaluate("document.getElementById('notices').replaceChildren()")
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")
    expect(page.locator("#notices p")).to_have_count(1)
    return page.locator("#notices p").inner_text()


def test_slash_commands(page: Any, server: PageServer) -> None:
    page.locator("#input").press_sequentially("/t")
    expect(page.locator("#command-hints li")).to_have_count(2)
    assert command(page, "/temperature") == "Temperature is 0.6."
    assert command(page, "/temperature 2.5") == "Temperature goes from 0 to 2."
    assert command(page, "/TEMPERATURE 0") == "Temperature is now 0."
    assert command(page, "/topk 1.5") == "Top-k goes from 0 to 200 in whole numbers."
    assert command(page, "/topk 0") == "Top-k is now 0."
    assert command(page, "/model other") == "There is no model other. Models: tiny-sft."
    assert command(page, "/model tiny-sft") == "Talking to tiny-sft."
    assert command(page, "/nonsense").startswith("There is no command /nonsense;")
    ask(page, "/usr/bin is a path")
    assert command(page, "/system Be brief.") == "System message: Be brief."
    expect(page.locator(".message")).to_have_count(0)
    ask(page, " /clear is text after a space")
    assert server.asked[0].body["messages"] == [{"role": "user", "content": "/usr/bin is a path"}]
    body = server.asked[1].body
    assert (body["temperature"], body["top_k"]) == (0, 0)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "/clear is text after a space"},
    ]
    page.locator("#input").fill("/clear")
    page.locator("#input").press("Enter")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#conversations li")).to_have_count(2)
    page.locator("#input").fill("/help")
    page.locator("#input").press("Enter")
    expect(page.get_by_role("dialog", name="Commands and shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_settings(page: Any, server: PageServer) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("1.25")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Longest answer").fill("5000")  # too many: not taken
    expect(page.get_by_label("Longest answer")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("System message").fill("Be kind.")
    page.keyboard.press("Escape")
    ask(page, "Hi")
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("1.25")
    expect(page.get_by_label("Longest answer")).to_have_value("512")
    page.get_by_label("System message").fill("Be stern.")  # for new conversations
    page.get_by_role("button", name="Close the settings").click()
    ask(page, "And?")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Hi")
    bodies = [asked.body for asked in server.asked]
    assert {(b["temperature"], b["top_k"], b["max_tokens"]) for b in bodies} == {(1.25, 7, 512)}
    systems = [body["messages"][0]["content"] for body in bodies]
    assert systems == ["Be kind.", "Be kind.", "Be stern."]
    assert server.asked[2].headers["x-session-id"] != server.asked[0].headers["x-session-id"]


ATTACK = "<script>hacked=1</script><img src=x onerror='hacked=1'> [x](javascript:hacked=1)"


def test_what_anybody_writes_is_text(page: Any, server: PageServer) -> None:
    server.models[0]["id"] = "<img src=x onerror='hacked=1'>"
    server.replies = [says(ATTACK), fails(400, ATTACK), Reply([delta(ATTACK, "python"), ending()])]
    page.reload()
    for _ in range(3):
        ask(page, ATTACK)
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#toast")).to_contain_text("Deleted “<script>")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".bubble").first).to_have_text(ATTACK)
    expect(page.locator(".assistant .content").first).to_have_text(ATTACK)
    assert page.evaluate("typeof hacked") == "undefined"
    assert (
        page.locator("#messages script, #messages img, #messages a, #sidebar script").count() == 0
    )
    assert page.title().startswith("<script>hacked=1</script>")


def test_a_growing_answer_keeps_its_nodes(page: Any, server: PageServer) -> None:
    """What is selected stays selected, and nothing that is there is built anew."""
    hold = Hold()
    pieces = [
        delta("A *first* paragraph.\n\nAnd a second"),
        hold,
        delta(" one, **longer**."),
        ending(),
    ]
    server.replies = [Reply(pieces)]
    answer = send(page, "Hi")
    expect(answer.locator("p")).to_have_count(2)
    page.evaluate("""() => {
      const [first, second] = document.querySelectorAll(".content p");
      window.kept = [first, first.querySelector("em"), second.firstChild];
      getSelection().setBaseAndExtent(first.firstChild, 0, second.firstChild, 5);
    }""")
    hold.released.set()
    finished(page)
    expect(answer.locator("strong")).to_have_text("longer")
    assert page.evaluate("kept.every((node) => node.isConnected)")
    assert page.evaluate("getSelection().toString()").split() == "A first paragraph. And a".split()


def test_nothing_is_loaded_from_elsewhere(page: Any, server: PageServer) -> None:
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    server.replies = [says("![a](https://example.org/a.png) <img src='https://example.org/b.png'>")]
    page.reload()
    ask(page, "Hi")
    assert len(urls) > 10
    assert all(url.startswith(server.url) for url in urls), urls
    assert all(PREFIX in url for url in urls)


def test_the_speed_is_not_sent(page: Any, server: PageServer) -> None:
    """Only roles and contents go to the server, whatever the page keeps."""
    ask(page, "Hi")
    ask(page, "Ho")
    for message in server.asked[1].body["messages"]:
        assert set(message) == {"role", "content"}
    assert len(json.dumps(server.asked[1].body)) < 600
