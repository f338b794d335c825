"""From what the engine samples to what the learner trains: tool calls, and lessonless groups."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import one_thread, scripted
from pretrain_runs import GradientRecorder, noisy, run_plan, tiny_plan
from rl_runs import LocalRollouts, rl_plan, run_alone

from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT
from nanoray.rl import flat
from nanoray.rl.algorithms import ALGORITHMS
from nanoray.rl.groups import Group
from nanoray.rl.learner import Learner, Scoring
from nanoray.rl.prompts import example_index
from nanoray.rl.reward_worker import TaskReward
from nanoray.rl.rewards import Reward
from nanoray.rl.sampler import Sampler, SamplerSettings
from nanoray.tasks.arithmetic import Arithmetic
from nanoray.tokenizer import ByteTokenizer
from nanoray.train.world import World

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = ByteTokenizer()


def calls_for_ever(folder: Path) -> tuple[GPT, Group]:
    """A model that multiplies again whenever it is told a product, and a group of its answers."""
    call, call_end, output_end = (
        TOKENIZER.special_id(f"<|{name}|>") for name in ("python_start", "python_end", "output_end")
    )
    model = scripted([TOKENIZER.special_id("<|assistant_start|>"), call, *b"2*3", call_end])
    with torch.no_grad():
        model.lm_head.weight[call] += model.wte.weight[output_end] / 4
    TOKENIZER.save(folder)
    task = Arithmetic("train", 20_000)
    numbers = range(200)
    prompts = [task.example(example_index(n, len(task), 42)) for n in numbers]
    lengths = [len(TOKENIZER.render_for_completion(prompt)) for prompt in prompts]
    number = next(n for n in numbers if lengths[n] <= 40)  # the model's context is 64
    settings = SamplerSettings(
        model=model.config.to_dict(),
        tokenizer_dir=str(folder),
        problems=TaskReward("arithmetic", "train"),
        num_samples=2,
        max_new_tokens=20,
        temperature=1.0,
        top_k=1,
        seed=42,
        num_threads=1,
        dtype="float32",
    )

    def judge(answers: Sequence[tuple[int, str]]) -> list[Reward]:
        return [Reward(float(place)) for place in range(len(answers))]

    sampler = Sampler(settings, judge)
    sampler.load_weights(flat.pack(model.state_dict()), 0)
    (group,) = sampler.sample([number])
    return model, group


def test_of_an_episode_with_two_tool_calls_only_what_was_sampled_is_trained(
    tmp_path: Path,
) -> None:
    model, group = calls_for_ever(tmp_path)
    for sample in group.samples:
        turn = "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>"
        assert TOKENIZER.decode(sample.tokens.tolist()) == 2 * turn + "<|python_start|>2*3"
        assert sample.mask.tolist() == 2 * [1, 1, 1, 1, 1, 0, 0, 0] + [1, 1, 1, 1]
    noisy(model)  # with the weights it was sampled with every answer is certain: no gradient
    hidden_states: list[torch.Tensor] = []
    hidden = model.hidden

    def watched(ids_BT: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden_states.append(hidden(ids_BT, *rest))
        hidden_states[-1].retain_grad()
        return hidden_states[-1]

    model.hidden = watched  # type: ignore[method-assign, assignment]
    learner = Learner(
        model,
        GradientRecorder(dict(model.named_parameters())),  # type: ignore[arg-type]
        World(0, 1, torch.device("cpu")),
        ALGORITHMS["reinforce"],
        Scoring(temperature=1.0, top_k=0, max_new_tokens=20, on_policy=True),
        micro_rows=2,
        pad_id=0,
    )
    loss, _figures, _times = learner([group], 1.0, 0.9, 0.0)
    assert loss != 0
    (states_BTD,) = hidden_states
    assert states_BTD.grad is not None
    before = len(group.prompt) - 1  # the positions whose logits predict the answer's tokens
    for row, sample in enumerate(group.samples):
        pushed = states_BTD.grad[row].abs().sum(-1) > 0
        assert not pushed[:before].any(), "the prompt is not trained"
        assert pushed[before : before + len(sample.tokens)].tolist() == sample.mask.tolist()


@pytest.fixture
def base(home: Path, corpus: str, tokenizer_dir: str) -> str:
    plan = tiny_plan(corpus, tokenizer_dir, "base", num_iterations=1, max_seq_len=128)
    assert run_plan(plan)["status"] == "finished"
    return "base"


def test_half_of_the_problems_teach_nothing_and_batches_are_full_all_the_same(base: str) -> None:
    plan = rl_plan(base, "half", algorithm="dapo", refill_factor=8)
    flip = itertools.cycle((0.0, 1.0))
    rollouts = LocalRollouts(plan, lambda index, _text: 1.0 if index % 2 else next(flip))
    assert run_alone(plan, rollouts=rollouts)["status"] == "finished"
    assert [len(step) for step in rollouts.steps] == [4, 4, 4]
    trained = [group.number for step in rollouts.steps for group in step]
    teaching = [n for n in range(max(trained) + 1) if example_index(n, 20_000, 7) % 2 == 0]
    assert trained == teaching, "each that teaches, once, in order, and no other"
    counts = rollouts.ledger()["counts"]
    assert counts["filtered"] >= 4
    assert counts["short_batches"] == 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_no_problem_teaches_anything_the_run_ends_with_a_sentence(
    base: str, value: float
) -> None:
    plan = rl_plan(base, "none", algorithm="dapo", refill_factor=2)
    rollouts = LocalRollouts(plan, lambda _index, _text: value)
    with pytest.raises(NanorayError, match=r"no group of step 0 .* 4 refills .*--refill-factor"):
        run_alone(plan, rollouts=rollouts)
    assert rollouts.ledger()["counts"]["dispatched"] == 8, "the budget, and no more"
