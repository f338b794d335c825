"""What fine-tuning and reinforcement learning ask their model on the way."""

from __future__ import annotations

import json

from nanoray.engine import Engine, SamplingParams
from nanoray.evals.chat_suite import ChatSuite
from nanoray.evals.sample import chat_report
from nanoray.evals.suites import Report
from nanoray.model.gpt import GPT
from nanoray.tokenizer import Tokenizer
from nanoray.tools.calculator import calculate
from nanoray.train.world import World

_SAMPLE_TOKENS = 128
_NUM_HELD_OUT = 8


def ask_together(suite: ChatSuite, model: GPT, tokenizer: Tokenizer, world: World) -> Report:
    """What the suite finds, the same on all workers, who share the questions."""
    model.eval()
    ask = suite.asker(model, tokenizer)
    items = suite.items()
    mine = {number: ask(items[number]) for number in range(world.rank, len(items), world.size)}
    model.train()
    answers = {number: found for part in world.gather(mine) for number, found in part.items()}
    return suite.report([answers[number] for number in range(len(items))])


def held_out_samples(report: Report) -> str:
    """Lines for ``samples.md``: some of a suite's questions with their first answers."""
    asked = [json.loads(line) for line in report.files["chat_samples.jsonl"].splitlines()]
    lines = []
    for sample in asked[:: max(1, len(asked) // _NUM_HELD_OUT)][:_NUM_HELD_OUT]:
        text = " ".join([sample["question"], f"**{(sample['completions'] or [''])[0]}**"])
        right = f"{sample['num_correct']} of {len(sample['completions'])} right"
        lines.append(f"- {text} ({right})".replace("\n", " ⏎ "))
    return "\n".join(lines) + "\n"


def chat_samples(model: GPT, tokenizer: Tokenizer, step: int) -> str:
    """A section of ``samples.md``: fixed questions, answered greedily."""
    engine = Engine(model, tokenizer, num_slots=8, tool=calculate)
    params = SamplingParams(temperature=0.0, max_tokens=_SAMPLE_TOKENS)

    def answer(prompts: list[list[int]]) -> list[str]:
        return [done.text for done in engine.generate(prompts, params)]

    return chat_report(answer, tokenizer, step=step)
