"""Conversations packed whole: all of them, once an epoch, the same for any number of workers."""

from __future__ import annotations

import pickle
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.data.blocks import Cursor, StepRows, local_blocks, step_rows
from nanoray.data.conversations import (
    GROUP_SIZE,
    UNIT_TOKENS,
    ConversationStream,
    TrainOn,
    fill,
    held_out_rows,
    lengths_file,
    load_lengths,
    measure,
    pack,
)
from nanoray.data.plan import layout
from nanoray.errors import NanorayError
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.tasks.catalog import Sources
from nanoray.tasks.mixture import MixtureSource
from nanoray.tokenizer import Conversation, Tokenizer, load_tokenizer, train_tokenizer
from nanoray.tokenizer.byte import ByteTokenizer
from nanoray.train.step import micro_batches

BYTES = ByteTokenizer()
T = 40


@pytest.fixture(autouse=True, scope="module")
def _small_units() -> Iterator[None]:
    """Units of 16 rows of 40 tokens, so that a short stream has many."""
    with mock.patch("nanoray.data.conversations.UNIT_TOKENS", 16 * T):
        yield


class Chats:
    """A list of conversations as a stream takes it; every one begins with its own number."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes

    def __call__(self, number: int) -> Conversation:
        question, answer = self.sizes[number]
        return {
            "messages": [
                {"role": "user", "content": f"{number}" + "q" * question},
                {"role": "assistant", "content": "a" * answer},
            ]
        }


def stream_of(
    chats: Any,
    count: int,
    *,
    sequence_len: int = T,
    rows_per_step: int = 4,
    num_steps: int = 1,
    train_on: TrainOn = "assistant",
    tokenizer: Tokenizer = BYTES,
) -> ConversationStream:
    measured = measure(chats, count, tokenizer, sequence_len, train_on)
    plan = layout(rows_per_step, sequence_len)
    return ConversationStream(chats, measured.lengths, plan, num_steps, train_on, 3)


def steps_of(
    stream: ConversationStream, world_size: int = 1, tokenizer: Tokenizer = BYTES
) -> list[list[StepRows]]:
    """Every worker's rows of every step: [step][rank]."""
    shares = [
        list(step_rows(local_blocks(stream, tokenizer, Cursor(), r, world_size), stream, r,
                       world_size))
        for r in range(world_size)
    ]  # fmt: skip
    return [list(step) for step in zip(*shares)]


def members_of(row: np.ndarray) -> list[int]:
    """The numbers of the conversations in a row, as their texts give them."""
    pieces = BYTES.decode_bytes(row).split(b"<|bos|>")[1:]
    texts = [piece.removeprefix(b"<|user_start|>") for piece in pieces if piece]
    return [int(text[: len(text) - len(text.lstrip(b"0123456789"))]) for text in texts]


SIZES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 90)), min_size=1, max_size=60)


@given(SIZES, st.sampled_from(["assistant", "all"]))
@settings(max_examples=60, deadline=None)
def test_every_conversation_is_whole_in_one_row_of_an_epoch(
    sizes: list[tuple[int, int]], train_on: TrainOn
) -> None:
    chats = Chats(sizes)
    rendered = [BYTES.render_conversation(chats(i)) for i in range(len(sizes))]
    targets = [
        (mask if train_on == "assistant" else [0] + [1] * (len(ids) - 1))[: T + 1]
        for ids, mask in rendered
    ]
    kept = {i for i, mask in enumerate(targets) if any(mask)}
    if not kept:
        with pytest.raises(NanorayError, match=r"none of the .* has anything to train on"):
            stream_of(chats, len(sizes), train_on=train_on)
        return
    measured = measure(chats, len(sizes), BYTES, T, train_on)
    full = [len(ids) for ids, _ in rendered]
    assert measured.tokens == sum(full)
    assert measured.left_out == len(sizes) - len(kept)
    assert measured.truncated == sum(full[i] > T + 1 for i in kept)
    assert measured.tokens_cut == sum(full) - sum(min(full[i], T + 1) for i in kept)

    stream = stream_of(chats, len(sizes), train_on=train_on)
    assert sorted(np.concatenate(stream.rows).tolist()) == sorted(kept)
    packed = fill(stream, stream.rows, BYTES)
    assert packed.trained is not None
    for row, trained, members in zip(packed.rows, packed.trained, stream.rows):
        ids = [token for i in members for token in rendered[i][0][: T + 1]]
        mask = [bit for i in members for bit in targets[i]]
        assert len(ids) <= T + 1
        assert row.tolist() == ids + [BYTES.bos_id] * (T + 1 - len(ids))
        assert trained.tolist() == mask + [0] * (T + 1 - len(ids)), "padding is no target"
        assert trained[1:].any(), "a row always has a target"
    assert packed.documents == len(kept)
    assert packed.tokens_in - packed.tokens_cropped == int(measured.lengths.sum())


