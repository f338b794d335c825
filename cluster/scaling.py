"""What a step of training asks of a cluster: computes the tables of docs/scaling.md.

    python cluster/scaling.py            # prints the tables
    python cluster/scaling.py --write    # puts them into docs/scaling.md

The optimiser's own layout is built for the world size, on the meta device: bytes are counted, not
estimated. Times follow from the assumptions below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from nanoray import laws
from nanoray.config import RECIPES, PretrainConfig
from nanoray.data.plan import Layout, layout
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.optim.buckets import Bucket, MuonBucket, MuonKernels, Ranks, ShardedBucket
from nanoray.optim.groups import build_groups
from nanoray.optim.layout import build_buckets
from nanoray.optim.muon import MUON_FORMS, POLAR_EXPRESS_COEFFICIENTS
from nanoray.train.plan import model_config

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- made by cluster/scaling.py -->", "<!-- end -->"
DEPTHS, WORLD_SIZES = (12, 20, 32), (8, 64, 512)
VOCAB_SIZE = 32768
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """What one worker's share of a machine does in a second.

    Attributes:
        flops: of forward and backward, as `GPTConfig.flops_per_token` counts them.
        muon_flops: of Muon's products of matrices.
        sent_bytes: what it sends in a collective.
    """

    flops: float
    muon_flops: float
    sent_bytes: float


# Assumed: H100 at 40 % of its bf16 peak; what a GPU sends within a node, and over its share of the
# network; what a node writes to an object store.
GPU_IN_NODE = Machine(0.4 * 989e12, 0.4 * 989e12, 300e9)
GPU_IN_NETWORK = replace(GPU_IN_NODE, sent_bytes=40e9)
STORE_BYTES_PER_S = 1e9
# Measured here (bench/RESULTS.md; what a block costs Ray Data: nanoray/data/plan.py).
PACKED_IDS_PER_CORE_S = 4.1e6
SECONDS_PER_BLOCK = 0.04
POLLS_PER_WORKER_S = 2.0  # Ray Train's health check, every .5 s (nanoray/fleet/connect.py)


def buckets_of(config: GPTConfig, world_size: int, dtype: torch.dtype) -> list[Bucket]:
    """The optimiser's buckets of rank 0, without memory behind them."""
    with torch.device("meta"):
        model = GPT(config, compute_dtype=dtype)
    model.place(torch.device("meta"))
    named = dict(model.named_parameters())
    recipe = config.recipe
    groups = build_groups(
        {name: tuple(param.shape) for name, param in named.items()}, recipe,
        embedding_lr=1, unembedding_lr=1, matrix_lr=1, scalar_lr=1, weight_decay=0,
        width=config.n_embd, batch_tokens=laws.REFERENCE_BATCH_TOKENS,
    )  # fmt: skip
    kernels = MuonKernels(form=MUON_FORMS[recipe], polar_dtype=dtype)
    return build_buckets(named, groups, Ranks(None, 0, world_size), kernels)


def step_payload_bytes(buckets: Sequence[Bucket]) -> tuple[int, int, int]:
    """Sizes of what a step reduce-scatters, all-gathers and all-reduces; bytes, padding included.

    A ring of W workers has each send (W-1)/W of the first two, and twice that of the third.
    """
    sharded = [bucket for bucket in buckets if isinstance(bucket, ShardedBucket)]
    rest = [bucket for bucket in buckets if not isinstance(bucket, ShardedBucket)]
    return (
        sum(bucket.grad_buffer.nbytes for bucket in sharded),
        sum(bucket.param_buffer.nbytes for bucket in sharded),
        sum(bucket.grad_buffer.nbytes for bucket in rest),
    )


def muon_flops(buckets: Sequence[Bucket]) -> float:
    """Of the products in `polar_express`, for the matrices that these buckets' rank owns."""
    flops = 0
    for bucket in buckets:
        if isinstance(bucket, MuonBucket):
            short, long = sorted(bucket.param_buffer.shape[1:])
            owned = bucket.owned.stop - bucket.owned.start
            flops += owned * (4 * short**2 * long + 2 * short**3)
    return len(POLAR_EXPRESS_COEFFICIENTS) * flops


def ring_bytes(payload: tuple[int, int, int], world_size: int) -> float:
    """What each worker of a ring sends for such a payload."""
    scattered, gathered, reduced = payload
    return (scattered + gathered + 2 * reduced) * (world_size - 1) / world_size


