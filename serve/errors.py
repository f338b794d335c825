"""What goes wrong, said in OpenAI's form: {"error": {message, type, param, code}}.

No message repeats what a prompt says: clients log errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nanoray.errors import NanorayError

_MAX_NAME_CHARS, _MAX_MESSAGE_CHARS = 100, 500
_NO_JSON = "the body is no JSON object in UTF-8: send one, as Content-Type application/json."
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}
# Which branch of a union it was stands in a place, too.
_UNION_STEPS = ("str", "int", "user", "assistant", "system", "developer")
# Fields of OpenAI that are understood as far as they ask for nothing.
_NOT_SUPPORTED = {
    "frequency_penalty": "leave it out or give 0",
    "presence_penalty": "leave it out or give 0",
    "response_format": 'leave it out or give {"type": "text"}',
    "store": "leave it out or give false",
    "suffix": "leave it out",
    "tool_choice": 'leave it out or give "none"',
    "tools": "leave it out or give an empty list",
}


class UnknownModelError(NanorayError):
    """There is no model of that name here."""


class ApiError(Exception):
    """An error that the client is told.

    Args:
        status: of HTTP; if the answer has begun, only in the access log.
        message: cause and mend.
        param: the field of the request that is to blame.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.message = message[:_MAX_MESSAGE_CHARS]
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON, in ASCII: a field's name may hold what is no UTF-8."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status in (401, 429):
            kind = "authentication_error" if self.status == 401 else "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The answer, where none has begun."""
        return Response(self.body(), self.status, self.headers, "application/json")


def unavailable() -> ApiError:
    """The model's engine is being replaced or has ended."""
    return ApiError(
        503,
        "the model is not available at the moment: try again.",
        code="model_unavailable",
        headers={"retry-after": "1"},
    )


def model_failed(message: str) -> ApiError:
    """The engine failed at a request that was fine."""
    return ApiError(500, message, code="model_error")


def too_much() -> ApiError:
    """More is waiting for the model's slots than would be answered soon."""
    return ApiError(
        429,
        "all slots are taken and many sequences wait for one: ask again in a moment.",
        headers={"retry-after": "2"},
    )


def as_api_error(error: Exception) -> ApiError:
    """How the client is told what was raised while its request was checked."""
    # Not above: it loads torch, which Serve's proxies (see serve/proxy.py) do without.
    from nanoray.engine.engine import EngineClosedError, EngineFailedError

    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, EngineClosedError):
        return unavailable()
    if isinstance(error, EngineFailedError):
        return model_failed(str(error))
    if isinstance(error, NanorayError):
        return ApiError(400, str(error))
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        if error.status_code == 400:  # FastAPI's own, for a body that cannot be parsed
            return ApiError(400, _NO_JSON, code="invalid_json")
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed: see its log.", code="internal_error")


def install(app: FastAPI) -> None:
    """Have every error of the app answered in this form."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # the client has left

    app.add_exception_handler(ClientDisconnect, nobody)
    for kind in (ApiError, NanorayError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """From pydantic's errors, of which the first field's are told."""
    first = errors[0]
    if len(first["loc"]) < 2 or first["type"] == "json_invalid":
        return ApiError(400, _NO_JSON, code="invalid_json")
    param = _param(first["loc"])
    field = str(first["loc"][1])
    if first["type"] == "extra_forbidden":
        message = f"the field {param} is not known to this server: leave it out."
        return ApiError(400, message, param=param, code="unknown_field")
    if field in _NOT_SUPPORTED:
        message = f"{field} is not supported: {_NOT_SUPPORTED[field]}."
        return ApiError(400, message, param=field, code="unsupported_value")
    if first["type"] == "union_tag_invalid":
        tags = f"{first['ctx']['discriminator']} must be {first['ctx']['expected_tags']}"
        return ApiError(400, f"{param}: {tags}.", param=param)
    # The branches of a union fail one by one, each at a place of its own.
    told = dict.fromkeys(str(e["msg"]) for e in errors if e["loc"][1] == first["loc"][1])
    return ApiError(400, f"{param}: {', or: '.join(list(told)[:3])}.", param=param)


def _param(loc: Sequence[str | int]) -> str:
    """A place such as ("body", "messages", 0, "content") as messages[0].content."""
    name = str(loc[1])
    for step in loc[2:]:
        if isinstance(step, int):
            name += f"[{step}]"
        elif step.isidentifier() and step not in _UNION_STEPS:
            name += f".{step}"
    return name[:_MAX_NAME_CHARS]
