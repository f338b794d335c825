"""Text as it streams: UTF-8 split anywhere, stop strings across pieces; and the slots' rules."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given

from nanoray.engine.request import TextStream
from nanoray.engine.slots import Slots, common_prefix


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