@given(SIZES, st.integers(1, 6), st.integers(2, 3), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_the_stream_does_not_hang_on_workers_or_restarts(
    sizes: list[tuple[int, int]], rows_per_step: int, world_size: int, resume: int
) -> None:
    chats = Chats([(q % 10, a + 1) for q, a in sizes])
    stream = stream_of(chats, len(sizes), rows_per_step=rows_per_step, num_steps=40)
    whole = steps_of(stream)
    shared = steps_of(stream, world_size)
    assert len(whole) == len(shared) == 40
    for (alone,), parts in zip(whole, shared):
        assert sum(part.hash() for part in parts) % 2**64 == alone.hash()
        assert sum(part.num_targets for part in parts) == alone.num_targets
    # As a checkpoint after `resume` steps, and one in the second slab of 32, would have it.
    for step in (resume, 32 + resume):
        seen = whole[step - 1][0]
        assert seen.slab is not None
        parts = [
            next(
                step_rows(
                    local_blocks(stream, BYTES, seen.slab, rank, world_size),
                    stream,
                    rank,
                    world_size,
                    first_step=step,
                    slab_first_step=seen.slab_first_step,
                )
            )
            for rank in range(world_size)
        ]
        assert sum(part.hash() for part in parts) % 2**64 == whole[step][0].hash()


def test_epochs_have_the_same_rows_in_another_order() -> None:
    chats = Chats([(3, 5 + i % 17) for i in range(50)])
    stream = stream_of(chats, 50, rows_per_step=3)
    epoch = len(stream.rows)
    stream = replace(stream, num_steps=epoch)  # three epochs of it
    rows = np.concatenate([rows.ids for (rows,) in steps_of(stream)])
    epochs = [rows[i * epoch : (i + 1) * epoch].tolist() for i in range(3)]
    for order in epochs:
        assert Counter(n for row in order for n in members_of(np.array(row))) == Counter(range(50))
        assert sorted(order) == sorted(epochs[0])
    assert len({str(order) for order in epochs}) == 3
    told = [stream.epoch(int(rows.units[0]), int(rows.rows[0])) for (rows,) in steps_of(stream)]
    assert told == [3 * step // epoch for step in range(epoch)]


def test_the_order_hangs_on_the_seed_the_rows_do_not() -> None:
    chats = Chats([(3, 5 + i % 17) for i in range(50)])
    stream = stream_of(chats, 50, num_steps=3)
    other = replace(stream, seed=4)
    ours, theirs = (np.concatenate([rows.ids for (rows,) in steps_of(s)]) for s in (stream, other))
    assert not np.array_equal(ours, theirs)
    assert [m.tolist() for m in stream.rows] == [m.tolist() for m in other.rows]


def test_a_stream_travels_without_its_rows() -> None:
    stream = stream_of(Chats([(3, 5)] * 900), 900)
    before = len(pickle.dumps(stream))
    expected = [m.tolist() for m in stream.rows]
    assert len(pickle.dumps(stream)) == before
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.rows is stream.rows, "worked out once by a process"
    assert [m.tolist() for m in copy.rows] == expected
    stored = load_lengths(lengths_file(stream.lengths))
    np.testing.assert_array_equal(stored, stream.lengths)
    assert stored.dtype == np.int32


@pytest.mark.parametrize("rows_per_step", [1, 3, 16, 24, 256])
def test_steps_take_the_rows_of_an_epoch_in_order(rows_per_step: int) -> None:
    plan = layout(rows_per_step, 512)
    slab_rows = plan.slab_steps * rows_per_step
    order = plan.step_order(np.arange(3 * slab_rows))
    assert sorted(order.tolist()) == list(range(3 * slab_rows))
    for start in range(0, 3 * slab_rows, slab_rows):
        stripes = order[start : start + slab_rows].reshape(plan.stripes, plan.slab_steps, -1)
        steps = stripes.transpose(1, 0, 2).reshape(plan.slab_steps, rows_per_step)
        assert steps.flatten().tolist() == list(range(start, start + slab_rows))


@given(st.lists(st.integers(0, 64), min_size=1, max_size=200))
@settings(max_examples=80, deadline=None)
def test_rows_are_full_where_that_can_be(lengths: list[int]) -> None:
    rows = pack(np.array(lengths, np.int32), 64)
    packed = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < size <= 64 for size in packed)
    assert sorted(i for row in rows for i in row.tolist()) == [
        i for i, length in enumerate(lengths) if length
    ]
    assert len(packed) < 2 or sum(sorted(packed)[:2]) > 64, "no two rows would have fitted in one"


def test_a_row_is_of_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.full(GROUP_SIZE + 10, 7, np.int32)
    rows = pack(lengths, 64)
    assert all((row < GROUP_SIZE).all() or (row >= GROUP_SIZE).all() for row in rows)
    assert sorted(np.concatenate(rows).tolist()) == list(range(GROUP_SIZE + 10))


def test_conversations_of_2048_tokens_in_rows_of_128() -> None:
    rng = random.Random(0)
    chats = Chats([(rng.randint(0, 400), rng.randint(1, 1600)) for _ in range(300)])
    measured = measure(chats, 300, BYTES, 128, "assistant")
    assert measured.truncated + measured.left_out > 280
    assert measured.truncated > 0
    assert measured.left_out > 0
    stream = stream_of(chats, 300, sequence_len=128, rows_per_step=8, num_steps=40)
    model = GPT(
        GPTConfig(sequence_len=128, vocab_size=257, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    )
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # initial values are zero in places
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    seen = 0
    for (rows,) in steps_of(stream):
        assert rows.trained is not None
        assert rows.trained[:, 1:].any(axis=1).all(), "no row is all masked"
        seen += len(rows.ids)
        if seen > 64:
            continue
        for inputs, targets in micro_batches(rows.ids, 3, torch.device("cpu"), rows.trained):
            loss = model(inputs, targets)
            assert torch.isfinite(loss)
            assert loss > 0
    assert seen == 40 * 8


def test_data_that_changed_under_a_run_is_one_sentence() -> None:
    chats = Chats([(3, 5)] * 9)
    stream = stream_of(chats, 9)
    chats.sizes[4] = (3, 6)
    with pytest.raises(NanorayError, match=r"conversation 4 of the mixture has .* changed; rest"):
        fill(stream, stream.rows, BYTES)


def test_what_is_packed_has_a_fingerprint() -> None:
    chats = Chats([(3, 5 + i) for i in range(20)])
    first = measure(chats, 20, BYTES, T, "assistant").fingerprint
    assert measure(chats, 20, BYTES, T, "assistant").fingerprint == first
    others = {
        measure(chats, 19, BYTES, T, "assistant").fingerprint,
        measure(chats, 20, BYTES, T + 1, "assistant").fingerprint,
        measure(chats, 20, BYTES, T, "all").fingerprint,
        measure(Chats([(4, 4 + i) for i in range(20)]), 20, BYTES, T, "assistant").fingerprint,
        measure(Chats(chats.sizes[::-1]), 20, BYTES, T, "assistant").fingerprint,
    }
    assert len(others | {first}) == 6


def test_held_out_rows_are_the_first_conversations() -> None:
    chats = Chats([(3, 10)] * 100)
    (ids, _mask) = BYTES.render_conversation(chats(0))
    rows, trained = held_out_rows(
        chats, 100, BYTES, sequence_len=T, num_tokens=10 * len(ids), train_on="assistant"
    )
    found = sorted(n for row in rows for n in members_of(row))
    assert found == list(range(10))
    assert rows.shape == trained.shape
    assert trained.sum() == 10 * 11, "the answers and their ends"
    few, _ = held_out_rows(chats, 3, BYTES, sequence_len=T, num_tokens=10**9, train_on="assistant")
    assert sorted(n for row in few for n in members_of(row)) == [0, 1, 2]


@pytest.fixture(scope="module")
def chat_tokenizer(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """4,096 ids, trained on conversations: a length like a real tokenizer's, or a bit above."""
    lines = (shared_data / "sft" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    folder = tmp_path_factory.mktemp("tokenizer") / "chat"
    train_tokenizer(lines[:1500], 4096).save(folder)
    return str(folder)


@pytest.mark.slow
def test_padding_on_real_conversations(shared_data: Path, chat_tokenizer: str) -> None:
    text = f"{shared_data}/sft/train.jsonl, gsm8k, mmlu"
    mixture = MixtureSource(text, "train", Sources(str(shared_data)))
    count = len(mixture.load())
    assert count == 5285 + 7473 + len(mixture.load().tasks[2])
    measured = measure(mixture, count, load_tokenizer(chat_tokenizer), 2048, "assistant")
    rows = pack(measured.lengths, 2049)
    padding = 1 - int(measured.lengths.sum()) / (len(rows) * 2049)
    print(f"padding {100 * padding:.2f} %, {len(rows):,} rows, {measured.truncated:,} truncated")
    assert padding <= 0.05


@pytest.mark.slow
def test_gsm8k_renders_packs_and_streams(
    ray_session: None,
    shared_data: Path,
    chat_tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nanoray.data.stream import training_dataset

    monkeypatch.setattr("nanoray.data.conversations.UNIT_TOKENS", UNIT_TOKENS)  # as the tasks have
    start = time.perf_counter()
    tokenizer = load_tokenizer(chat_tokenizer)
    mixture = MixtureSource("gsm8k", "train", Sources(str(shared_data)))
    stream = stream_of(
        mixture, len(mixture.load()), sequence_len=2048, rows_per_step=8, tokenizer=tokenizer
    )
    steps = -(-len(stream.rows) // 8)
    stream = replace(stream, num_steps=steps)
    measured_s = time.perf_counter() - start
    dataset = training_dataset(stream, Cursor(), chat_tokenizer, concurrency=2)
    size = stream.layout.rows_per_block
    blocks = dataset.iter_batches(batch_size=size, batch_format="numpy", drop_last=True)
    rows = list(step_rows(iter(blocks), stream, 0, 1))
    total_s = time.perf_counter() - start
    print(f"GSM8K: measured in {measured_s:.1f} s, streamed after {total_s:.1f} s")
    local = list(step_rows(local_blocks(stream, tokenizer, Cursor()), stream, 0, 1))
    assert [step.hash() for step in rows] == [step.hash() for step in local]
    assert len(rows) == steps
    assert total_s < 40, "20 s on an idle machine of two cores"


def test_a_message_names_the_conversations_of_its_rows() -> None:
    stream = stream_of(Chats([(3, 12)] * 40), 40, num_steps=20)
    (row,) = stream._unit(3)[5:6]
    described = stream.describe_unit(3, np.array([5]))
    assert described == (
        "conversations " + ", ".join(f"{n} ('{n}qqq'…)" for n in row) + " of the mixture"
    )
    rows = np.arange(16)
    total = sum(map(len, stream._unit(3)))
    assert stream.describe_unit(3, rows).endswith(f"…) and {total - 4} more of the mixture")
