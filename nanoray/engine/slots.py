"""Which sequence each cache slot holds, and where a new one should go. Pure Python.

The slots are the prefix cache: a slot whose request has ended keeps its tokens until it is
needed, and a new sequence starts from the longest prefix that any slot has computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prefix:
    """A beginning that was copied between slots: equal keys and values, so one reading does.

    It names no slot: every slot that carries it holds a copy of its own.
    """

    number: int
    length: int


@dataclass
class Slot:
    """One slot. Its cache holds the keys and values of exactly `tokens`."""

    index: int
    tokens: list[int] = field(default_factory=list)
    prefix: Prefix | None = None  # what its tokens begin with
    busy: bool = False
    last_use: int = 0


@dataclass(frozen=True)
class Allocation:
    """Where a sequence goes, and the computed prefix that it can start from."""

    slot: Slot
    source: Slot  # holds the prefix; the slot itself, or one to copy from
    length: int  # tokens of the prefix; at least one token of the sequence is left to compute


class Slots:
    """All slots of an engine. With `reuse` off every sequence starts from nothing."""

    def __init__(self, num_slots: int, reuse: bool = True) -> None:
        self.all = [Slot(index) for index in range(num_slots)]
        self.reuse = reuse
        self._clock = self._num_prefixes = 0

    @property
    def num_busy(self) -> int:
        return sum(slot.busy for slot in self.all)

    def allocate(self, tokens: Sequence[int], reuse: bool = True) -> Allocation | None:
        """Take an idle slot for a sequence, or None if all are busy.

        The slot's tokens are cut to the prefix at once; if it is another slot's, the caller
        copies that slot's cache before anything else is computed.
        """
        idle = [slot for slot in self.all if not slot.busy]
        if not idle:
            return None
        # Among equal prefixes an idle slot saves the copy.
        lengths = {slot.index: common_prefix(slot.tokens, tokens) for slot in self.all}
        source = max(self.all, key=lambda slot: (lengths[slot.index], not slot.busy))
        length = min(lengths[source.index], len(tokens) - 1)
        if not (self.reuse and reuse):
            length = 0
        # An idle slot is continued in place only if that keeps most of it: a short common
        # beginning must not cost another conversation its cache while older ones are there.
        if source.busy or 2 * length < len(source.tokens) or length == 0:
            target = min(idle, key=lambda slot: (slot.last_use, slot.index))
        else:
            target = source
        if length == 0:
            source = target
        target.prefix = self._prefix(source, target, length)
        target.tokens = list(tokens[:length])
        target.busy = True
        return Allocation(target, source, length)

    def _prefix(self, source: Slot, target: Slot, length: int) -> Prefix | None:
        """The prefix that the target, given `length` tokens of the source, has in common."""
        prefix = source.prefix
        if source is not target and (prefix is None or 2 * prefix.length < length):
            # Those who share less with the source keep that in common among themselves.
            self._num_prefixes += 1
            prefix = source.prefix = Prefix(self._num_prefixes, length)
        return prefix if prefix is not None and 0 < prefix.length <= length else None

    def release(self, slot: Slot, keep: bool = True) -> None:
        """Make a slot idle; its tokens stay for others to start from unless keep is False."""
        assert slot.busy
        self._clock += 1
        slot.busy, slot.last_use = False, self._clock
        if not keep:
            slot.tokens, slot.prefix, slot.last_use = [], None, 0

    def forget(self) -> None:
        """The cached keys and values of all slots are void: the weights have changed."""
        for slot in self.all:
            slot.tokens, slot.prefix = [], None
            if not slot.busy:
                slot.last_use = 0


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    for count, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return count
    return min(len(first), len(second))
