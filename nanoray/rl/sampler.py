"""Answers to bundles of prompts: one engine, its task, and the rewards. No Ray.

The groups of a bundle are a function of (weights, bundle, seed) alone, bitwise: a bundle's requests
go at once to an engine that has nothing cached, a fixed number of threads computes, and the seed of
a sample hangs on the prompt's number and its own. (Weights that are changed in mid-bundle are an
exception, which asynchronous runs want.)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanoray.engine import Completion, Engine, SamplingParams
from nanoray.evals.chat import answer_text
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.model.heap import keep_freed_memory
from nanoray.model.precision import pick_compute_dtype, reserved_device
from nanoray.rl import flat
from nanoray.rl.groups import Group, Sample
from nanoray.rl.prompts import draw_seed, example_index, prompt_ids
from nanoray.rl.reward_worker import TaskReward
from nanoray.rl.rewards import Reward, RewardPool
from nanoray.tasks.catalog import load_task
from nanoray.tokenizer import load_tokenizer
from nanoray.tools import calculate

# (index of the example, text of the answer) -> their rewards.
Judge = Callable[[Sequence[tuple[int, str]]], Sequence[Reward]]


@dataclass(frozen=True)
class SamplerSettings:
    """Plain values, from which any process makes the same sampler.

    Attributes:
        model: the model's configuration, `GPTConfig.to_dict`.
        tokenizer_dir: folder or URI of its tokenizer.
        problems: the task that asks and rewards.
        num_samples: answers to each prompt.
        max_new_tokens: of an answer; fewer where the context ends.
        temperature, top_k: see `SamplingParams`.
        seed: of all draws, and of the order of the problems.
        num_threads: of torch.
        on_gpu: a GPU, or a part of one, is reserved for the sampler.
        dtype: of matmuls: "auto", "float32", "bfloat16".
        num_slots: most answers that are decoded together.
        reward_workers, reward_deadline_s: see `RewardPool`.
    """

    model: dict[str, Any]
    tokenizer_dir: str
    problems: TaskReward
    num_samples: int
    max_new_tokens: int
    temperature: float
    top_k: int
    seed: int
    num_threads: int
    on_gpu: bool = False
    dtype: str = "auto"
    num_slots: int = 64
    reward_workers: int = 1
    reward_deadline_s: float = 15.0

    def open(self) -> Sampler:
        """To be called in a process of the sampler's own.

        Raises:
            NanorayError: the task's data or the tokenizer cannot be had.
        """
        keep_freed_memory()
        rewards = RewardPool(self.problems, self.reward_workers, self.reward_deadline_s)
        sampler = Sampler(self, rewards.judge)
        # What is there by now stays: looking through it for garbage takes 150 ms again and again.
        gc.collect()
        gc.freeze()
        return sampler


class Sampler:
    """Has no weights until `load_weights`. One thread samples; another one may load weights."""

    def __init__(self, settings: SamplerSettings, judge: Judge) -> None:
        torch.set_num_threads(settings.num_threads)
        problems = settings.problems
        self._settings = settings
        self._judge = judge
        self._task = load_task(problems.name, problems.split, problems.sources)
        self._tokenizer = load_tokenizer(settings.tokenizer_dir)
        device = reserved_device(settings.on_gpu)
        model = GPT(GPTConfig.from_dict(settings.model), pick_compute_dtype(device, settings.dtype))
        self._engine = Engine(
            model.place(device).eval(),  # its weights are whatever lay in memory
            self._tokenizer,
            num_slots=settings.num_slots,
            tool=calculate,
            version=-1,
        )

    @property
    def version(self) -> int:
        """Of the weights in use; -1: none yet."""
        return int(self._engine.stats()["version"])

    def load_weights(self, buffer: NDArray[np.uint8], version: int) -> None:
        """Go on with other weights (`flat.pack`), a bundle under way included.

        Raises:
            NanorayError: they are not this model's.
        """
        torch.set_num_threads(self._settings.num_threads)  # threads have each their own
        self._engine.load_weights(flat.unpack(buffer), version)

    def sample(self, numbers: Sequence[int]) -> list[Group]:
        """A group for each prompt number, in their order.

        Raises:
            NanorayError: a prompt leaves no room for an answer.
            RuntimeError: the engine or the rewards' processes failed; another one may do better.
        """
        assert self.version >= 0, "there are no weights yet"
        torch.set_num_threads(self._settings.num_threads)
        self._engine.forget()
        indices = [example_index(n, len(self._task), self._settings.seed) for n in numbers]
        prompts = [
            prompt_ids(self._task, index, self._tokenizer, self._engine.max_len)
            for index in indices
        ]
        completions = self._engine.generate(prompts, [self._params(n) for n in numbers])
        for completion in completions:
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(completion.error or "the engine was closed")
        texts = [answer_text(self._tokenizer, completion.tokens) for completion in completions]
        N = self._settings.num_samples
        asked = [index for index in indices for _ in range(N)]
        rewards = self._judge(list(zip(asked, texts)))
        samples = [_sample(*answer) for answer in zip(completions, texts, rewards, strict=True)]
        return [
            Group(number, np.array(prompt, dtype=np.int32), tuple(samples[i * N : (i + 1) * N]))
            for i, (number, prompt) in enumerate(zip(numbers, prompts))
        ]

    def _params(self, number: int) -> SamplingParams:
        settings = self._settings
        return SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=draw_seed(settings.seed, number),
            n=settings.num_samples,
            max_tokens=settings.max_new_tokens,
        )


def _sample(completion: Completion, text: str, reward: Reward) -> Sample:
    return Sample(
        tokens=np.array(completion.tokens, dtype=np.int32),
        mask=np.array(completion.mask, dtype=np.uint8),
        logprobs=np.array(completion.sampled_logprobs, dtype=np.float32),
        versions=np.array(completion.versions, dtype=np.int32),
        finish_reason=completion.finish_reason,
        text=text,
        reward=reward.value,
        problem=reward.problem,
        detail=reward.detail,
    )
