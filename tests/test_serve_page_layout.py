"""The chat page in headless Chromium: list, tabs, themes, sizes, keyboard, screen readers."""

# ruff: noqa: F401, F811 (fixtures come by import)

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from page_browser import (
    _running_server,
    ask,
    browser,
    context,
    finished,
    page,
    send,
    server,
    sync_api,
)
from page_server import Hold, PageServer, Reply, delta, ending, fails, says

pytestmark = pytest.mark.slow
expect = sync_api.expect
MARKDOWN = """## A short plan

Here is what *you* could do, **step by step**, with `code` and a [link](https://example.org/x).

1. Gather the data
   - from the web
   - from books
2. Train a tokenizer

> A model is only as good as its data.

```python
def greet(name: str) -> str:
    return f"Hello, {name}!"  # a line so long that a phone has to scroll it, but never the page
```

| Depth | Parameters | Time | Remark that takes some room |
| --- | ---: | :---: | --- |
| 4 | 7 M | 12 min | on a laptop |
| 12 | 186 M | 3 h | on a workstation |
"""


def titles(page: Any) -> list[str]:
    return page.locator("#conversations .title").all_inner_texts()


def test_the_list_survives_a_reload(page: Any, server: PageServer) -> None:
    ask(page, "First question\nwith more")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#input")).to_be_focused()
    ask(page, "Second")
    page.reload()
    assert titles(page) == ["Second", "First question"]
    expect(page.locator(".bubble")).to_have_text("Second")  # the open one, by its address
    page.get_by_role("button", name="First question", exact=True).click()
    expect(page.locator(".bubble")).to_have_text("First question\nwith more")
    expect(page.locator(".assistant .content")).to_have_text("Hello there.")
    expect(page.locator("#conversations [aria-current=true]")).to_have_text("First question")
    ask(page, "And?")
    assert len(server.asked[-1].body["messages"]) == 3
    assert titles(page) == ["First question", "Second"]
    item = page.locator("#conversations li").first
    item.hover()
    item.get_by_role("button", name="Rename").click()
    page.get_by_label("Title").fill("A *better* name")
    page.get_by_label("Title").press("Enter")
    assert titles(page) == ["A *better* name", "Second"]
    item.get_by_role("button", name="Delete").click()
    assert titles(page) == ["Second"]
    expect(page.locator(".message")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".message")).to_have_count(4)
    page.reload()
    assert titles(page) == ["A *better* name", "Second"]


def test_an_answer_that_was_coming_survives_a_reload(page: Any, server: PageServer) -> None:
    server.replies = [Reply([delta("Half an ans"), Hold()])]
    expect(send(page, "Hi").locator(".content")).to_have_text("Half an ans")
    page.reload()
    expect(page.locator(".assistant .content")).to_have_text("Half an ans")
    expect(page.locator(".stats")).to_have_text("tiny-sft · stopped")


def test_leaving_a_conversation_stops_its_answer(page: Any, server: PageServer) -> None:
    server.replies = [reply := Reply([delta("Half an ans"), Hold()])]
    expect(send(page, "Hi").locator(".content")).to_have_text("Half an ans")
    page.get_by_role("button", name="New conversation").click()
    assert reply.left.wait(10)
    expect(page.locator(".message")).to_have_count(0)
    page.get_by_role("button", name="Hi", exact=True).click()
    expect(page.locator(".assistant .content")).to_have_text("Half an ans")


def test_tabs_do_not_destroy_each_other(context: Any, page: Any, server: PageServer) -> None:
    ask(page, "Shared")
    other = context.new_page()
    other.goto(page.url)  # the same conversation
    expect(other.locator(".message")).to_have_count(2)
    ask(other, "From the other")
    expect(page.locator(".message")).to_have_count(4)  # this one follows
    holds = [Hold(), Hold()]
    server.replies = [
        Reply([delta("a"), holds[0], ending()]),
        Reply([delta("b"), holds[1], ending()]),
    ]
    send(page, "Here")  # both at once: neither may overwrite the other
    send(other, "There")
    for hold in holds:
        hold.released.set()
    finished(page)
    finished(other)
    page.reload()
    assert sorted(titles(page)) == ["Shared", "Shared (copy)"]
    exchanges = set()
    for title in ("Shared", "Shared (copy)"):
        page.get_by_role("button", name=title, exact=True).click()
        expect(page.locator(".current .title")).to_have_text(title)
        assert page.locator(".bubble").all_inner_texts()[:2] == ["Shared", "From the other"]
        exchanges.add(page.locator(".message > :first-child").all_inner_texts()[-2:][0])
    assert exchanges == {"Here", "There"}
    # What one tab deletes goes from the other, too.
    page.locator("#conversations li.current").hover()
    page.locator("#conversations li.current").get_by_role("button", name="Delete").click()
    expect(other.locator("#conversations .title")).to_have_count(1)


