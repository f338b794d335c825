"""The terminal chat: conversations token by token, commands, pipes, and Ctrl-C in a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_program import endless_model
from engine_models import one_thread
from pretrain_runs import run_plan, tiny_plan
from rich.console import Console

from jobs import chat as job
from jobs.chat_session import HELP, ChatSession, Settings
from nanoray.checkpoint import LoadedModel, load_model
from nanoray.config import UsageError, run_job
from nanoray.engine import Delta, Engine, SamplingParams
from nanoray.errors import NanorayError
from nanoray.tokenizer import ByteTokenizer
from nanoray.tools.calculator import calculate

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


def rendered(*turns: str, system: str = "") -> list[int]:
    """The tokenizer's own rendering of the whole conversation, for the assistant to go on."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, text in enumerate(turns):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return TOKENIZER.render_for_completion({"messages": messages})


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
    engine = Engine(loaded.model, TOKENIZER, num_slots=1, tool=calculate)
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


Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Runs the job in this process with a tiny model of a stage: exit code, stdout, stderr."""

    def call(*argv: str, stage: str = "sft", stdin: bytes = b"") -> tuple[int, str, str]:
        loaded = LoadedModel(endless_model(256).model, TOKENIZER, {"stage": stage}, 1, "runs/x")
        monkeypatch.setattr("nanoray.checkpoint.load_model", lambda *_a, **_k: loaded)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as caught:
            run_job(job.main, argv)
        out, err = capsys.readouterr()
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return code or 0, out, err

    return call


def answer_of(prompt: list[int], max_tokens: int) -> str:
    engine = Engine(endless_model(256).model, TOKENIZER)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return engine.generate([prompt], params)[0].text


GREEDY = ("--temperature", "0", "--max-tokens", "20", "--dtype", "float32")


def test_one_answer_to_a_pipe(run: Job) -> None:
    code, out, err = run("--run", "x", *GREEDY, "-p", "Who are you?")
    assert (code, err) == (0, "")
    assert out == answer_of(rendered("Who are you?"), 20) + "\n"
    assert run("--run", "x", *GREEDY, "--prompt=Who are you?")[1] == out
    code, base, _ = run("--run", "x", *GREEDY, "-p", "Who are you?", stage="pretrain")
    raw = [TOKENIZER.bos_id, *TOKENIZER.encode("Who are you?")]
    assert (code, base) == (0, answer_of(raw, 20) + "\n")
    assert run("--run", "x", *GREEDY, "--raw", "-p", "Who are you?")[1] == base


def test_lines_from_a_pipe(run: Job) -> None:
    code, out, err = run("--run", "x", *GREEDY, stdin="grüß\n\n/topk 3\n".encode() + b"x\xff")
    assert (code, err) == (0, "")
    first = answer_of(rendered("grüß"), 20)
    second = answer_of(rendered("grüß", first, "x\ufffd"), 20)
    assert out == f"{first}\ntop_k 3\n{second}\n"
    code, out, err = run("--run", "x", *GREEDY, stdin=b"/bogus\n" + b"long " * 100 + b"\nok\n")
    assert code == 1
    assert err.splitlines() == [
        "error: there is no command /bogus; /help lists them",
        "error: the prompt has 503 tokens, but the context is 256: shorten it.",
    ]
    assert out == answer_of(rendered("ok"), 20) + "\n"


def test_dry_run_and_mistakes(run: Job, home: Path) -> None:
    assert run("--run", "x", "--dry-run")[1] == "dry run: runs/x is fine, it answers\n"
    base = run("--run", "x", "--dry-run", stage="pretrain")[1]
    assert base == "dry run: runs/x is fine, it continues text (base model)\n"
    for argv, wanted, message in [
        ((), 2, "give the model: --run NAME"),
        (("--run", "x", "--top-k", "-1"), 2, "--top-k"),
        (("--run", "x", "--temperature", "nan"), 2, "--temperature"),
        (("--run", "x", "--max-tokens", "0"), 2, "--max-tokens"),
        (("--run", "x", "--raw", "--system", "s", "-p", "x"), 1, "--system needs a model"),
    ]:
        code, out, err = run(*argv)
        assert (code, out) == (wanted, ""), argv
        assert message in err
        assert err.count("\n") == 1


def test_a_real_base_checkpoint(
    home: Path, corpus: str, tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "tiny", num_iterations=2)
    run_plan(plan)
    capsys.readouterr()
    flags = ("--temperature=0", "--max-tokens=9", "--dtype=float32")
    assert job.main(["--run", "tiny", *flags, "-p", "The quiet river"]) == 0
    out = capsys.readouterr().out
    loaded = load_model("tiny", dtype="float32")
    prompt = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("The quiet river")]
    params = SamplingParams(temperature=0, max_tokens=9)
    (completion,) = Engine(loaded.model, loaded.tokenizer).generate([prompt], params)
    assert out == completion.text + "\n"
    with pytest.raises(NanorayError, match="no complete checkpoint of step 1; there are 2"):
        job.main(["--run", "tiny", "--step", "1", "-p", "x"])


def test_no_such_run(home: Path) -> None:
    with pytest.raises(NanorayError, match="there is no run nope"):
        job.main(["--run", "nope", "-p", "x"])
    with pytest.raises(UsageError, match="--run NAME"):
        job.main([])


def test_help_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jobs.chat", "--help"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--prompt" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray"}


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        self.master, slave = pty.openpty()
        path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, deadline_s: float = 60) -> str:
        """Read until a text comes; returns all up to it."""
        end = time.monotonic() + deadline_s
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the program ended: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    program = Terminal(str(Path(__file__).parent / "chat_program.py"))
    yield program
    program.process.kill()
    program.process.wait()
    os.close(program.master)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.wait_for("READY")
    terminal.wait_for("answers. /help lists the commands.")
    terminal.wait_for("> ")
    for question in ("hello", "again"):
        terminal.type(f"{question}\n")
        terminal.wait_for(question)
        time.sleep(0.5)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("(Ctrl-D leaves)")
    terminal.wait_for("> ")
    terminal.type("/temperature 0.9\n")
    terminal.wait_for("temperature 0.9")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    program = [sys.executable, str(Path(__file__).parent / "chat_program.py"), "-p", "x"]
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    with subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(40).startswith(b"READY\n")
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(20) == 1
    assert b"Traceback" not in errors
    assert b"Error" not in errors
