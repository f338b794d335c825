"""A conversation token by token, its commands, and what a terminal shows of it."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from chat_program import endless_model, rendered
from engine_models import one_thread
from rich.console import Console

from jobs import chat as job
from jobs.chat_session import HELP, ChatSession, Settings
from nanoray.engine import Delta, Engine, SamplingParams
from nanoray.errors import NanorayError
from nanoray.tokenizer import ByteTokenizer

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = ByteTokenizer()
END = TOKENIZER.special_id("<|assistant_end|>")


def special(*names: str) -> list[int]:
    return [TOKENIZER.special_id(f"<|{name}|>") for name in names]


def said(text: str) -> list[Delta]:
    """An answer of plain text, a letter a delta, that ends by itself."""
    letters = [Delta(0, letter, TOKENIZER.encode(letter), [0.0]) for letter in text]
    return [*letters, Delta(0, "", [END], [0.0], "stop")]


class FakeEngine:
    """Streams scripted answers; an exception in a script is raised there."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = iter(answers)
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.closed = 0

    async def stream(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[Delta, None]:
        self.asked.append((list(prompt), params))
        try:
            for delta in next(self.answers):
                if isinstance(delta, BaseException):
                    raise delta
                yield delta
        finally:
            self.closed += 1


class Chat:
    """A session on a console that is a string."""

    def __init__(
        self, *answers: list[Any], raw: bool = False, terminal: bool = False, **settings: Any
    ) -> None:
        self.engine = FakeEngine(*answers)
        self.file = io.StringIO()
        self.console = Console(
            file=self.file, force_terminal=terminal, color_system=None, soft_wrap=True
        )
        self.session = ChatSession(
            self.engine,
            TOKENIZER,
            self.console,
            Settings(**settings),
            raw=raw,
            show_tools=terminal,
        )

    def __call__(self, line: str) -> str:
        """What is printed for a line."""
        self.file.seek(0)
        self.file.truncate()
        self.session.handle(line)
        return self.file.getvalue()


def test_turns_extend_the_conversation() -> None:
    chat = Chat(said("Hello."), said("Fine."), said("Bye."), system="Be brief.")
    assert chat("Hi") == "Hello.\n"
    assert chat("  How are you? ") == "Fine.\n"
    assert chat("") == chat("   ") == ""
    assert chat("Bye") == "Bye.\n"
    prompts = [prompt for prompt, _ in chat.engine.asked]
    turns = ["Hi", "Hello.", "How are you?", "Fine.", "Bye"]
    for count, prompt in enumerate(prompts):
        assert prompt == rendered(*turns[: 2 * count + 1], system="Be brief.")
        # Every prompt begins with all that the engine has computed before.
        assert prompt[: len(prompts[count - 1])] == prompts[count - 1] or count == 0
    assert len({params.seed for _, params in chat.engine.asked}) == 3
    assert chat.engine.closed == 3


@pytest.mark.parametrize("last", ["bos", "length", "abort"])
def test_a_turn_is_over_however_it_ended(last: str) -> None:
    letters = said("Well")[:-1]
    end: dict[str, list[Any]] = {
        "bos": [Delta(0, "", [TOKENIZER.bos_id], [0.0], "stop")],
        "length": [Delta(0, "", [], [], "length")],
        "abort": [KeyboardInterrupt()],
    }
    chat = Chat([*letters, *end[last]], said("Yes."))
    if last == "abort":
        with pytest.raises(KeyboardInterrupt):
            chat("Go on")
    else:
        assert chat("Go on") == "Well\n"
    assert chat.engine.closed == 1
    assert chat("And?") == "Yes.\n"
    assert chat.engine.asked[1][0] == rendered("Go on", "Well", "And?")


def test_a_question_that_failed_is_forgotten() -> None:
    chat = Chat(said("A."), [NanorayError("the prompt has 900 tokens")], said("B."))
    chat("one")
    with pytest.raises(NanorayError, match="900 tokens"):
        chat("two")
    assert chat("three") == "B.\n"
    assert chat.engine.asked[2][0] == rendered("one", "A.", "three")
    broken = Chat([*said("Hm")[:-1], Delta(0, "", [], [], "error", error="the logits are NaN")])
    with pytest.raises(NanorayError, match="broke off: the logits are NaN"):
        broken("x")


CALL = [
    *said("It is ")[:-1],
    Delta(0, "", special("python_start"), [0.0]),
    *[Delta(0, letter, TOKENIZER.encode(letter), [0.0], tool="call") for letter in "17+25"],
    Delta(0, "", special("python_end"), [0.0], tool="call"),
    Delta(
        0,
        "42",
        [*special("output_start"), *TOKENIZER.encode("42"), *special("output_end")],
        [0.0] * 4,
        tool="output",
    ),
    *said("42."),
]


def test_tool_calls_are_shown_in_terminals_only_and_kept(tmp_path: Path) -> None:
    assert Chat(CALL)("17 + 25?") == "It is 42.\n"
    chat = Chat(CALL, said("Yes."), terminal=True)
    assert chat("17 + 25?") == "It is [17+25 = 42] 42.\n"
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "17+25"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "42."},
    ]
    messages = [
        {"role": "user", "content": "17 + 25?"},
        {"role": "assistant", "content": parts},
    ]
    assert chat.session.messages == messages
    assert chat.session.tokens == TOKENIZER.render_conversation({"messages": messages})[0]
    assert "saved" in chat(f"/save {tmp_path}/chat.jsonl")
    chat("Sure?")
    chat(f"/save {tmp_path}/chat.jsonl")
    lines = (tmp_path / "chat.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"messages": messages}
    # What was saved is what fine-tuning reads.
    ids, _ = TOKENIZER.render_conversation(json.loads(lines[1]))
    assert ids == chat.session.tokens


def test_a_call_without_answer_is_closed() -> None:
    unanswered = [*CALL[:13], *said("?")]
    assert Chat(unanswered, terminal=True)("x") == "It is [17+25] ?\n"
    assert Chat(CALL[:9], terminal=True)("x") == "It is [17] \n"


def test_commands() -> None:
    chat = Chat(said("a"), said("b"), said("c"), said("d"), temperature=0.5, top_k=7, seed=3)
    assert chat("/temperature") == "temperature 0.5\n"
    chat("1")
    assert chat("/temperature 0") == "temperature 0.0\n"
    chat("2")
    assert chat("/temperature 1.5") == "temperature 1.5\n"
    assert chat("/topk 0") == "top_k 0\n"
    assert chat("/clear") == ""
    chat(" /etc is what?")
    params = [params for _, params in chat.engine.asked]
    assert [(p.temperature, p.top_k, p.seed) for p in params] == [
        *((0.5, 7, 3), (0, 0, 4), (1.5, 0, 5))
    ]
    assert chat.engine.asked[2][0] == rendered("/etc is what?")
    chat("/system Talk like a pirate.")
    chat("4")
    assert chat.engine.asked[3][0] == rendered("4", system="Talk like a pirate.")
    assert chat.session.messages[0] == {"role": "system", "content": "Talk like a pirate."}
    assert HELP.split("\n")[0] in chat("/help")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temprature 1", "there is no command /temprature; /help lists them"),
        ("/", "there is no command /"),
        ("/temperature hot", "temperature must be a number, not 'hot'"),
        ("/temperature -1", "temperature must be a number from 0"),
        ("/temperature nan", "temperature must be a number from 0"),
        ("/topk -1", "top_k must be a whole number"),
        ("/topk 1.5", "top_k must be a number, not '1.5'"),
        ("/save", "there is nothing to save yet"),
    ],
)
def test_wrong_commands_change_nothing(line: str, message: str) -> None:
    chat = Chat()
    before = chat.session.settings
    with pytest.raises(NanorayError) as caught:
        chat(line)
    assert message in str(caught.value)
    assert chat.session.settings == before
    assert not chat.engine.asked


