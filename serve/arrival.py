"""When a request arrived: noted by Serve's proxy, where it may queue before a replica sees it."""

from __future__ import annotations

import time

from starlette.types import Scope

from serve.limits import header

ARRIVAL = b"x-nanoray-arrival"
# Clocks of two nodes differ; and where our part of the proxy is missing, clients may send the
# header themselves.
_MOST_S = 600.0


def stamped(scope: Scope) -> Scope:
    """The request with this moment in a header, in place of what the client may have put there."""
    headers = [(key, value) for key, value in scope["headers"] if key != ARRIVAL]
    return {**scope, "headers": [*headers, (ARRIVAL, f"{time.time():.6f}".encode())]}


def seconds_ago(scope: Scope) -> float:
    """How long ago the request was stamped; 0 if it was not, or not believably."""
    try:
        age_s = time.time() - float(header(scope, ARRIVAL))
    except ValueError:
        return 0.0
    return age_s if 0 <= age_s <= _MOST_S else 0.0
