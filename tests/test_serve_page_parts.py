"""The page's parts, tried in the browser: the reader of server-sent events, Markdown, the DOM."""

# ruff: noqa: F401, F811 (fixtures come by import)

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_browser import _running_server, browser
from page_server import PageServer

READ = """
async (chunks) => {
  const { readEvents } = await import(new URL("sse.js", document.baseURI));
  const body = new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(new Uint8Array(chunk));
      controller.close();
    },
  });
  const events = [];
  for await (const { type, data } of readEvents(body)) events.push([type, data]);
  return events;
}
"""
RENDER = """
async ([text, tools]) => {
  const { renderMarkdown } = await import(new URL("markdown.js", document.baseURI));
  return renderMarkdown(text, tools).innerHTML;
}
"""


@pytest.fixture(scope="module")
def lab(browser: Any, _running_server: PageServer) -> Any:
    """A page to import modules in."""
    page = browser.new_page()
    page.goto(_running_server.url)
    yield page
    page.close()


def read_events(lab: Any, chunks: list[bytes]) -> list[list[str]]:
    return lab.evaluate(READ, [list(chunk) for chunk in chunks])


def markdown(lab: Any, text: str, *tools: dict[str, Any]) -> str:
    return lab.evaluate(RENDER, [text, list(tools)])


def reference_events(text: str) -> list[list[str]]:
    """The standard's rules on a whole stream, line by line."""
    events: list[list[str]] = []
    data: list[str] = []
    kind = ""
    for line in re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))[:-1]:
        if not line:
            if data:
                events.append([kind or "message", "\n".join(data)])
            data, kind = [], ""
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "event":
            kind = value
    return events


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_events_are_the_same_for_every_split(lab: Any, line_end: str) -> None:
    lines = [
        "data: née 🦔",
        "",
        ": a comment",
        "event: x",
        "data:a",
        "data: b",
        "data",
        "",
        "id: 1",
    ]
    lines += ["", "data: [DONE]", "", "data: cut off"]
    raw = line_end.join(lines).encode()
    wanted = [["message", "née 🦔"], ["x", "a\nb\n"], ["message", "[DONE]"]]
    splits = [[raw], [raw[i : i + 1] for i in range(len(raw))]]
    splits += [[raw[:i], raw[i:]] for i in range(1, len(raw))]
    for chunks in splits:
        assert read_events(lab, chunks) == wanted


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["data", ":", " ", "\r", "\n", "\r\n", "event", "é🦔", "x"]), max_size=40
    ),
    st.lists(st.integers(0, 120), max_size=12),
)
def test_random_streams_follow_the_standard(lab: Any, pieces: list[str], cuts: list[int]) -> None:
    raw = "".join(pieces).encode()
    edges = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
    chunks = [raw[a:b] for a, b in pairwise(edges)]
    # A trailing CR is a line's end already; the reference sees that only with what follows.
    assert read_events(lab, chunks) == reference_events(raw.decode())


