"""HumanEval: what of an answer is run, what passes, and that nothing passes by leaving early."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanoray.errors import NanorayError
from nanoray.tasks import humaneval
from nanoray.tasks.base import reference_answer
from nanoray.tasks.catalog import Sources, load_task
from nanoray.tasks.humaneval import HumanEval, program_of
from nanoray.tokenizer import ByteTokenizer
from nanoray.tools import sandbox

PROMPT = '''import math


def half(x):
    return x / 2


def area(r):
    """ The area of a circle.
    >>> area(1) > 3
    True
    """
'''
BODY = "    return math.pi * r * half(2 * r)\n"
ROW = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "canonical_solution": BODY,
    "test": "def check(candidate):\n    assert round(candidate(2), 3) == 12.566\n",
    "entry_point": "area",
}


def write(folder: Path, *rows: dict) -> str:
    lines = "\n".join(map(json.dumps, rows))
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return str(folder)


@pytest.fixture
def circles(tmp_path: Path) -> HumanEval:
    return HumanEval("test", write(tmp_path, ROW))


FUNCTION = "def area(r):\n" + BODY


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        FUNCTION,
        PROMPT + BODY,
        f"```python\n{PROMPT}{BODY}```",
        f"Here it is:\n\n```python\n{FUNCTION}```\nIt multiplies; see `math.pi`.",
        f"```\n{FUNCTION}```",
        f"```py\n{FUNCTION}```",
        f"```Python3 \r\n{FUNCTION}```",
        f"The body is\n```python\n{BODY}```",
        f"```python\n{FUNCTION}",  # cut off by max_tokens
        f"Call it so:\n```python\narea(3)\n```\nwith\n```python\n{FUNCTION}```",
        f"```python\n{FUNCTION}```\nFor example:\n```python\narea('x')\n```",
        f"```python\nfrom math import pi\n\n{FUNCTION}print(area(1), end='')\n```",
        "def area(r):\n    '''```'''\n" + BODY,
        f"```python\n{FUNCTION}print('x' * 300_000)\n```",
    ],
)
def test_right_answers(circles: HumanEval, completion: str) -> None:
    assert circles.evaluate(circles.example(0), completion)
    assert circles.reward(circles.example(0), completion) == 1


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "I do not know.",
        "    pass",
        "\0",
        "\ud800",
        "    return 3 * r * r",
        "```python\n```",
        f"```python\n{FUNCTION}raise ValueError\n```",
        f"```python\n{FUNCTION}import sys\nsys.exit(0)\n```",
        "    exit(0)",
        "    import os\n    os._exit(0)",
        "print('passed')\nprint('ok')\nexit(0)",
        "def area(r):\n    import sys\n    print('passed')\n    sys.exit()",
        "def area(r):\n    raise SystemExit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef area(r):\n    return 0",
        "def check(candidate):\n    pass\ndef area(r):\n    return 0",
        "def area(r):\n    while True: pass",
        "def area(r):\n    return 'x' * 10**10",
        f"```python\n{FUNCTION}print('\\0\\ud800')\n```",
    ],
)
def test_wrong_answers(
    circles: HumanEval, monkeypatch: pytest.MonkeyPatch, completion: str
) -> None:
    monkeypatch.setattr(humaneval, "TIMEOUT_S", 2.0)
    assert not circles.evaluate(circles.example(0), completion)


def test_what_the_prompt_has_before_the_function_is_kept() -> None:
    head = PROMPT[: PROMPT.index("def area")].rstrip()
    assert program_of(FUNCTION, PROMPT, "area") == f"{head}\n\n{FUNCTION.rstrip()}"
    assert program_of(BODY, PROMPT, "area") == f"{PROMPT.rstrip()}\n\n{BODY.rstrip()}"
    other = "def areas(r):\n    return 1"
    assert program_of(other, PROMPT, "area").startswith(PROMPT.rstrip())


def test_rendered_by_hand(circles: HumanEval) -> None:
    tokenizer, conversation = ByteTokenizer(), circles.example(0)
    question = f"Complete this Python function.\n\n```python\n{PROMPT.strip()}\n```"
    answer = f"```python\n{PROMPT.strip()}\n{BODY.rstrip()}\n```"
    assert tokenizer.decode(tokenizer.render_conversation(conversation)[0]) == (
        f"<|bos|><|user_start|>{question}<|user_end|><|assistant_start|>{answer}<|assistant_end|>"
    )


def test_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(NanorayError, match="humaneval has no training examples"):
        load_task("humaneval", "train", Sources())


@pytest.mark.parametrize("key", ["prompt", "canonical_solution", "test", "entry_point"])
def test_bad_rows(tmp_path: Path, key: str) -> None:
    task = HumanEval("test", write(tmp_path, ROW, {**ROW, key: 3}))
    with pytest.raises(NanorayError, match=f"HumanEval.jsonl.gz, line 2: its field '{key}' must"):
        task.example(1)


def test_a_machine_without_isolation_is_refused(
    circles: HumanEval, monkeypatch: pytest.MonkeyPatch
) -> None:
    humaneval._check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "ISOLATION", sandbox.ISOLATION - {"network"})
    with pytest.raises(NanorayError, match=r"no network for the sandbox.*leave humaneval out"):
        HumanEval("test")
    with pytest.raises(NanorayError, match="nothing was run"):
        circles.evaluate(circles.example(0), BODY)


@pytest.mark.slow
def test_every_canonical_solution_passes_and_no_empty_one(shared_data: Path) -> None:
    """164 programs each, in the sandbox."""
    task = load_task("humaneval", "test", Sources(str(shared_data)))
    conversations = [task.example(i) for i in range(len(task))]
    assert len(conversations) == 164
    whole = [reference_answer(conversation) for conversation in conversations]
    solutions = [row.field("canonical_solution", str) for row in task._rows]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(4) as pool:
        for answers, wanted in (
            (whole, True),
            (solutions, True),
            (["    pass"] * 164, False),
            ([c["prompt"] + "    pass" for c in conversations], False),
        ):
            verdicts = list(pool.map(task.evaluate, conversations, answers))
            assert [i for i, verdict in enumerate(verdicts) if verdict != wanted] == []
