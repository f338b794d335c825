"""The one family of errors that a user is meant to read."""

from __future__ import annotations


class NanorayError(Exception):
    """A mistake in the input, the configuration or the surroundings.

    The message is one sentence that names the cause and the mend. Jobs print it without
    a traceback and exit with 1 (2 for bad usage).
    """


class NoGpuError(NanorayError):
    """A GPU is reserved for a process whose torch sees none; another node may do better."""
