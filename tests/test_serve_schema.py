"""The OpenAPI document is true: what it promises is what comes, whatever is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engine_models import one_thread  # noqa: F401
from serve_models import app_of, running, small_host

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is an extra of dev")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    host = small_host()
    with running(app_of(host)) as url:
        yield url
    host.close()


def test_every_answer_and_error_is_described(url: str) -> None:
    document = httpx.get(url + "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, methods in document["paths"].items():
        for operation in methods.values():
            responses = operation["responses"]
            assert "422" not in responses, path
            for status in ("400", "401", "404", "413", "default"):
                content = responses[status]["content"]["application/json"]
                assert content["schema"]["$ref"].endswith("/ErrorBody"), (path, status)
            assert responses["200"]["content"], path
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert chat.keys() == {"application/json", "text/event-stream"}
    february = document["paths"]["/chat/completions"]["post"]["responses"]["200"]["content"]
    assert february.keys() == {"text/event-stream"}


def test_keys_are_described_where_they_are_asked() -> None:
    host = small_host()
    document = app_of(host, api_keys=("secret-key",)).openapi()
    host.close()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == (path != "/health")


def _shortened(body: Any) -> Any:
    """The same request for a short answer: what is proven here is not the engine's speed."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and body[name] > 3:
                body[name] = 3
    return body


@pytest.mark.slow
def test_generated_requests_get_what_the_document_promises(url: str) -> None:
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    checks = schemathesis.checks
    # Left out: that whatever fits the schema is taken. Whose turn it is, which model there is,
    # which fields contradict each other, no schema says.
    checks = [
        checks.not_a_server_error,
        *(getattr(schemathesis.specs.openapi.checks, name) for name in _CHECKS),
    ]
    seen: dict[str, set[int]] = {}
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        for result in schema.get_all_operations():
            operation = result.ok()
            if mode == schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                continue  # there is nothing that could be wrong

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=25,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def test(case: Any) -> None:
                case.body = _shortened(case.body)
                response = case.call()
                seen.setdefault(case.path, set()).add(response.status_code)
                case.validate_response(response, checks=checks)
                for frame in response.text.split("\n\n")[:-1]:
                    if frame.startswith("data: {"):
                        json.loads(frame[6:])

            test()
    assert {200, 400} <= seen["/v1/completions"]
    assert 400 in seen["/v1/chat/completions"]
    assert 404 in seen["/v1/models/{model}"]


_CHECKS = (
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