def test_the_end_of_a_line_is_not_waited_for(lab: Any) -> None:
    """An event that ends in CR CR is there before the next byte comes."""
    script = """
    async () => {
      const { EventParser } = await import(new URL("sse.js", document.baseURI));
      const parser = new EventParser();
      return [parser.feed("data: a\\r\\r"), parser.feed("\\ndata: b\\r\\n\\r"), parser.feed("\\n")];
    }"""
    first, second, third = lab.evaluate(script)
    assert [event["data"] for event in first] == ["a"]
    assert [event["data"] for event in second] == ["b"]
    assert third == []


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# A *b*\n## C ##\n#no", "<h1>A <em>b</em></h1><h2>C</h2><p>#no</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("a **b *c* d** e", "<p>a <strong>b <em>c</em> d</strong> e</p>"),
        ("***a*** _b_ __c__ ~~d~~", "<p><em><strong>a</strong></em> <em>b</em> "
         "<strong>c</strong> <del>d</del></p>"),
        ("2 * 3 * 4 and a_b_c and 5*6*7", "<p>2 * 3 * 4 and a_b_c and 5<em>6</em>7</p>"),
        ("**not closed and *this*", "<p>**not closed and <em>this</em></p>"),
        ("`a*b*` ``c`d`` `open", "<p><code>a*b*</code> <code>c`d</code> `open</p>"),
        (r"\*a\* \# 1\. \\", "<p>*a* # 1. \\</p>"),
        ("- a\n- b\n  - c\n  - d\n- e", '<ul class="tight"><li>a</li><li>b<ul class="tight">'
         "<li>c</li><li>d</li></ul></li><li>e</li></ul>"),
        ("3. a\n4. b", '<ol start="3" class="tight"><li>a</li><li>b</li></ol>'),
        ("1. a\n\n   more\n\n2. b", '<ol class="loose"><li>a<p>more</p></li><li>b</li></ol>'),
        ("born in\n1990. He", "<p>born in<br>1990. He</p>"),
        ("text\n- item", '<p>text</p><ul class="tight"><li>item</li></ul>'),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"
         "<p>c</p>"),
        ("---\n***", "<hr><hr>"),
        ("a | b\n--- | :-:\n1 | `x\\|y`", '<div class="table" tabindex="0" role="group" '
         'aria-label="Table"><table><thead><tr><th>a</th><th class="center">b</th></tr></thead>'
         '<tbody><tr><td>1</td><td class="center"><code>x|y</code></td></tr></tbody></table>'
         "</div>"),
        ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
        ("", ""),
    ],
)  # fmt: skip
def test_markdown(lab: Any, text: str, html: str) -> None:
    assert markdown(lab, text) == html


def test_code_blocks_keep_their_text(lab: Any) -> None:
    code = 'if a < b:\n\n    print("*x*")  # <b>'
    for text in (f"```python\n{code}\n```", f"~~~~ python\n{code}\n~~~~", f"```python\n{code}"):
        html = markdown(lab, text)
        assert 'if a &lt; b:\n\n    print("*x*")  # &lt;b&gt;</code></pre></figure>' in html
        assert "<span>python</span>" in html
    nested = markdown(lab, "1. a\n   ```\n   x\n     y\n   ```\n2. b")
    assert "<code>x\n  y</code>" in nested
    assert nested.count("<li>") == 2


def links(html: str) -> list[tuple[str, str]]:
    return re.findall(
        r'<a href="([^"]*)" target="_blank" rel="noopener noreferrer" title="[^"]*">(.*?)</a>', html
    )


def test_links(lab: Any) -> None:
    html = markdown(lab, "[a *b*](https://x.org/(y)) see https://y.org/a_b_c. (http://z.org/1)")
    assert links(html) == [
        ("https://x.org/(y)", "a <em>b</em>"),
        ("https://y.org/a_b_c", "https://y.org/a_b_c"),
        ("http://z.org/1", "http://z.org/1"),
    ]
    assert links(markdown(lab, "<mailto:a@b.c> ![i](https://x.org/i.png 't')")) == [
        ("mailto:a@b.c", "mailto:a@b.c"),
        ("https://x.org/i.png", "i"),
    ]
    nested = markdown(lab, "[https://x.org](https://y.org) [[a](https://x.org)](mailto:a@b.c)")
    assert links(nested) == [("https://y.org/", "https://x.org"), ("https://x.org/", "a")]


