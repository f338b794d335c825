"""The workers of a run as seen by one of them; a world of one needs no process group."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Gathered = TypeVar("Gathered")


@dataclass(frozen=True)
class World:
    """Rank and size, and the few collectives that the loop needs."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def peak_memory_bytes(self) -> int:
        """The most that this worker has held so far: of its GPU, or of the process's memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def sum_float(self, value: torch.Tensor | float) -> float:
        """Sum of a scalar over the workers, in float64."""
        if isinstance(value, torch.Tensor) and value.device.type == "mps":
            value = float(value)  # MPS has no float64
        total = torch.as_tensor(value, dtype=torch.float64, device=self._reduce_device)
        if self.size > 1:
            dist.all_reduce(total)
        return float(total.item())

    def sum_ints(self, values: list[int]) -> list[int]:
        """Element-wise sums modulo 2⁶⁴ (as signed 64-bit integers)."""
        signed = [(v + 2**63) % 2**64 - 2**63 for v in values]
        total = torch.tensor(signed, dtype=torch.int64, device=self._reduce_device)
        if self.size > 1:
            dist.all_reduce(total)
        return [int(v) for v in total.tolist()]

    def max_int(self, value: int) -> int:
        largest = torch.tensor(value, dtype=torch.int64, device=self._reduce_device)
        if self.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def gather(self, value: Gathered) -> list[Gathered]:
        """Every worker's value, on every worker. For rare moments: it pickles (our own data)."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    @property
    def _reduce_device(self) -> torch.device:
        # float64 and int64 reductions work on NCCL and gloo; MPS has no process group.
        return self.device if self.device.type == "cuda" else torch.device("cpu")
