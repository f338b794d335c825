"""A local HTTP server that fails on purpose, for the tests of downloading."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class FaultServer:
    """Serves ``files`` (or ``default`` for any name) with byte ranges and strong ETags.

    ``faults[name]`` lists what the next requests for a file meet: ``"cut"`` (half of what is
    left, then the connection ends), ``"stall"``, ``"short"`` (a well-formed body of half the
    length), ``"corrupt"`` (right length, noise), ``"flip"`` (one byte changed), ``"norange"``,
    ``"norange-cut"``, ``"other"`` (another file, as if it had changed), a status such as
    ``"429"`` or ``"429:2"`` (with Retry-After), or ``""``: none. After the list all is well.
    """

    def __init__(self, files: dict[str, bytes] | None = None, default: bytes | None = None) -> None:
        self.files = dict(files or {})
        self.default = default
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.log: list[tuple[str, str | None, int]] = []  # name, Range header, status
        self.pause_s = 0.0  # between pieces of 64 KiB
        self.times: list[float] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                try:
                    server.answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def requests_of(self, name: str) -> list[tuple[str | None, int]]:
        return [(span, status) for who, span, status in self.log if who == name]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.rsplit("/", 1)[-1]
        with self._lock:
            fault = self.faults[name].pop(0) if self.faults[name] else ""
        body = self.files.get(name, self.default)
        span = handler.headers.get("Range")
        if fault[:3].isdigit() or body is None:
            status, _, wait = fault.partition(":")
            self._status(handler, name, span, int(status or 404), wait)
            return
        etag = f'"{hash(body)}"'
        if fault == "other":
            body, etag = body[::-1] + b"tail", '"other"'
        body = _spoiled(body, fault)
        match = re.fullmatch(r"bytes=(\d+)-", span or "")
        start = int(match[1]) if match and not fault.startswith("norange") else 0
        if_range = handler.headers.get("If-Range")
        if if_range is not None and if_range != etag:
            start = 0
        if start and start >= len(body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            self._note(name, span, 416)
            return
        self._note(name, span, 206 if start else 200)
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.send_header("Content-Length", str(len(body) - start))
        handler.send_header("ETag", etag)
        handler.end_headers()
        self._send(handler, body[start:], fault)

    def _note(self, name: str, span: str | None, status: int) -> None:
        with self._lock:
            self.log.append((name, span, status))
            self.times.append(time.monotonic())

    def _status(
        self, handler: BaseHTTPRequestHandler, name: str, span: str | None, status: int, wait: str
    ) -> None:
        self._note(name, span, status)
        handler.send_response(status)
        if wait:
            handler.send_header("Retry-After", wait)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
        if fault.endswith(("cut", "stall")):
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            if fault == "stall":
                time.sleep(1.0)
            handler.close_connection = True
            return
        for start in range(0, len(body), 1 << 16):
            handler.wfile.write(body[start : start + (1 << 16)])
            time.sleep(self.pause_s)


def _spoiled(body: bytes, fault: str) -> bytes:
    if fault == "short":
        return body[: len(body) // 2]
    if fault == "corrupt":
        return bytes(255 - byte for byte in body)
    if fault == "flip":
        middle = len(body) // 2
        return body[:middle] + bytes([body[middle] ^ 255]) + body[middle + 1 :]
    return body
