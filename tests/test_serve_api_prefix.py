"""Under a path prefix, which a server puts into ASGI's root_path, everything is as without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engine_models import one_thread  # noqa: F401
from serve_models import SmallHost, app_of, running, small_host

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def host() -> Iterator[SmallHost]:
    host = small_host()
    yield host
    host.close()


def test_a_path_prefix_changes_nothing(host: SmallHost) -> None:
    # As a server behind a proxy that takes the prefix away, and puts it into root_path.
    app = app_of(host, api_keys=("secret",))
    with running(app, root_path="/deep/inside") as url, httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        response = client.get("/v1/models", headers={"authorization": "Bearer secret"})
        assert response.status_code == 200


@pytest.mark.parametrize("keys", [(), ("secret-key",)])
def test_the_page_is_open_without_the_prefixes_slash(
    host: SmallHost, keys: tuple[str, ...]
) -> None:
    app = app_of(host, api_keys=keys)

    async def prefixed(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": "/chat"}, receive, send)  # as Serve does it

    with running(prefixed) as url, httpx.Client(follow_redirects=True) as client:
        for path in ("/chat", "/chat/"):
            page = client.get(url + path)
            assert page.status_code == 200
            assert str(page.url) == f"{url}/chat/"
            assert page.headers["content-type"].startswith("text/html")
        assert client.get(f"{url}/chat/v1/models").status_code == (401 if keys else 200)
