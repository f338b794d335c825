"""Saves as the workers agree on them: one that fails is tried once more, on all together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nanoray.checkpoint.writer import CheckpointWriter, SaveFailedError
from nanoray.errors import NanorayError
from nanoray.lease import LeaseLostError
from nanoray.metrics import Sink
from nanoray.train.world import World


@contextlib.contextmanager
def dispensable(what: str, post: Sink) -> Iterator[None]:
    """Around the writing of what a run can do without: a failure is told, and the run goes on.

    Whether it can go on with a full disk, or a store that is away, is for its saves to say.
    """
    try:
        yield
    except LeaseLostError:
        raise
    except Exception as error:  # every store has its own
        post({"warning": f"{what} cannot be written now ({error})"})


class AgreedSaves:
    """Whether the save before went well, the same answer on all workers.

    A disk that was full for a moment, or a store that was away, must cost neither the run nor an
    interval's work: a failed save is made again at once, at the step that noticed it.

    Args:
        post: told of a save that is to be tried again.
    """

    def __init__(self, writer: CheckpointWriter, world: World, post: Sink) -> None:
        self._writer = writer
        self._world = world
        self._post = post
        self._failed = False  # the latest save; it must be followed by another

    def settle(self) -> bool:
        """Wait for the save under way; whether it failed. Called by all workers together.

        Raises:
            NanorayError: the save before it had failed, too, or it failed for good (the lease
                is lost). On all workers.
        """
        error = self._writer.outcome()
        final = error is not None and (self._failed or not isinstance(error, SaveFailedError))
        failed, given_up = self._world.sum_ints([int(error is not None), int(final)])
        if given_up:
            reasons = self._world.gather(str(error) if final else "")
            if error is not None and final:
                raise error
            raise NanorayError(next(filter(None, reasons)))
        self._failed = bool(failed)
        if isinstance(error, SaveFailedError) and self._world.is_first:
            self._post({"warning": f"{error.what}; trying once more"})
        return self._failed
