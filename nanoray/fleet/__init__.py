"""Our one way to a cluster: connect, preflight, the board of a run, the pool of actors.

The only room below training that knows Ray.
"""

from nanoray.fleet.board import Board, StopWatch, gauge_sink, start_board
from nanoray.fleet.connect import (
    Needs,
    check_places,
    check_resources,
    connect,
    has_gpus,
    local_object_store_bytes,
    local_resources,
    on_cluster,
    preflight,
    worker_environment,
)
from nanoray.fleet.pool import ActorPool

__all__ = [
    "ActorPool",
    "Board",
    "Needs",
    "StopWatch",
    "check_places",
    "check_resources",
    "connect",
    "gauge_sink",
    "has_gpus",
    "local_object_store_bytes",
    "local_resources",
    "on_cluster",
    "preflight",
    "start_board",
    "worker_environment",
]
