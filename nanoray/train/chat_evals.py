"""What fine-tuning and reinforcement learning ask their model on the way."""

from __future__ import annotations

from nanoray.engine import Engine, SamplingParams
from nanoray.evals.chat_suite import ChatSuite
from nanoray.evals.sample import chat_report
from nanoray.model.gpt import GPT
from nanoray.tokenizer import Tokenizer
from nanoray.tools.calculator import calculate
from nanoray.train.world import World

_SAMPLE_TOKENS = 128


def ask_together(
    suite: ChatSuite, model: GPT, tokenizer: Tokenizer, world: World
) -> dict[str, float]:
    """The suite's figures, the same on all workers, who share the questions."""
    model.eval()
    ask = suite.asker(model, tokenizer)
    items = suite.items()
    mine = {number: ask(items[number]) for number in range(world.rank, len(items), world.size)}
    model.train()
    answers = {number: found for part in world.gather(mine) for number, found in part.items()}
    return suite.report([answers[number] for number in range(len(items))]).metrics


def chat_samples(model: GPT, tokenizer: Tokenizer, step: int) -> str:
    """A section of ``samples.md``: fixed questions, answered greedily."""
    engine = Engine(model, tokenizer, num_slots=8, tool=calculate)
    params = SamplingParams(temperature=0.0, max_tokens=_SAMPLE_TOKENS)

    def answer(prompts: list[list[int]]) -> list[str]:
        return [done.text for done in engine.generate(prompts, params)]

    return chat_report(answer, tokenizer, step=step)
