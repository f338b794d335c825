"""The HTTP application: the API, the page, and what stands before them. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.arrival import seconds_ago
from serve.chat_api import chat_router
from serve.completions_api import completions_router
from serve.errors import install
from serve.february import february_router, health_router
from serve.host import Host, ServedModel
from serve.limits import ApiKeys, BodyLimit, route_path
from serve.run import Service
from serve.schemas import ChatCompletionChunk, ErrorBody, ModelCard, ModelList
from serve.sse import COMPONENTS

if TYPE_CHECKING:
    from serve.observe import Observer

_UI = Path(__file__).parent / "ui"
_PAGE_HEADERS = {
    # All of the page is in its own files: what a model says can never become a script.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "frame-ancestors 'none'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is wrong; the message says how."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "There is no such model."},
    408: {"description": "The body came too slowly."},
    413: {"description": "The body is too large."},
    500: {"description": "The server failed."},
    503: {"description": "Not available at the moment."},
    504: {"description": "The answer took too long."},
    "default": {"description": "Any other error."},
}


@dataclass(frozen=True)
class HttpSettings:
    """How the API answers, whatever model it serves.

    Attributes:
        api_keys: one of them is asked of everybody, unless there are none.
        max_body_bytes: of a request.
        body_timeout_s: within it a request's body must have come.
        request_timeout_s: most time for one answer.
        coalesce_s: after text was sent, what comes within this time is sent together.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 2 * 2**20
    body_timeout_s: float = 20.0
    request_timeout_s: float = 300.0
    coalesce_s: float = 0.1


def make_app(host: Host, settings: HttpSettings, observer: Observer) -> FastAPI:
    """The application of a host's models; works under any path prefix (ASGI's root_path)."""
    # No page about the API: FastAPI's loads its scripts from elsewhere.
    app = FastAPI(title="nanoray", version="1", docs_url=None, redoc_url=None)
    service = Service(host, observer, settings.request_timeout_s, settings.coalesce_s)
    responses = {status: {**error, "model": ErrorBody} for status, error in _ERRORS.items()}
    # Enforced by ApiKeys; here it is told to readers of the OpenAPI document.
    keys = [Depends(HTTPBearer(auto_error=False))] if settings.api_keys else []
    for router in (
        _models_router(service),
        chat_router(service),
        completions_router(service),
        february_router(service),
    ):
        app.include_router(router, responses=responses, dependencies=keys)
    app.include_router(health_router(service), responses=responses)
    pages = _add_pages(app)
    install(app)
    # What is only ever streamed is no route's model, so FastAPI does not describe it.
    document = app.openapi()
    chunk = ChatCompletionChunk.model_json_schema(ref_template=COMPONENTS + "{model}")
    document["components"]["schemas"] |= {**chunk.pop("$defs"), ChatCompletionChunk.__name__: chunk}
    known = {"/openapi.json", *pages, *document["paths"]}
    open_paths = {"/health", "/openapi.json", *pages}
    # The last one added is the first to see a request.
    app.add_middleware(
        BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
    )
    app.add_middleware(ApiKeys, keys=settings.api_keys, open_paths=open_paths)
    app.add_middleware(_Requests, observer=observer, known_paths=known)
    return app


def _models_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The models, the default one first."""
        return ModelList(data=[_card(served) for served in service.host.models()])

    @router.get("/v1/models/{model}")
    async def model(model: str) -> ModelCard:
        """One model."""
        return _card(service.host.model(model))

    return router


def _card(served: ServedModel) -> ModelCard:
    return ModelCard(
        id=served.name,
        created=served.created,
        chat=served.chat,
        step=served.step,
        max_model_len=served.engine.max_len,
    )


def _add_pages(app: FastAPI) -> list[str]:
    """A route for each file of the page; their paths."""
    files = {f"/{path.relative_to(_UI).as_posix()}": path for path in _UI.rglob("*.*")}
    if "/index.html" in files:
        files["/"] = files.pop("/index.html")
    for path, file in files.items():
        app.add_route(path, _file_route(file), methods=["GET"], include_in_schema=False)
    return list(files)


def _file_route(file: Path) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def send_file(request: Request) -> Response:
        return FileResponse(file, headers=_PAGE_HEADERS)

    return send_file


class _Requests:
    """Notes when requests arrived, and records those that came to no model: refused, or asked for
    what is not there.
    """

    def __init__(self, app: ASGIApp, observer: Observer, known_paths: Collection[str]) -> None:
        self._app, self._observer = app, observer
        self._known_paths = frozenset(known_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # unless an answer begins

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state = scope.setdefault("state", {})
        state["arrived_s"] = self._observer.clock() - seconds_ago(scope)
        try:
            await self._app(scope, receive, watched)
        finally:
            if status >= 400 and not state.get("recorded"):
                path = route_path(scope)
                # An unknown path is the client's own word, and stays out of the log.
                route = path if path in self._known_paths else "unknown"
                record = self._observer.request(
                    route, "", method=scope["method"], arrived_s=state["arrived_s"]
                )
                record.finish(status, "refused")