def test_what_is_stored_may_be_anything(page: Any, server: PageServer) -> None:
    ask(page, "Hi")
    page.evaluate("""() => {
      const [key] = Object.keys(localStorage).filter((key) => key.includes(":conversation:"));
      const prefix = key.slice(0, key.lastIndexOf(":") + 1);
      const bad = ["{oops", "null", "[]", '{"id": "4"}', '{"id": "x", "messages": [{}]}'];
      bad.forEach((text, i) => localStorage.setItem(prefix + i, text));
      localStorage.setItem(prefix.replace("conversation:", "settings"), '{"topK": "", "model": 1}');
    }""")
    page.reload()
    assert titles(page) == ["Hi"]
    ask(page, "Ho")
    assert server.asked[1].body["top_k"] == 50


def test_a_full_storage_is_told_and_no_more(page: Any, server: PageServer) -> None:
    page.evaluate("""() => {
      for (let size = 1 << 22; size; size >>= 1) {
        try {
          localStorage.setItem(`fill${size}`, "x".repeat(size));
        } catch {}
      }
    }""")
    answer = ask(page, "Hi")
    expect(answer.locator(".content")).to_have_text("Hello there.")
    expect(page.locator("#notices p").last).to_contain_text("The browser does not store this")


def background(page: Any) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_dark_and_light(page: Any) -> None:
    light = background(page)
    page.emulate_media(color_scheme="dark")
    dark = background(page)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < sum(map(int, re.findall(r"\d+", light)))
    theme = page.locator("#theme")
    expect(theme).to_have_attribute("aria-label", "Theme: system")
    theme.click()
    expect(theme).to_have_attribute("aria-label", "Theme: light")
    assert background(page) == light
    theme.click()
    page.emulate_media(color_scheme="light")
    assert background(page) == dark
    page.reload()
    assert background(page) == dark
    theme.click()
    expect(theme).to_have_attribute("aria-label", "Theme: system")
    assert background(page) == light


def test_a_phone(page: Any, server: PageServer) -> None:
    page.set_viewport_size({"width": 360, "height": 720})
    server.replies = [says(MARKDOWN + "\n" + "long" * 200)]
    ask(page, "How do I train a model? " * 10 + "x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.getElementById('scroll').scrollWidth") == 360
    sidebar = page.locator("#sidebar")
    expect(sidebar).not_to_be_visible()
    opener = page.get_by_role("button", name="Conversations", exact=True)
    opener.click()
    expect(sidebar).to_be_visible()
    expect(page.get_by_role("button", name="New conversation")).to_be_focused()
    expect(page.locator("#open-list")).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(sidebar).not_to_be_visible()
    expect(opener).to_be_focused()
    opener.click()
    page.mouse.click(350, 400)  # beside it
    expect(sidebar).not_to_be_visible()
    opener.click()
    page.get_by_role("button", name="New conversation").click()
    expect(sidebar).not_to_be_visible()
    expect(page.locator(".message")).to_have_count(0)
    opener.click()
    page.locator("#conversations .title").click()
    expect(sidebar).not_to_be_visible()
    expect(page.locator(".message")).to_have_count(2)


def focused(page: Any) -> str:
    script = "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
    return page.evaluate(f"{script} || document.activeElement.textContent")


def test_keyboard_only(page: Any, server: PageServer) -> None:
    """Everything can be done without a mouse, and what has the focus can be seen."""
    keys = page.keyboard
    assert focused(page) == "input"
    keys.type("One")
    keys.press("Shift+Enter")
    keys.type("two")
    keys.press("Enter")
    finished(page)
    assert server.asked[0].body["messages"][0]["content"] == "One\ntwo"
    assert focused(page) == "input"
    seen = []
    for _ in range(7):
        keys.press("Shift+Tab")
        seen.append(focused(page))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    wanted = ["Regenerate", "Copy answer", "Copy message", "Edit and resend"]
    assert seen == [*wanted, "Settings", "Help", "Theme: system"]
    keys.press("Alt+l")
    assert focused(page) == "new"
    seen = []
    for _ in range(3):
        keys.press("Tab")
        seen.append(focused(page))
    assert seen == ["One", "Rename “One”", "Delete “One”"]
    keys.press("Shift+Tab")
    keys.press("Enter")
    keys.type("Uno")
    keys.press("Enter")
    assert focused(page) == "Uno"
    keys.press("Alt+s")
    assert focused(page) == "temperature"
    keys.press("Escape")
    keys.press("Alt+n")
    expect(page.locator(".message")).to_have_count(0)
    assert focused(page) == "input"