def test_a_file_that_cannot_be_written() -> None:
    chat = Chat(said("a"))
    chat("x")
    with pytest.raises(NanorayError, match=r"/nowhere/chat.jsonl cannot be written \(No such file"):
        chat("/save /nowhere/chat.jsonl")


def test_raw_lines_are_documents_of_their_own(tmp_path: Path) -> None:
    chat = Chat(said(" of France is Paris."), said("..."), raw=True)
    assert chat("The capital") == " of France is Paris.\n"
    chat(" Once")
    prompts = [prompt for prompt, _ in chat.engine.asked]
    assert prompts == [
        [TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in ("The capital", " Once")
    ]
    with pytest.raises(NanorayError, match="no system message"):
        chat("/system x")
    chat(f"/save {tmp_path}/texts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert lines == [{"text": "The capital of France is Paris."}, {"text": " Once..."}]


def test_a_model_cannot_command_the_terminal() -> None:
    nasty = said("a\x1b]0;title\x07\n\t[red]b[/red]\x9b")
    assert Chat(nasty, terminal=True)("x") == "a\ufffd]0;title\ufffd\n\t[red]b[/red]\ufffd\n"
    assert Chat(nasty)("x") == "a\x1b]0;title\x07\n\t[red]b[/red]\x9b\n"


def test_a_conversation_at_the_terminal() -> None:
    """Mistakes and Ctrl-C are told, and the conversation goes on; Ctrl-D leaves."""
    chat = Chat(said("A."), [*said("B")[:1], KeyboardInterrupt()], terminal=True)
    lines = iter(["one", KeyboardInterrupt(), "/bogus", "two"])

    def read() -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    job.converse(chat.session, read, chat.console)
    assert chat.file.getvalue().splitlines() == [
        "A.",
        "",
        "(Ctrl-D leaves)",
        "error: there is no command /bogus; /help lists them",
        "B",
        "(stopped)",
        "",
    ]


def test_the_engine_finds_its_prefix_again() -> None:
    loaded = endless_model()
    engine = Engine(loaded.model, TOKENIZER, num_slots=1)
    console = Console(file=io.StringIO())
    settings = Settings(max_tokens=12, top_k=5)
    session = ChatSession(engine, TOKENIZER, console, settings, raw=False, show_tools=False)
    try:
        session.answer("first")
        computed = engine.stats()["computed_prefill_tokens"]
        session.answer("second")
        new = engine.stats()["computed_prefill_tokens"] - computed
        # The last token of an answer, and the turn that follows it.
        turn = len(TOKENIZER.render_for_completion({"messages": session.messages[2:3]}))
        assert turn <= new <= turn + 2
        assert len(session.messages) == 4
        engine_alone = Engine(loaded.model, TOKENIZER, num_slots=1)
        prompt = rendered("first")
        params = Settings(max_tokens=12, top_k=5).sampling(0)
        (completion,) = engine_alone.generate([prompt], params)
        assert session.tokens[len(prompt) :][: len(completion.tokens)] == completion.tokens
    finally:
        engine.close()
