"""`python -m jobs.chat`: one answer, pipes, mistakes, and Ctrl-C in a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_program import endless_model, rendered
from engine_models import one_thread
from pretrain_runs import run_plan, tiny_plan

from jobs import chat as job
from nanoray.checkpoint.loading import LoadedModel, load_model
from nanoray.config import UsageError, run_job
from nanoray.engine import Engine, SamplingParams
from nanoray.errors import NanorayError
from nanoray.tokenizer import ByteTokenizer

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = ByteTokenizer()


Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Runs the job in this process with a tiny model of a stage: exit code, stdout, stderr."""

    def call(*argv: str, stage: str = "sft", stdin: bytes = b"") -> tuple[int, str, str]:
        loaded = LoadedModel(endless_model(256).model, TOKENIZER, {"stage": stage}, 1, "runs/x")
        monkeypatch.setattr("nanoray.checkpoint.loading.load_model", lambda *_a, **_k: loaded)
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
    time.sleep(1)  # the prompt is written before it is read
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
        begun = process.stdout.read(40)  # the answer's first words are among it
        assert begun.startswith(b"READY\n")
        assert len(begun) == 40
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(20) == 1
    assert b"Traceback" not in errors
    assert b"Error" not in errors
