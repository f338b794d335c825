"""Bits per byte on the validation shard, on the same rows for any number of workers."""

from __future__ import annotations

import threading

import numpy as np

from nanoray.data.plan import validation_rows
from nanoray.evals.bpb import bits_and_bytes
from nanoray.model.gpt import GPT
from nanoray.tokenizer import Tokenizer
from nanoray.train.plan import PretrainPlan
from nanoray.train.world import World


class Validation:
    """The validation budget, tokenized by a thread beside the first steps, not before them."""

    def __init__(self, plan: PretrainPlan, tokenizer: Tokenizer, world: World) -> None:
        self._plan, self._tokenizer, self._world = plan, tokenizer, world
        self._token_bytes = tokenizer.token_bytes()
        self._rows: np.ndarray | Exception | None = None
        self._thread = threading.Thread(target=self._load, name="validation", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            self._rows = validation_rows(
                self._plan.validation_row_groups(),
                self._tokenizer,
                sequence_len=self._plan.model_config.sequence_len,
                num_tokens=self._plan.config["eval_tokens"],
                on_bad=self._plan.config["on_bad_shard"],
            )
        except Exception as error:  # raised again in the training thread
            self._rows = error

    def bits_per_byte(self, model: GPT) -> float:
        """The model's bits per byte; called by all workers together.

        Raises:
            NanorayError: bad data in the validation shard.
        """
        self._thread.join()
        if isinstance(self._rows, Exception):
            raise self._rows
        assert self._rows is not None
        world = self._world
        model.eval()
        bits, num_bytes = bits_and_bytes(
            lambda inputs, targets: model(inputs, targets, reduction="none"),
            self._rows[world.rank :: world.size],
            self._token_bytes,
            self._plan.micro_rows(world.size),
            world.device,
        )
        model.train()
        bits = world.sum_float(bits)
        (num_bytes,) = world.sum_ints([num_bytes])
        return bits / num_bytes