@pytest.mark.parametrize("told", ["isComposing: true", "keyCode: 229"])  # the latter by Safari
def test_an_input_method_ends_words_with_enter(page: Any, server: PageServer, told: str) -> None:
    enter = f'new KeyboardEvent("keydown", {{ key: "Enter", {told}, bubbles: true }})'
    ends_a_word = f"(field) => field.dispatchEvent({enter})"
    field = page.locator("#input")
    field.fill("にほん")
    field.evaluate(ends_a_word)
    expect(field).to_have_value("にほん")
    expect(page.locator(".message")).to_have_count(0)
    field.press("Enter")
    finished(page)
    expect(page.locator(".bubble")).to_have_text("にほん")
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Rename").click()
    title = page.get_by_label("Title")
    title.evaluate(ends_a_word)
    expect(title).to_be_focused()


def test_screen_readers(page: Any, server: PageServer) -> None:
    ask(page, "Hi")
    unnamed = page.evaluate("""() =>
      [...document.querySelectorAll("button, input, select, textarea")]
      .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
      .map((e) => e.outerHTML)""")
    assert unnamed == []
    for role, name in [
        ("main", None),
        ("complementary", "Conversations"),
        ("navigation", "Conversations"),
        ("region", "Messages"),
        ("article", "You"),
        ("article", "Answer of tiny-sft"),
        ("textbox", "Message"),
        ("combobox", "Model"),
    ]:
        expect(page.get_by_role(role, name=name, exact=True)).to_have_count(1)
    expect(page.locator("#announcer")).to_have_attribute("aria-live", "polite")
    page.emulate_media(reduced_motion="reduce")
    names = page.evaluate("""() => [...document.querySelectorAll("*")]
      .map((e) => getComputedStyle(e).animationName).filter((name) => name !== "none")""")
    assert names == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(page: Any, server: PageServer, scheme: str) -> None:
    """WCAG's 4.5 to 1 for every colour of text on every ground that it stands on."""
    page.emulate_media(color_scheme=scheme)
    pairs = [
        (ink, ground) for ink in ("ink", "soft") for ground in ("page", "side", "raised", "sunken")
    ]
    pairs += [("ink", "tint"), ("accent", "page"), ("accent", "raised"), ("on-accent", "accent")]
    pairs += [("danger", "danger-tint"), ("page", "ink")]
    script = """(names) => {
      const probe = document.body.appendChild(document.createElement("i"));
      const colours = names.map((name) => {
        probe.style.color = `var(--${name})`;
        return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
      });
      probe.remove();
      return colours;
    }"""
    for pair in pairs:
        lighter, darker = sorted(map(luminance, page.evaluate(script, list(pair))), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, pair


def luminance(rgb: list[float]) -> float:
    """Relative luminance of an sRGB colour, as WCAG defines it."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_follows_an_answer_unless_the_reader_scrolls(
    page: Any, server: PageServer
) -> None:
    holds = [Hold(), Hold()]
    lines = delta("line\n" * 60)
    server.replies = [Reply([lines, holds[0], lines, holds[1], lines, ending()])]
    answer = send(page, "Hi")
    rest = """() => { const e = document.getElementById("scroll");
      return e.scrollHeight - e.scrollTop - e.clientHeight; }"""
    expect(answer.locator("br")).to_have_count(59)
    assert page.evaluate(rest) < 2
    page.mouse.move(700, 400)
    page.mouse.wheel(0, -600)
    to_end = page.get_by_role("button", name="Scroll to the end")
    expect(to_end).to_be_visible()
    top = page.evaluate("document.getElementById('scroll').scrollTop")
    holds[0].released.set()
    expect(answer.locator("br")).to_have_count(119)
    assert page.evaluate("document.getElementById('scroll').scrollTop") == top
    to_end.click()
    holds[1].released.set()
    finished(page)
    assert page.evaluate(rest) < 2
    expect(to_end).not_to_be_visible()


def test_screenshots(page: Any, server: PageServer, tmp_path: Path) -> None:
    """Pictures to look at (`--basetemp DIR` says where), of every state in both themes."""
    tool = [delta("In May she sold 48/2 = "), delta("48/2", "python"), delta("24", "python_output")]
    shots = {}

    def shoot(name: str) -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            path = tmp_path / f"{name}-{scheme}.png"
            shots[path] = page.screenshot(path=path)

    shoot("welcome")
    server.replies = [
        Reply([*tool, delta("24 clips."), ending(41)]),
        fails(429, "The server is busy: 32 requests are waiting.", **{"retry-after": "3"}),
        says(MARKDOWN, tokens=214),
    ]
    ask(page, "Natalia sold clips to 48 friends in April, and half as many in May. How many?")
    ask(page, "And in June?")
    shoot("calculator-and-error")
    ask(page, "How do I train a small language model?")
    shoot("markdown")
    page.keyboard.press("Alt+s")
    shoot("settings")
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 390, "height": 780})
    shoot("phone")
    page.keyboard.press("Alt+l")
    shoot("phone-list")
    assert all(len(picture) > 5_000 for picture in shots.values())
    assert len(set(shots.values())) == len(shots) == 12
