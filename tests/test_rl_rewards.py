from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoray.errors import NanorayError
from nanoray.rl.reward_worker import TaskReward
from nanoray.rl.rewards import MIB, Reward, RewardPool, RewardProcessError
from nanoray.tasks.arithmetic import Arithmetic
from nanoray.tasks.base import reference_answer
from nanoray.tasks.catalog import Sources, load_task

DEADLINE_S = 1.0
BEHAVE = "reward_functions:behave"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(BEHAVE, num_workers=2, deadline_s=DEADLINE_S, memory_bytes=512 * MIB) as pool:
        yield pool


def gone(pid: int) -> bool:
    """Whether the process and its threads ended (a zombie of somebody else's has)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1
    except OSError:
        return True


def eventually(condition: object, within_s: float = 10.0) -> bool:
    assert callable(condition)
    until = time.monotonic() + within_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(condition())


def pids_of(pool: RewardPool) -> set[int]:
    """Of the workers that take part in some quick rewards."""
    return {int(reward.value) for reward in pool.judge([(0, "pid")] * 8)}


def test_rewards_come_in_their_order(pool: RewardPool) -> None:
    answers = [(i, str(i / 4)) for i in range(50)]
    assert pool.judge(answers) == [Reward(i + i / 4) for i in range(50)]
    assert pool.judge([]) == []
    assert pool.judge([(1, "return true")]) == [Reward(1.0)]


@pytest.mark.parametrize(
    ("text", "problem", "detail"),
    [
        ("loop", "timeout", "no answer within 1 s"),
        ("loop-in-c", "timeout", ""),
        ("sleep 100", "timeout", ""),
        ("stop", "timeout", ""),
        ("defiant", "timeout", ""),
        (f"allocate {1 << 30}", "memory", ""),
        ("hoard", "memory", ""),
        ("exit 0", "crashed", "exit code 0"),
        ("exit 3", "crashed", "exit code 3"),
        ("segfault", "crashed", "signal 11"),
        ("kill", "crashed", "signal 9"),  # as the kernel does where memory runs out
        ("raise no such thing", "error", "ValueError: no such thing"),
        ("leave", "error", "SystemExit: leaving"),
        ("recurse", "error", "RecursionError"),
        ("return nan", "error", "the reward is nan"),
        ("return none", "error", "TypeError"),
        ("no number", "error", "could not convert"),
        ("\ud800\n\0", "error", "could not convert"),
    ],
)
def test_misbehaviour_is_a_typed_result_in_time(
    pool: RewardPool, text: str, problem: str, detail: str
) -> None:
    assert eventually(lambda: len(pids_of(pool)) == 2)  # both workers are there again
    start = time.monotonic()
    first, *others = pool.judge([(0, text), (1, "1"), (2, "2"), (3, "3")])
    assert time.monotonic() - start < DEADLINE_S + 1
    assert (first.value, first.problem) == (0.0, problem)
    assert detail in first.detail
    assert others == [Reward(2.0), Reward(4.0), Reward(6.0)]


def test_what_a_reward_prints_is_no_answer(pool: RewardPool) -> None:
    assert pool.judge([(0, "print")] * 3) == [Reward(1.0)] * 3


def test_a_modest_allocation_is_allowed(pool: RewardPool) -> None:
    assert pool.judge([(0, f"allocate {100 * MIB}")]) == [Reward(1.0)]


def test_a_long_text_arrives_whole(pool: RewardPool) -> None:
    assert pool.judge([(1, "0" * 3_000_000 + "5")]) == [Reward(6.0)]


def test_many_threads_each_get_their_own(pool: RewardPool) -> None:
    found: dict[int, list[Reward]] = {}

    def ask(k: int) -> None:
        found[k] = pool.judge([(i, str(k)) for i in range(40)])

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [Reward(float(i + k)) for i in range(40)] for k in range(8)}


def test_a_worker_that_was_killed_while_idle_is_replaced(pool: RewardPool) -> None:
    pids = pids_of(pool)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: all(map(gone, pids)))
    after = pids_of(pool)
    assert 0 not in after  # no reward was lost
    assert not pids & after


def test_a_worker_that_cannot_be_replaced_now_may_be_later(
    pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory is short: no user's mistake, which would end the run."""

    def no_memory(*_args: object, **_options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen", no_memory)
        pool.judge([(0, "kill")] * 2)
        with pytest.raises(RewardProcessError, match="Cannot allocate memory"):
            pool.judge([(0, "1")] * 2)
    assert eventually(lambda: not isinstance(retried(pool), RewardProcessError))
    assert len(pids_of(pool)) == 2


def retried(pool: RewardPool) -> object:
    try:
        return pool.judge([(0, "1")])
    except RewardProcessError as error:
        return error


def test_what_a_reward_started_ends_with_it(pool: RewardPool, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    assert pool.judge([(0, f"orphan {path}")])[0].problem == "timeout"
    assert eventually(lambda: all(gone(int(pid)) for pid in path.read_text().split()))


def test_tasks_are_opened_in_the_worker() -> None:
    task = Arithmetic("test", 1000)
    with RewardPool(TaskReward("arithmetic", "test")) as pool:
        answers = [(i, reference_answer(task.example(i))) for i in range(20)]
        assert pool.judge(answers) == [Reward(1.0)] * 20
        wrong = [(i, "#### 100000") for i in range(5)]
        assert pool.judge(wrong) == [Reward(0.0)] * 5
        assert pool.judge([(10**9, "1")])[0].problem == "error"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("reward_functions:none", "no reward function reward_functions:none"),
        ("no_such_module:none", "no_such_module"),
        ("reward_functions", "give module:function"),
        ("", "give module:function"),
        (TaskReward("alchemy", "test"), "there is no task 'alchemy'"),
        (TaskReward("spelling-bee", "test"), "--words"),
    ],
)
def test_a_reward_that_cannot_be_opened(reward: TaskReward | str, message: str) -> None:
    with pytest.raises(NanorayError, match=message):
        RewardPool(reward, num_workers=1)


