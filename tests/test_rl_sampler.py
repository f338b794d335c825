"""The sampler: its groups are a function of weights, bundle and seed, and true to the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import full_logits, one_thread, scripted, tiny

from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT
from nanoray.rl import flat
from nanoray.rl.groups import Group
from nanoray.rl.prompts import draw_seed, example_index
from nanoray.rl.reward_worker import TaskReward
from nanoray.rl.rewards import Reward
from nanoray.rl.sampler import Sampler, SamplerSettings
from nanoray.tasks.arithmetic import Arithmetic
from nanoray.tokenizer import ByteTokenizer

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
TASK = Arithmetic("train", 20_000)


def judge(answers: Sequence[tuple[int, str]]) -> list[Reward]:
    """Pays for the length; the index is checked by its own test."""
    return [Reward(len(text) / 100, "timeout" if "q" in text else "") for _, text in answers]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    return folder


@pytest.fixture(scope="module")
def settings(tokenizer_dir: Path) -> SamplerSettings:
    return SamplerSettings(
        model=tiny(sequence_len=256, n_layer=2).config.to_dict(),
        tokenizer_dir=str(tokenizer_dir),
        problems=TaskReward("arithmetic", "train"),
        num_samples=3,
        max_new_tokens=12,
        temperature=1.0,
        top_k=20,
        seed=42,
        num_threads=1,
        dtype="float32",
    )


def opened(settings: SamplerSettings, model: GPT | None = None, version: int = 0) -> Sampler:
    sampler = Sampler(settings, judge)
    model = model or tiny(sequence_len=256, n_layer=2)
    sampler.load_weights(flat.pack(model.state_dict()), version)
    return sampler


def values(groups: Sequence[Group]) -> list[Any]:
    return [
        (
            *(group.number, group.prompt.tolist(), s.tokens.tolist(), s.mask.tolist()),
            *(s.logprobs.tolist(), s.versions.tolist(), s.text, s.reward, s.problem),
        )
        for group in groups
        for s in group.samples
    ]


def test_a_bundle_is_the_same_whatever_was_sampled_before(settings: SamplerSettings) -> None:
    fresh = values(opened(settings).sample([4, 5]))
    used = opened(settings)
    used.sample([0, 1, 2, 3, 4])
    used.sample([4, 9])
    assert values(used.sample([4, 5])) == fresh
    used.load_weights(flat.pack(tiny(seed=9, sequence_len=256, n_layer=2).state_dict()), 1)
    other = used.sample([4, 5])
    assert [row[2] for row in values(other)] != [row[2] for row in fresh]
    used.load_weights(flat.pack(tiny(sequence_len=256, n_layer=2).state_dict()), 0)
    assert values(used.sample([4, 5])) == fresh
    assert {len({tuple(s.tokens) for s in group.samples}) for group in other} == {3}


def test_other_seeds_and_numbers_are_other_draws(settings: SamplerSettings) -> None:
    first = opened(settings).sample([4])[0]
    other = opened(replace(settings, seed=43)).sample([4])[0]
    assert [s.tokens.tolist() for s in first.samples] != [s.tokens.tolist() for s in other.samples]


def test_the_prompt_is_the_tasks_and_the_judge_sees_its_index(settings: SamplerSettings) -> None:
    seen: list[tuple[int, str]] = []

    def watching(answers: Sequence[tuple[int, str]]) -> list[Reward]:
        seen.extend(answers)
        return judge(answers)

    sampler = Sampler(settings, watching)
    sampler.load_weights(flat.pack(tiny(sequence_len=256, n_layer=2).state_dict()), 3)
    groups = sampler.sample([7, 20_007])
    indices = [example_index(n, len(TASK), 42) for n in (7, 20_007)]
    assert [index for index, _ in seen] == [indices[0]] * 3 + [indices[1]] * 3
    for group, index in zip(groups, indices):
        assert group.prompt.tolist() == TOKENIZER.render_for_completion(TASK.example(index))
        assert group.version == 3
        for sample in group.samples:
            assert sample.reward == len(sample.text) / 100
            assert sample.problem == ("timeout" if "q" in sample.text else "")
            assert 1 <= len(sample.tokens) <= 12
    assert [s.text for group in groups for s in group.samples] == [text for _, text in seen]


def test_logprobs_are_of_the_truncated_distribution(settings: SamplerSettings) -> None:
    model = tiny(sequence_len=256, n_layer=2)
    settings = replace(settings, temperature=0.7, top_k=5)
    for group in opened(settings, model).sample([11]):
        for sample in group.samples:
            whole = [*group.prompt.tolist(), *sample.tokens.tolist()]
            logits_TV = full_logits(model, whole)[len(group.prompt) - 1 : -1]
            top = torch.topk(logits_TV / 0.7, 5)
            for t, token in enumerate(sample.tokens.tolist()):
                kept = top.indices[t].tolist()
                wanted = top.values[t].log_softmax(-1)[kept.index(token)]
                assert abs(float(wanted) - sample.logprobs[t]) < 1e-4


def test_a_tool_call_is_answered_and_its_output_marked_as_forced(
    settings: SamplerSettings,
) -> None:
    begin, call, call_end, after, end = (
        TOKENIZER.special_id(f"<|{name}|>")
        for name in ("assistant_start", "python_start", "python_end", "output_end", "assistant_end")
    )
    model = scripted([begin, call, *b"2*3", call_end])
    with torch.no_grad():  # after the output, the end
        model.lm_head.weight[end] += model.transformer["wte"].weight[after] / 4
    settings = replace(settings, model=model.config.to_dict(), top_k=1, num_samples=2)
    # The script's model has a context of 64, too short for most questions.
    short = [n for n in range(200) if len(_prompt(n)) <= 48][:1]
    (group,) = opened(settings, model).sample(short)
    for sample in group.samples:
        shown = TOKENIZER.decode(sample.tokens.tolist())
        assert shown == (
            "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|><|assistant_end|>"
        )
        assert sample.mask.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 1]
        assert (sample.logprobs[5:8] == 0).all()
        assert sample.finish_reason == "stop"
        assert sample.text == ""


def _prompt(number: int) -> list[int]:
    return TOKENIZER.render_for_completion(TASK.example(example_index(number, len(TASK), 42)))


def test_weights_that_come_in_mid_bundle_mark_the_tokens_after_them(
    settings: SamplerSettings,
) -> None:
    model = tiny(sequence_len=256, n_layer=2)
    settings = replace(settings, max_new_tokens=60, num_samples=6, top_k=0)
    sampler = opened(settings, model)
    reached = threading.Event()
    step = sampler._engine.step

    def slow_step() -> bool:
        if sampler._engine.stats()["decode_steps"] == 5:
            reached.set()
            loaded.wait(10)
        return step()

    sampler._engine.step = slow_step  # type: ignore[method-assign]
    loaded = threading.Event()
    found: list[Group] = []
    thread = threading.Thread(target=lambda: found.extend(sampler.sample([0, 1])))
    thread.start()
    assert reached.wait(20)
    telling = threading.Thread(
        target=lambda: sampler.load_weights(flat.pack(model.state_dict()), version=1)
    )
    telling.start()
    while not sampler._engine._inbox:
        pass
    loaded.set()
    telling.join(20)
    thread.join(60)
    assert sampler.version == 1
    for group in found:
        assert group.version == 0
        for sample in group.samples:
            assert (np.diff(sample.versions) >= 0).all()
    assert {v for g in found for s in g.samples for v in s.versions.tolist()} == {0, 1}


def test_a_prompt_without_room_is_named(settings: SamplerSettings) -> None:
    model = tiny(sequence_len=8, n_layer=2)
    sampler = opened(replace(settings, model=model.config.to_dict()), model)
    with pytest.raises(NanorayError, match=r"example \d+ of arithmetic is \d+ tokens long"):
        sampler.sample([0])


def test_a_broken_model_is_no_users_mistake(settings: SamplerSettings) -> None:
    model = tiny(sequence_len=256, n_layer=2)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        opened(settings, model).sample([0])


def test_weights_of_another_model_are_refused(settings: SamplerSettings) -> None:
    sampler = opened(settings)
    with pytest.raises(NanorayError, match="do not fit"):
        sampler.load_weights(flat.pack(tiny(sequence_len=256, n_layer=3).state_dict()), 1)
    assert sampler.version == 0


def test_every_epoch_asks_everything_once_in_an_order_of_its_own() -> None:
    epochs = [[example_index(e * 50 + i, 50, seed=7) for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [example_index(i, 50, seed=8) for i in range(50)]
    assert epochs[0][:5] == [example_index(i, 50, seed=7) for i in range(5)]


def test_seeds_do_not_change_between_processes_or_versions() -> None:
    assert draw_seed(42, 0) == 705804573497997020
    assert len({draw_seed(seed, number) for seed in range(20) for number in range(200)}) == 4000


@pytest.mark.slow
def test_opened_from_its_settings_it_judges_in_a_process_of_its_own(
    settings: SamplerSettings,
) -> None:
    sampler = settings.open()
    sampler.load_weights(flat.pack(tiny(sequence_len=256, n_layer=2).state_dict()), 0)
    (group,) = sampler.sample([3])
    assert group.rewards.tolist() == [0, 0, 0]
    assert [sample.problem for sample in group.samples] == [""] * 3
