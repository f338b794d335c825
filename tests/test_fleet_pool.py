"""The actor pool: every item once, through killed and hung actors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanoray.errors import NanorayError
from nanoray.fleet import ActorPool

pytestmark = pytest.mark.slow


def test_every_item_is_done_although_actors_die_and_hang(ray_session: None, tmp_path: Path) -> None:
    def make() -> Callable[[int], int]:
        def once(folder: Path, name: str) -> bool:
            """Whether this is the first call for a name, in any process."""
            try:
                os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
            return True

        def square(item: int) -> int:
            if item == 3 and once(tmp_path, "killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if item == 5 and once(tmp_path, "hung"):
                time.sleep(600)
            return item * item

        return square

    pool: ActorPool[int, int] = ActorPool(make, 2, name="squares", num_cpus=0.1)
    try:
        start = time.monotonic()
        assert dict(pool.map(range(10), deadline_s=8)) == {i: i * i for i in range(10)}
        assert time.monotonic() - start < 60
        assert {p.name for p in tmp_path.iterdir()} == {"killed", "hung"}
        assert dict(pool.map([4], deadline_s=30)) == {0: 16}  # and goes on with new actors
    finally:
        pool.close()


@pytest.mark.parametrize("where", ["make", "work"])
def test_a_users_mistake_is_said_once(ray_session: None, where: str) -> None:
    def make() -> Callable[[int], int]:
        if where == "make":
            raise NanorayError("no such run")

        def work(item: int) -> int:
            raise NanorayError("no such run")

        return work

    pool: ActorPool[int, int] = ActorPool(make, 1, name="mistaken", num_cpus=0.1)
    with pytest.raises(NanorayError, match=r"^no such run$"):
        list(pool.map([1, 2], deadline_s=60))
    pool.close()


def test_actors_that_always_die_end_the_work(ray_session: None) -> None:
    def make() -> Callable[[int], int]:
        return lambda item: os._exit(item)

    pool: ActorPool[int, int] = ActorPool(make, 1, name="doomed", num_cpus=0.1, max_losses=1)
    with pytest.raises(NanorayError, match="the doomed pool lost 2 actors"):
        list(pool.map([1], deadline_s=60))
    pool.close()
