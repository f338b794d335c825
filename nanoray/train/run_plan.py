"""What every training run is planned as: plain values that are settled before a worker starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from nanoray import storage
from nanoray.config import parse_worker_range
from nanoray.data.blocks import Stream
from nanoray.data.plan import Layout, layout
from nanoray.errors import NanorayError
from nanoray.model.config import GPTConfig
from nanoray.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class RunPlan(ABC):
    """Everything that the loop and Ray's side of it need, whatever is trained on.

    What a subclass works out at length is a cached property: not part of the plan's values.

    Attributes:
        config: the flags, resolved.
        model: the values of a `GPTConfig`.
        weight_decay: Muon's, scaled.
        num_iterations: the horizon in steps.
    """

    stage: ClassVar[str]
    # What a resumed run must find as it was, and its name in messages.
    FIXED: ClassVar[dict[str, str]] = {
        "tokenizer_fingerprint": "tokenizer",
        "model": "model",
        "num_iterations": "number of steps",
    }

    # Of these, what follows from flags: where a flag differs, that says it all.
    FOLLOWS_FLAGS: ClassVar[frozenset[str]] = frozenset()

    config: dict[str, Any]
    run: str
    run_dir: str
    model: dict[str, Any]
    tokenizer_dir: str
    tokenizer_fingerprint: str
    num_iterations: int
    weight_decay: float
    flops_per_token: int
    num_parameters: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def with_config(self, **changes: Any) -> Self:
        """The same plan with some flags changed."""
        return replace(self, config=self.config | changes)

    @property
    def model_config(self) -> GPTConfig:
        return GPTConfig.from_dict(self.model)

    @property
    def checkpoints_dir(self) -> str:
        return storage.join(self.run_dir, "checkpoints")

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer of the plan.

        Raises:
            NanorayError: there is none, or another one has come in its place.
        """
        tokenizer = load_tokenizer(self.tokenizer_dir)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise NanorayError(
                f"the tokenizer in {self.tokenizer_dir} has changed since run {self.run} was "
                f"planned; put it back and run the same command again, or take another --run"
            )
        return tokenizer

    def prepare(self) -> None:  # noqa: B027 - not every stage has something to write
        """Write what workers read of the plan; the run's lease is held."""

    @abstractmethod
    def describe(self) -> list[str]:
        """The plan for a person, a line each."""

    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Paths and URIs that are read on all nodes."""

    @abstractmethod
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch, at most: what activations grow with."""


@dataclass(frozen=True)
class StreamRunPlan(RunPlan):
    """A `RunPlan` whose steps are rows of a stream.

    Attributes:
        total_batch_size: tokens of a step, over all workers.
    """

    total_batch_size: int

    @property
    def sequence_len(self) -> int:
        """T, the tokens of a row."""
        return int(self.config["max_seq_len"])

    @property
    def layout(self) -> Layout:
        return layout(self.total_batch_size // self.sequence_len, self.sequence_len)

    def micro_rows(self, world_size: int) -> int:
        """Rows of a micro-batch: the device's, or a worker's whole share where that is less."""
        share = -(-self.layout.stripes // world_size) * self.layout.stripe_rows
        return min(int(self.config["device_batch_size"]), share)

    def micro_tokens(self) -> int:
        low, _high = parse_worker_range(self.config["num_workers"])
        return self.micro_rows(low) * self.sequence_len

    @abstractmethod
    def stream(self, tokenizer: Tokenizer) -> Stream:
        """What is trained on."""

    @abstractmethod
    def unit_bytes(self) -> int:
        """Bytes that one packing task reads, at most."""