HOSTILE = [
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "[a](javascript:window.hacked=1)",
    "[a](JaVaScRiPt:window.hacked=1)",
    "[a](\x01javascript:window.hacked=1)",
    "[a](java\tscript:window.hacked=1)",
    "[a](<javascript:window.hacked=1>)",
    "[a](data:text/html,<script>window.hacked=1</script>)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](blob:x) [d](/relative) [e](//host/x)",
    "<javascript:window.hacked=1>",
    '[a](https://x.org/"onmouseover="window.hacked=1)',
    "[a](https://x.org 'x\" onmouseover=\"window.hacked=1')",
    '![x](https://x.org/y"onerror="window.hacked=1)',
    '```"><img src=x onerror=window.hacked=1>\ncode\n```',
    "`<svg onload=window.hacked=1>`",
    "| <img src=x onerror=window.hacked=1> |\n| --- |\n| <script>window.hacked=1</script> |",
    "# <iframe srcdoc='<script>parent.hacked=1</script>'>",
    "\ue0005\ue001 and \ue000x\ue001",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_active(lab: Any, text: str) -> None:
    """Only the known elements and attributes come out, whatever goes in."""
    script = """
    async (text) => {
      const { renderMarkdown } = await import(new URL("markdown.js", document.baseURI));
      const { withoutMarks } = await import(new URL("inline.js", document.baseURI));
      const root = renderMarkdown(withoutMarks(text), []);
      document.body.append(root);
      const all = [...root.querySelectorAll("*")];
      const seen = all.map((e) => [e.localName, ...e.getAttributeNames()]).flat();
      const hrefs = all.filter((e) => e.localName === "a").map((e) => e.protocol);
      await new Promise((resolve) => setTimeout(resolve, 20));
      root.remove();
      return { seen, hrefs, hacked: Boolean(window.hacked) };
    }"""
    found = lab.evaluate(script, text)
    assert not found["hacked"]
    elements = (
        "p br h1 code pre a em strong figure figcaption span button table thead tbody tr th td"
    )
    attributes = "div href target rel title class tabindex role aria-label type data-action"
    assert set(found["seen"]) <= set((elements + " " + attributes).split())
    assert set(found["hrefs"]) <= {"http:", "https:", "mailto:"}


@pytest.mark.parametrize(
    "text",
    ["*" * 20_000, "*a " * 8_000, "*a_ " * 6_000, "[" * 20_000, "[a](" * 6_000, "`a``" * 6_000,
     "> " * 8_000, "- " * 8_000, "~~a" * 6_000, "**a** " * 4_000, "# " + " " * 20_000 + "x",
     "```" + " " * 20_000 + "`", "|" * 20_000, "|a|b|\n|-|-|\n" + "|" * 8_000, "\n \n" * 8_000,
     "- a\n\n" * 4_000, "https://" + "(" * 8_000 + ")" * 9_000,
     "*a **b " * 4_000 + "b** a* " * 4_000,
     "".join("  " * i + "- a\n" for i in range(100)), "](" * 8_000, "[](" + " " * 16_000],
    ids=lambda text: text[:12].strip(),
)  # fmt: skip
def test_no_text_takes_long(lab: Any, text: str) -> None:
    """A model's loop of marks must not freeze the tab (answers have 16 KB, by and large)."""
    script = """
    async (text) => {
      const { renderMarkdown } = await import(new URL("markdown.js", document.baseURI));
      const start = performance.now();
      const root = renderMarkdown(text, []);
      let depth = 0;
      for (const e of root.querySelectorAll(":not(:has(*))")) {
        let own = 0;
        for (let up = e; up !== root; up = up.parentElement) own++;
        depth = Math.max(depth, own);
      }
      return [performance.now() - start, depth];
    }"""
    milliseconds, depth = lab.evaluate(script, text)
    assert milliseconds < 1_000
    assert depth < 40


def test_tool_calls_stand_where_they_were_made(lab: Any) -> None:
    done = {"expression": "48/2", "result": "24", "pending": False}
    html = markdown(
        lab, "In **\ue0000\ue001 May** and\n- `\ue0001\ue001`", done, {**done, "result": None}
    )
    assert 'aria-label="Calculator: 48/2 gives 24"' in html
    assert '<output class="result">24</output></span> May</strong> and</p>' in html
    assert '<output class="none">no result</output></span></code></li>' in html


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab*_`[]()#>-|~1.\n \\<é", max_size=60), st.integers(0, 60))
def test_morphing_equals_rendering_anew(lab: Any, text: str, cut: int) -> None:
    """An answer that grew in steps looks as if it had come at once."""
    script = """
    async ([text, cut]) => {
      const { renderMarkdown } = await import(new URL("markdown.js", document.baseURI));
      const { morph } = await import(new URL("dom.js", document.baseURI));
      const grown = document.createElement("div");
      for (const part of [text.slice(0, cut), text]) morph(grown, renderMarkdown(part, []));
      return [grown.innerHTML, renderMarkdown(text, []).innerHTML];
    }"""
    grown, anew = lab.evaluate(script, [text, cut])
    assert grown == anew
