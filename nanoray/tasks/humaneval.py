"""HumanEval (Chen et al. 2021): Python functions to be completed, judged by running their tests."""

from __future__ import annotations

import functools
import re
import secrets
from typing import Literal

from nanoray.errors import NanorayError
from nanoray.tasks.base import Task
from nanoray.tasks.rows import HubSplit, load_rows
from nanoray.tokenizer import Conversation
from nanoray.tools import run_python

TIMEOUT_S = 10.0
_OUTPUT_BYTES = 1024 * 1024  # the verdict comes last, after all that a program printed

# A block that is not closed goes to the end: the answer was cut off.
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)


class HumanEval(Task):
    """A function's head and docstring to be completed; right is what passes all its tests.

    An example's conversation also has ``"prompt"``, ``"test"`` and ``"entry_point"``, as strings.

    Args:
        data_dir: folder with ``HumanEval.jsonl.gz``; without it, from the hub.

    Raises:
        NanorayError: see `load_rows`; the split is not "test"; this machine cannot isolate
            what the sandbox runs. `example`: for a row that breaks HumanEval's form.
    """

    kind = "generative"

    def __init__(self, split: Literal["train", "test"], data_dir: str | None = None) -> None:
        if split != "test":
            raise NanorayError("humaneval has no training examples; leave it out of the mixture")
        _check_sandbox()
        source = HubSplit("openai/openai_humaneval", None, "test", ("HumanEval",))
        self._rows = load_rows(source, data_dir)
        super().__init__("humaneval", len(self._rows))

    def _example(self, number: int) -> Conversation:
        row = self._rows[number]
        prompt, solution = row.field("prompt", str), row.field("canonical_solution", str)
        question = f"Complete this Python function.\n\n```python\n{prompt.strip()}\n```"
        answer = f"```python\n{prompt.strip()}\n{solution.rstrip()}\n```"
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "prompt": prompt,
            "test": row.field("test", str),
            "entry_point": row.field("entry_point", str),
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        # Unknown to the program, so that neither exit(0) nor a printed word passes for it.
        verdict = f"passed {secrets.token_hex(16)}"
        test, entry_point = conversation["test"], conversation["entry_point"]
        code = program_of(completion, conversation["prompt"], entry_point)
        code = f"{code}\n\n{test}\n\ncheck({entry_point})\nprint({verdict!r})\n"
        result = run_python(code, timeout_s=TIMEOUT_S, max_output_bytes=_OUTPUT_BYTES)
        return result.status == "ok" and result.stdout.rstrip("\n").endswith(verdict)


def program_of(completion: str, prompt: str, entry_point: str) -> str:
    """The program that an answer is: the function, and what the prompt has before it.

    The code is that of the first fenced block with the function, else of the first block, else the
    whole answer. If it does not define the function, it is taken for the rest of the prompt's.
    """
    blocks = [*_BLOCK.findall(completion), completion]
    defines = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    code = next((block for block in blocks if defines.search(block)), blocks[0]).strip("\n")
    start = defines.search(prompt)
    if start and defines.search(code):
        prompt = prompt[: start.start()]  # imports and helpers
    return f"{prompt.rstrip()}\n\n{code}"


@functools.cache
def _check_sandbox() -> None:
    try:
        run_python("")
    except NanorayError as error:
        raise NanorayError(
            f"humaneval runs what a model wrote: {error}, or leave humaneval out"
        ) from error
