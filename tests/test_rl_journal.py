"""What the pool tells: events in their order, rewards that went wrong, and no secrets."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from rl_pools import make_group

from nanoray.rl import reward_worker
from nanoray.rl.groups import Group
from nanoray.rl.idle import StateClock
from nanoray.rl.journal import Journal
from nanoray.rl.seat import Seat


def judged(number: int, problem: str, detail: str = "") -> Group:
    group = make_group(number, version=0)
    first, *others = group.samples
    return replace(group, samples=(replace(first, problem=problem, detail=detail), *others))


def test_rewards_that_went_wrong_are_told_ever_more_rarely() -> None:
    journal = Journal()
    seat = Seat(0, None, StateClock("busy", 0.0))  # type: ignore[arg-type]
    for number in range(150):
        journal.sampled(seat, [judged(number, "error", f"ValueError: {number}")])
    journal.sampled(seat, [judged(900, "timeout", "no answer within 1 s"), make_group(901, 0)])
    assert [event["text"] for event in journal.events] == [
        "reward error (ValueError: 0): an answer to prompt 0 gets 0; 1 so far in this job",
        "reward error (ValueError: 9): an answer to prompt 9 gets 0; 10 so far in this job",
        "reward error (ValueError: 99): an answer to prompt 99 gets 0; 100 so far in this job",
        "reward timeout (no answer within 1 s): an answer to prompt 900 gets 0; 1 so far in this "
        "job",
    ]
    assert seat.tokens == 152 * 2 * 3


def test_a_clock_that_jumps_back_hides_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    times = itertools.count(1000.0, -1)
    monkeypatch.setattr(time, "time", lambda: next(times))
    for text in "abc":
        journal.tell(text)
    assert [event["number"] for event in journal.events] == [1, 2, 3]


def test_details_are_a_short_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hunter2-hunter2")
    monkeypatch.setenv("SOME_TOKEN", "no")  # too short to be one, and part of many words

    def talkative(_index: int, _text: str) -> float:
        raise ValueError("no luck with hunter2-hunter2\n\x1b[31m" + "x" * 1000)

    value, problem, detail = reward_worker._answer(talkative, 0, "")
    assert (value, problem) == (0.0, "error")
    assert detail.startswith("ValueError: no luck with *** [31mxxx")
    assert len(detail) == 200
    assert detail.isprintable()
