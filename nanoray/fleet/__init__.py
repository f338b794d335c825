"""Our one way to a cluster: connect, preflight, the board of a run, the pool of actors.

The only room below training that knows Ray.
"""

from nanoray.fleet.board import (
    Board,
    StopWatch,
    gauge_name,
    gauge_sink,
    mistakes_told,
    start_board,
)
from nanoray.fleet.connect import (
    Needs,
    NoRoomError,
    check_places,
    check_resources,
    check_roles,
    connect,
    local_object_store_bytes,
    local_resources,
    on_cluster,
    preflight,
    worker_environment,
)
from nanoray.fleet.placement import (
    Role,
    RoleWatch,
    count_places,
    draining_nodes,
    label_selector,
    living_nodes,
    nodes_for,
)
from nanoray.fleet.pool import ActorPool
from nanoray.fleet.turn import turn, when_there_is_room

__all__ = [
    "ActorPool",
    "Board",
    "Needs",
    "NoRoomError",
    "Role",
    "RoleWatch",
    "StopWatch",
    "check_places",
    "check_resources",
    "check_roles",
    "connect",
    "count_places",
    "draining_nodes",
    "gauge_name",
    "gauge_sink",
    "label_selector",
    "living_nodes",
    "local_object_store_bytes",
    "local_resources",
    "mistakes_told",
    "nodes_for",
    "on_cluster",
    "preflight",
    "start_board",
    "turn",
    "when_there_is_room",
    "worker_environment",
]
