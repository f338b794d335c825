"""Bits per byte on text that is held out, on the same rows for any number of workers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from nanoray.evals.bpb import bits_and_bytes
from nanoray.model.gpt import GPT
from nanoray.train.world import World

# Rows [n, T+1], and [n, T+1] with 0 where an id is no target (None: all are).
HeldOut = tuple[np.ndarray, np.ndarray | None]


class Validation:
    """Held-out rows, made by a thread beside the first steps, not before them.

    Args:
        load: makes them; None: there is nothing to validate on.
        token_bytes: [vocab] bytes of each token.
        micro_rows: rows of a forward pass.
    """

    def __init__(
        self,
        load: Callable[[], HeldOut | None],
        token_bytes: np.ndarray,
        micro_rows: int,
        world: World,
    ) -> None:
        self._token_bytes, self._micro_rows, self._world = token_bytes, micro_rows, world
        self._loaded: HeldOut | Exception | None = None
        self._thread = threading.Thread(
            target=self._load, args=(load,), name="validation", daemon=True
        )
        self._thread.start()

    def _load(self, load: Callable[[], HeldOut | None]) -> None:
        try:
            self._loaded = load()
        except Exception as error:  # raised again in the training thread
            self._loaded = error

    def bits_per_byte(self, model: GPT) -> float | None:
        """The model's bits per byte, if anything is held out; called by all workers together.

        Raises:
            NanorayError: what is held out is bad.
        """
        self._thread.join()
        if isinstance(self._loaded, Exception):
            raise self._loaded
        if self._loaded is None:
            return None
        rows, trained = self._loaded
        world = self._world
        mine = slice(world.rank, None, world.size)
        model.eval()
        bits, num_bytes = bits_and_bytes(
            lambda inputs, targets: model(inputs, targets, reduction="none"),
            rows[mine],
            self._token_bytes,
            self._micro_rows,
            world.device,
            None if trained is None else trained[mine],
        )
        model.train()
        bits = world.sum_float(bits)
        (num_bytes,) = world.sum_ints([num_bytes])
        return bits / num_bytes
