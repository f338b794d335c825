"""Text as it streams: UTF-8 split anywhere, stop strings across pieces; and the slots' rules."""

from __future__ import annotations

import random
from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given, settings

from nanoray.engine.request import TextStream
from nanoray.engine.slots import Prefix, Slots, common_prefix


def cuts(data: bytes, points: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(point % (len(data) + 1) for point in points)})
    return [data[a:b] for a, b in pairwise(edges)]


points = st.lists(st.integers(0, 1000), max_size=30)


@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode("utf-8", "replace"))), points)
def test_any_split_of_utf8_gives_the_text(text: str, where: list[int]) -> None:
    stream = TextStream()
    pieces = [stream.feed(piece) for piece in cuts(text.encode("utf-8", "replace"), where)]
    whole = text.encode("utf-8", "replace").decode()
    assert "".join(pieces) + stream.flush() == whole
    assert "�" not in "".join(pieces) or "�" in whole


@given(st.binary(max_size=40), points)
def test_any_split_of_any_bytes_gives_what_decoding_them_whole_gives(
    data: bytes, where: list[int]
) -> None:
    stream = TextStream()
    text = "".join(stream.feed(piece) for piece in cuts(data, where)) + stream.flush()
    assert text == data.decode("utf-8", errors="replace")


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    points,
)
def test_a_stop_string_is_found_across_any_pieces(
    text: str, stops: list[str], where: list[int]
) -> None:
    stream = TextStream(stops)
    seen = ""
    fed = ""
    for piece in cuts(text.encode(), where):
        seen += stream.feed(piece)
        fed += piece.decode()
        found = [fed.find(stop) for stop in stops if stop in fed]
        assert stream.stopped == bool(found)
        if found:
            assert seen == fed[: min(found)]
            return
        # Nothing is held back but what could still become a stop string.
        held = fed[len(seen) :]
        assert fed.startswith(seen)
        assert not held or any(stop.startswith(held) for stop in stops)
    assert seen + stream.flush() == text


def test_slots_reuse_copy_and_evict() -> None:
    slots = Slots(3)
    first = slots.allocate([1, 2, 3, 4])
    assert first is not None
    assert (first.slot.index, first.length) == (0, 0)
    first.slot.tokens = [1, 2, 3, 4]
    busy = slots.allocate([1, 2, 3, 4])  # a busy source is copied, one token is left to compute
    assert busy is not None
    assert (busy.slot.index, busy.source.index, busy.length) == (1, 0, 3)
    slots.release(first.slot)
    slots.release(busy.slot)
    again = slots.allocate([1, 2, 3, 4, 5])
    assert again is not None
    assert (again.slot.index, again.length) == (0, 4)
    other = slots.allocate([9, 9])
    assert other is not None
    assert other.slot.index == 2  # the empty one before the one that holds something
    assert slots.allocate([7]) is not None
    assert slots.allocate([8]) is None
    assert slots.num_busy == 3
    slots.release(again.slot, keep=False)
    assert again.slot.tokens == []
    slots.forget()
    assert all(slot.tokens == [] for slot in slots.all)
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 5], [1, 6]) == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_slots_of_one_prefix_begin_alike(seed: int) -> None:
    rng = random.Random(seed)
    slots = Slots(5)
    for _ in range(60):
        busy = [slot for slot in slots.all if slot.busy]
        if rng.random() < 0.6:
            tokens = [rng.choice([0, 0, 0, 1]) for _ in range(rng.randint(1, 12))]
            if (allocation := slots.allocate(tokens)) is not None:
                assert allocation.slot.tokens == tokens[: allocation.length]
                allocation.slot.tokens += tokens[allocation.length :]
        elif busy:
            slots.release(rng.choice(busy), keep=rng.random() < 0.8)
        if rng.random() < 0.02:
            slots.forget()
        beginnings: dict[Prefix, list[int]] = {}
        for slot in slots.all:
            if slot.prefix is not None:
                beginning = slot.tokens[: slot.prefix.length]
                assert len(beginning) == slot.prefix.length > 0
                assert beginnings.setdefault(slot.prefix, beginning) == beginning


def test_samples_of_a_prompt_share_it_though_a_short_beginning_was_shared_before() -> None:
    slots = Slots(4)
    for tokens in ([1, 2, 3, 4], [1, 5, 6, 7], [1, 2, 3, 4], [1, 2, 3]):
        allocation = slots.allocate(tokens)
        assert allocation is not None
        allocation.slot.tokens = tokens
    first, second, third, fourth = (slot.prefix for slot in slots.all)
    assert first == third != second
    assert first is not None
    assert second is not None
    assert (first.length, second.length, fourth) == (3, 1, None)
