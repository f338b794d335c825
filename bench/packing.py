"""Speed of reading, tokenizing and packing on one thread, in ids of finished rows per second.

    python -m bench.packing [--data DIR] [--nanochat DIR] [--rounds 5]

With a checkout of nanochat its own loader runs on the same shards with the same vocabulary, turn
by turn in this process. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow.parquet as pq

from nanoray.data.shards import list_shards, row_groups
from nanoray.data.units import list_units, pack_unit
from nanoray.tokenizer import BPETokenizer, train_tokenizer

DEFAULT_DATA = Path(__file__).parents[1].parent / "shared" / "data" / "pretrain"
VOCAB_SIZE = 32_768
# A turn of one loader: enough that a clock's tick does not matter, and 5 rounds take a minute.
IDS_PER_TURN = 1_500_000
# nanochat's loader: a batch of this many ids, as on a laptop.
NANOCHAT_BATCH_IDS = 16_384

Turn = Callable[[], tuple[int, float]]


def train_texts(shards: list[str]) -> Iterator[str]:
    for shard in shards:
        yield from pq.read_table(shard).column("text").to_pylist()


def nanoray_turn(shards: list[str], tokenizer: BPETokenizer, T: int, cropped: list[int]) -> Turn:
    """One turn packs units until it has its ids; `cropped` sums [lost tokens, all tokens]."""
    units = list_units(row_groups(shards))
    position = 0

    def turn() -> tuple[int, float]:
        nonlocal position
        num_ids = 0
        begin = time.perf_counter()
        while num_ids < IDS_PER_TURN:
            packed = pack_unit(units[position % len(units)], tokenizer, T, 0, "fail")
            position += 1
            num_ids += packed.rows.size
            cropped[0] += packed.tokens_cropped
            cropped[1] += packed.tokens_in
        return num_ids, time.perf_counter() - begin

    return turn


def nanochat_turn(tokenizer: BPETokenizer, T: int, cropped: list[int]) -> Turn:
    """The same with nanochat's loader, its buffer filled beforehand."""
    import tiktoken
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
    from nanochat.tokenizer import RustBPETokenizer

    class Counting(RustBPETokenizer):
        encoded = 0

        def encode(self, text: Any, **options: Any) -> Any:
            documents = super().encode(text, **options)
            self.encoded += sum(map(len, documents))
            return documents

    ranks = {tokenizer.decode_bytes([rank]): rank for rank in range(tokenizer.bos_id)}
    encoding = tiktoken.Encoding(
        "nanochat",
        pat_str=tokenizer.pattern,
        mergeable_ranks=ranks,
        special_tokens=tokenizer.special_tokens,
    )
    counting = Counting(encoding, "<|bos|>")
    batch_rows = max(1, NANOCHAT_BATCH_IDS // T)
    loader = tokenizing_distributed_data_loader_bos_bestfit(
        counting, batch_rows, T, split="train", tokenizer_threads=1, device="cpu"
    )
    next(loader)

    def turn() -> tuple[int, float]:
        encoded_before = counting.encoded
        num_ids = 0
        begin = time.perf_counter()
        while num_ids < IDS_PER_TURN:
            next(loader)
            num_ids += batch_rows * (T + 1)
        elapsed_s = time.perf_counter() - begin
        # The buffer holds 1,000 documents before and after, so the rest was thrown away.
        cropped[0] += counting.encoded - encoded_before - num_ids
        cropped[1] += counting.encoded - encoded_before
        return num_ids, elapsed_s

    return turn


def import_nanochat(checkout: Path, data: Path, base_dir: str) -> None:
    """Make `import nanochat` work and see our shards (the last one is its validation too)."""
    import torch

    torch.set_num_threads(1)
    (Path(base_dir) / "base_data_climbmix").symlink_to(data.resolve())
    os.environ["NANOCHAT_BASE_DIR"] = base_dir
    sys.path.insert(0, str(checkout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of shards")
    parser.add_argument("--nanochat", type=Path, help="checkout of nanochat to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    shards = list_shards(str(args.data))[:-1]
    tokenizer = train_tokenizer(train_texts(shards), VOCAB_SIZE)
    with tempfile.TemporaryDirectory() as base_dir:
        if args.nanochat:
            import_nanochat(args.nanochat, args.data, base_dir)
        result: dict[str, Any] = {"bench": "packing", "vocab_size": VOCAB_SIZE, "threads": 1}
        for T in (512, 2048):
            result[f"T{T}"] = compare(shards, tokenizer, T, args)
    print(json.dumps(result))


def compare(
    shards: list[str], tokenizer: BPETokenizer, T: int, args: argparse.Namespace
) -> dict[str, float]:
    cropped = {"nanoray": [0, 0], "nanochat": [0, 0]}
    turns = {"nanoray": nanoray_turn(shards, tokenizer, T, cropped["nanoray"])}
    if args.nanochat:
        turns["nanochat"] = nanochat_turn(tokenizer, T, cropped["nanochat"])
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for round_number in range(args.rounds):
        for name, turn in turns.items():
            num_ids, elapsed_s = turn()
            speeds[name].append(num_ids / elapsed_s)
            print(f"T={T} round {round_number} {name}: {speeds[name][-1] / 1e6:.2f} M ids/s")
    row: dict[str, float] = {}
    for name in turns:
        row[f"{name}_ids_per_s"] = round(statistics.median(speeds[name]))
        row[f"{name}_cropped_share"] = round(cropped[name][0] / cropped[name][1], 4)
    if args.nanochat:
        row["ratio"] = round(row["nanoray_ids_per_s"] / row["nanochat_ids_per_s"], 2)
    return row


if __name__ == "__main__":
    main()