@dataclass(frozen=True)
class Dial:
    """What a depth says by itself: the model, its batch and its size on disk."""

    model: GPTConfig
    rows_per_step: int
    checkpoint_bytes: int
    payload_bytes: int

    @classmethod
    def at(cls, depth: int) -> Dial:
        flags = PretrainConfig.parse([f"--depth={depth}"], "cluster/scaling.py")
        model = model_config(flags, depth, VOCAB_SIZE)
        scaled = laws.scale(
            lambda other: model_config(flags, other, VOCAB_SIZE).num_scaling_parameters(),
            depth,
            ratio=RECIPES[flags.recipe]["target_param_data_ratio"],
            weight_decay=0.0,
        )
        return cls.of(model, scaled.batch_tokens // model.sequence_len)

    @classmethod
    def of(cls, model: GPTConfig, rows_per_step: int) -> Dial:
        """A model and batch of one's own."""
        alone = buckets_of(model, 1, torch.bfloat16)
        states = sum(shard.tensor.nbytes for bucket in alone for shard in bucket.states())
        weights = sum(member.param.nbytes for bucket in alone for member in bucket.members)
        return cls(model, rows_per_step, states + weights, sum(step_payload_bytes(alone)[:2]))


@dataclass(frozen=True)
class Estimate:
    """One model on so many workers; seconds and bytes are of one step."""

    dial: Dial
    world_size: int
    machine: Machine

    @classmethod
    def on_gpus(cls, dial: Dial, world_size: int) -> Estimate:
        return cls(dial, world_size, GPU_IN_NODE if world_size <= GPUS_PER_NODE else GPU_IN_NETWORK)

    @cached_property
    def _buckets(self) -> list[Bucket]:
        return buckets_of(self.dial.model, self.world_size, torch.bfloat16)

    @cached_property
    def payload(self) -> tuple[int, int, int]:
        return step_payload_bytes(self._buckets)

    @property
    def sent_bytes(self) -> float:
        return ring_bytes(self.payload, self.world_size)

    @property
    def padding(self) -> float:
        """Of what is sent, as a multiple of the parameters' own bytes."""
        return sum(self.payload[:2]) / self.dial.payload_bytes

    @cached_property
    def busy_workers(self) -> int:
        """Those that get a stripe of the step at all."""
        return min(self.world_size, self._layout.stripes)

    @property
    def compute_s(self) -> float:
        """Of the worker with the most stripes."""
        rows = -(-self._layout.stripes // self.world_size) * self._layout.stripe_rows
        tokens = rows * self.dial.model.sequence_len
        return tokens * self.dial.model.flops_per_token() / self.machine.flops

    @property
    def optimizer_s(self) -> float:
        """Muon's products, of the first worker; nobody has more."""
        return muon_flops(self._buckets) / self.machine.muon_flops

    @property
    def communication_s(self) -> float:
        return self.sent_bytes / self.machine.sent_bytes

    @property
    def step_s(self) -> float:
        """As if nothing of the communication hid behind the computing: the worst case."""
        return self.compute_s + self.optimizer_s + self.communication_s

    @property
    def tokens_per_s(self) -> float:
        return self.dial.rows_per_step * self.dial.model.sequence_len / self.step_s

    @property
    def efficiency(self) -> float:
        """Against all workers computing the model all the time."""
        useful = self.tokens_per_s * self.dial.model.flops_per_token()
        return useful / (self.world_size * self.machine.flops)

    @property
    def packing_cores(self) -> float:
        return self.tokens_per_s / PACKED_IDS_PER_CORE_S

    @property
    def store_bytes_per_s(self) -> float:
        """Rows of uint16 ids that go through the object store."""
        return self.tokens_per_s * 2

    @property
    def driver_load(self) -> float:
        """Share of a core that Ray Data's driver spends on blocks."""
        tokens = self._layout.rows_per_block * self.dial.model.sequence_len
        return self.tokens_per_s / tokens * SECONDS_PER_BLOCK

    @property
    def polls_per_s(self) -> float:
        return self.world_size * POLLS_PER_WORKER_S

    @property
    def checkpoint_s(self) -> float:
        """Every worker writes its own part, the first one the weights as well: all nodes."""
        nodes = -(-self.world_size // GPUS_PER_NODE)
        weights = self.dial.model.num_parameters_by_group()["total"] * 4
        share = (self.dial.checkpoint_bytes - weights) / nodes
        return (weights + share) / STORE_BYTES_PER_S

    @property
    def _layout(self) -> Layout:
        return layout(self.dial.rows_per_step, self.dial.model.sequence_len)


def tables() -> str:
    """The document's tables, in Markdown."""
    dials = {depth: Dial.at(depth) for depth in DEPTHS}
    rows = [
        (depth, Estimate.on_gpus(dials[depth], size)) for depth in DEPTHS for size in WORLD_SIZES
    ]
    step = _table(
        "model|GPUs|with work|sent a GPU|padding|compute|Muon|communication|tokens/s|efficiency",
        [
            f"d{depth}|{e.world_size}|{e.busy_workers}|{e.sent_bytes / 1e9:.2f} GB|"
            f"{e.padding:.2f}×|{e.compute_s * 1e3:,.0f} ms|{e.optimizer_s * 1e3:,.0f} ms|"
            f"{e.communication_s * 1e3:,.0f} ms|"
            f"{e.tokens_per_s / 1e6:.2f} M|{e.efficiency:.0%}"
            for depth, e in rows
        ],
    )
    around = _table(
        "model|GPUs|packing cores|object store|Ray Data's driver|health checks|checkpoint",
        [
            f"d{depth}|{e.world_size}|{e.packing_cores:.2f}|{e.store_bytes_per_s / 1e6:.1f} MB/s|"
            f"{e.driver_load:.0%} of a core|{e.polls_per_s:,.0f}/s|"
            f"{e.dial.checkpoint_bytes / 1e9:.1f} GB in {e.checkpoint_s:.1f} s"
            for depth, e in rows
        ],
    )
    return f"{step}\n\n{around}"


def _table(head: str, rows: Sequence[str]) -> str:
    width = head.count("|") + 1
    lines = [head, "|".join(["---"] * width), *rows]
    return "\n".join("| " + line.replace("|", " | ") + " |" for line in lines)


def with_tables(document: str) -> str:
    """The document with the tables as they are now."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python cluster/scaling.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into docs/{DOCUMENT.name}")
    if parser.parse_args(argv).write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