def test_closing_ends_everybody() -> None:
    pool = RewardPool(BEHAVE, num_workers=2, deadline_s=60)
    pids = pids_of(pool)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            pool.judge([(0, "loop")] * 6)
        except NanorayError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    start = time.monotonic()
    pool.close()
    thread.join(5)
    assert time.monotonic() - start < 2
    assert not thread.is_alive()
    assert all(map(gone, pids))
    assert "closed" in str(errors[0])
    with pytest.raises(NanorayError, match="closed"):
        pool.judge([(0, "1")])
    pool.close()


def test_workers_do_not_outlive_a_pool_that_was_killed(tmp_path: Path) -> None:
    """One is idle, one loops; their pool's process gets SIGKILL."""
    path = tmp_path / "pids"
    program = f"""
import os, pathlib, threading
from nanoray.rl.rewards import RewardPool
pool = RewardPool({BEHAVE!r}, num_workers=2, deadline_s=2)
pids = {{int(reward.value) for reward in pool.judge([(0, "pid")] * 40)}}
threading.Thread(target=pool.judge, args=([(0, "loop")],)).start()
threading.Event().wait(0.2)
pathlib.Path({str(path)!r}).write_text(" ".join(map(str, pids)))
os.kill(os.getpid(), 9)
"""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, timeout=60
    )
    assert result.returncode == -signal.SIGKILL
    assert eventually(lambda: all(gone(int(pid)) for pid in path.read_text().split()))


def test_gsm8k_by_its_files(shared_data: Path) -> None:
    sources = Sources(str(shared_data))
    task = load_task("gsm8k", "train", sources)
    with RewardPool(TaskReward("gsm8k", "train", sources)) as pool:
        answers = [(i, reference_answer(task.example(i))) for i in (0, 5000)]
        assert pool.judge([*answers, (0, "#### no")]) == [Reward(1.0), Reward(1.0), Reward(0.0)]


@pytest.mark.slow
def test_programs_in_the_sandbox_of_a_worker(shared_data: Path) -> None:
    """The worker's limit on memory leaves room for the sandbox, and its end ends the program."""
    sources = Sources(str(shared_data))
    task = load_task("humaneval", "test", sources)
    with RewardPool(TaskReward("humaneval", "test", sources), 2, deadline_s=3) as pool:
        good = [(i, reference_answer(task.example(i))) for i in range(4)]
        endless = (0, "```python\nwhile True:\n    pass\n```")
        start = time.monotonic()
        first, *others = pool.judge([endless, *good])
        assert time.monotonic() - start < 4
    assert first.problem == "timeout"
    assert others == [Reward(1.0)] * 4
