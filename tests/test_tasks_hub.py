"""The tasks' data through the real `datasets`, from a local server with the hub's routes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "a" * 40
DATASET = "datasets/allenai/ai2_arc"
SHARD = "ARC-Easy/test-00000-of-00001.parquet"
CARD = """---
configs:
- config_name: ARC-Easy
  data_files:
  - split: test
    path: ARC-Easy/test-*
---
"""


def rows_as_parquet() -> bytes:
    choices = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    row = {"id": "x", "question": "Größe?", "choices": choices, "answerKey": "2"}
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row] * 3), sink)
    return sink.getvalue()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: ClassVar = {"README.md": CARD.encode(), SHARD: rows_as_parquet()}

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith(f"{DATASET}/resolve/") and name in self.files:
            self.answer(self.files[name])
        elif path.startswith(f"api/{DATASET}/tree/"):
            folder = path.partition(COMMIT)[2].strip("/")
            entries = [self.entry(name) for name in self.files if os.path.dirname(name) == folder]
            if not folder:
                entries.append(
                    {"type": "directory", "path": "ARC-Easy", "oid": "d" * 40, "size": 0}
                )
            self.answer(json.dumps(entries).encode())
        elif path.startswith(f"api/{DATASET}"):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": "allenai/ai2_arc", "sha": COMMIT, "siblings": siblings, "tags": []}
            self.answer(json.dumps(about).encode())
        else:
            self.answer(b'{"error": "Entry not found"}', 404)

    def entry(self, name: str) -> dict[str, object]:
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def answer(self, body: bytes, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_a_split_comes_from_the_hub_once(endpoint: str, tmp_path: Path) -> None:
    code = """
from nanoray.errors import NanorayError
from nanoray.tasks.catalog import Sources, load_task
task = load_task("arc-easy", "test", Sources())
print(len(task), task.example(2)["messages"][0]["content"].split()[0])
if not ONLINE: raise SystemExit
try: load_task("arc-challenge", "test", Sources())
except NanorayError as error: print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "NANORAY_HOME": str(tmp_path)}

    def load(url: str, online: bool) -> list[str]:
        command = [sys.executable, "-c", f"ONLINE = {online}{code}"]
        output = subprocess.check_output(
            command, env=environment | {"HF_ENDPOINT": url}, text=True, timeout=100
        )
        return output.splitlines()

    rows, mistake = load(endpoint, True)
    assert rows == "3 Größe?"
    assert "could not be loaded from the Hugging Face hub" in mistake
    assert "'ARC-Challenge' not found" in mistake
    assert load("http://127.0.0.1:9", False) == [rows]  # nobody answers there
