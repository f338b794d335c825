"""Which problem a number asks, how it is put, and the seed of its answers. No torch."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nanoray.data.packing import permutation
from nanoray.errors import NanorayError
from nanoray.tasks.base import Task
from nanoray.tokenizer import Tokenizer


def prompt_ids(task: Task, index: int, tokenizer: Tokenizer, max_len: int) -> list[int]:
    """What asks example ``index``. Raises NanorayError: it is longer than ``max_len``."""
    prompt = tokenizer.render_for_completion(task.example(index))
    if len(prompt) > max_len:
        raise NanorayError(
            f"example {index} of {task.name} is {len(prompt)} tokens long, and the model's context "
            f"{max_len}; take shorter problems, or a model with a longer context"
        )
    return prompt


def example_index(number: int, num_examples: int, seed: int) -> int:
    """Which example a prompt number asks: every epoch is a permutation of its own."""
    epoch, place = divmod(number, num_examples)
    return int(_order(num_examples, seed, epoch)[place])


@lru_cache(maxsize=2)  # a bundle may lie across the end of an epoch
def _order(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return permutation(num_examples, (seed, epoch))


def draw_seed(seed: int, number: int) -> int:
    """64 bits for the draws of a prompt's samples (the engine adds the sample's own number)."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
