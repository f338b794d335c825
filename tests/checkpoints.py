"""Checkpoints whose every number is known, and a process that saves them until it is killed."""

from __future__ import annotations

import os
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nanoray import storage
from nanoray.checkpoint import Checkpoint, open_latest, step_dir
from nanoray.checkpoint.writer import CheckpointWriter, Snapshot
from nanoray.optim.buckets import StateShard

# (parameter, state) -> shape and dtype of the whole state. Names may hold what they like.
STATES: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]] = {
    ("transformer.h.0/attn@1.c_q.weight", "momentum"): ((7, 4), torch.float32),
    ("transformer.h.0/attn@1.c_q.weight", "second_moment"): ((1, 4), torch.float32),
    ("transformer.wte.weight", "exp_avg"): ((11, 3), torch.bfloat16),
    ("transformer.wte.weight", "exp_avg_sq"): ((11, 3), torch.float64),
    ("transformer.wte.weight", "step"): ((1,), torch.float32),
    ("grüße λ", "exp_avg"): ((5,), torch.float32),
    ("smear_lambda", "step"): ((), torch.float32),
}


def whole_state(key: tuple[str, str], step: int, version: int = 0) -> Tensor:
    """The value of a state: integers that differ between keys, steps and versions."""
    shape, dtype = STATES[key]
    first = zlib.crc32(repr((key, step, version)).encode()) % 100
    return (
        (torch.arange(first, first + max(1, torch.Size(shape).numel())) % 250).to(dtype).view(shape)
    )


def even_cuts(num_rows: int, world_size: int) -> list[int]:
    """Row boundaries of the ranks; a rank may own nothing."""
    share = -(-num_rows // world_size)
    return [min(rank * share, num_rows) for rank in range(world_size + 1)]


Cuts = Callable[[int, int], Sequence[int]]


def owned_shards(
    step: int, rank: int, world_size: int, version: int = 0, cuts: Cuts = even_cuts
) -> Iterator[StateShard]:
    for key in STATES:
        tensor = whole_state(key, step, version)
        if tensor.dim() == 0:
            if rank == 0:
                yield StateShard(*key, 0, 1, 1, tensor)
            continue
        num_rows = tensor.shape[0]
        start, stop = cuts(num_rows, world_size)[rank : rank + 2]
        if start < stop:
            yield StateShard(*key, start, stop, num_rows, tensor[start:stop].clone())


def model_weights(step: int, version: int = 0) -> dict[str, Tensor]:
    # Large enough that a kill may hit the writing of it.
    return {
        "transformer.wte.weight": torch.full((300, 300), step + version / 8),
        "lm_head/x.weight": torch.full((3, 2), step, dtype=torch.bfloat16),
        "lambda": torch.tensor(float(version)),
    }


def make_snapshot(
    step: int, rank: int, world_size: int, version: int = 0, cuts: Cuts = even_cuts
) -> Snapshot:
    first = rank == 0
    return Snapshot(
        step=step,
        optimizer=list(owned_shards(step, rank, world_size, version, cuts)),
        model=model_weights(step, version) if first else None,
        meta={"step": step, "version": version} if first else None,
        files={"tokenizer.json": b'{"kind": "byte"}'} if first else None,
    )


def make_writers(
    root: str,
    world_size: int = 1,
    keep: int = 2,
    attempt: str = "a",
    guard: Callable[[], None] = lambda: None,
) -> list[CheckpointWriter]:
    return [
        CheckpointWriter(
            root, rank=rank, world_size=world_size, attempt=attempt, keep=keep, guard=guard
        )
        for rank in range(world_size)
    ]


def save_step(
    writers: Sequence[CheckpointWriter], step: int, version: int = 0, cuts: Cuts = even_cuts
) -> None:
    """Save on all ranks at once, and wait. The last rank starts first."""
    for rank, writer in reversed(list(enumerate(writers))):
        writer.save(make_snapshot(step, rank, len(writers), version, cuts))
    for writer in reversed(writers):
        writer.wait()


def assert_content(checkpoint: Checkpoint) -> None:
    """Every number of the checkpoint is what was saved at its step."""
    step, version = checkpoint.meta["step"], checkpoint.meta["version"]
    assert step == checkpoint.step
    assert checkpoint.file("tokenizer.json") == b'{"kind": "byte"}'
    weights = checkpoint.model_state()
    expected = model_weights(step, version)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
        assert weights[name].dtype == weight.dtype
    for key in STATES:
        state = whole_state(key, step, version)
        num_rows = state.shape[0] if state.dim() else 1
        found = checkpoint.optimizer_rows(*key, 0, num_rows)
        assert torch.equal(found, state), key
        assert found.dtype == state.dtype


def new_bucket() -> str:
    return f"memory://bucket-{uuid.uuid4().hex[:8]}/checkpoints"


def no_warning(message: str) -> None:
    raise AssertionError(message)


def assert_latest(root: str, step: int | None, warn: Callable[[str], None] = no_warning) -> None:
    """The latest checkpoint is that of a step (None: there is none), and right throughout."""
    latest = open_latest(root, warn)
    if step is None:
        assert latest is None
        return
    assert latest is not None
    with latest:
        assert latest.step == step
        assert_content(latest)


def names(root: str, step: int) -> list[str]:
    return storage.list_names(step_dir(root, step))


def save_for_ever(root: str, first_step: int) -> None:
    """Save step after step, each twice with different numbers, as two workers."""
    writers = make_writers(root, world_size=2, attempt=str(first_step))
    for step in range(first_step, 10**6):
        for version in range(2):
            save_step(writers, step, version)
        print("saved", step, flush=True)


def serve() -> None:
    """Run each line of Python from stdin in a forked child: torch is imported only once."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            exec(line)
            sys.stdout.flush()
            os._exit(0)
        print("pid", child, flush=True)
        os.waitpid(child, 0)
        print("end", flush=True)


if __name__ == "__main__":
    serve()
