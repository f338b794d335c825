"""The job before it starts Ray: what it checks, says and refuses."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_cluster import ROOT
from serve_runs import TOKENIZER, save_run, speaker

import jobs.serve
from nanoray.config import ModelChoice, ServeConfig, run_job


@pytest.fixture
def started(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[ModelChoice, ...]]:
    """Runs `talk` (steps 10, 20) and `base`; what the job would serve, without Ray."""
    save_run("talk", 10, speaker("a"))
    save_run("talk", 20, speaker("c"))
    save_run("base", 5, speaker("e"), stage="pretrain")
    served: list[tuple[ModelChoice, ...]] = []

    def serve(config: ServeConfig, models: tuple[ModelChoice, ...]) -> int:
        served.append(models)
        return 0

    monkeypatch.setattr(jobs.serve, "serve", serve)
    return served


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def run(*flags: str) -> int:
    with pytest.raises(SystemExit) as end:
        run_job(jobs.serve.main, flags)
    code = end.value.code
    assert isinstance(code, int)
    return code


def test_the_last_step_is_settled_once_for_all_replicas(
    started: list[tuple[ModelChoice, ...]], home: Path
) -> None:
    assert run("--run", "talk, base@5, talk@10", "--port", "8799") == 0
    assert [(m.name, m.run, m.step) for m in started[-1]] == [
        ("talk", str(home / "runs" / "talk"), 20),
        ("base", str(home / "runs" / "base"), 5),
        ("talk-10", str(home / "runs" / "talk"), 10),
    ]


def test_a_dry_run_loads_and_starts_nothing(
    started: list[tuple[ModelChoice, ...]], capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    assert run("--run", "talk", "--dry-run", "--root-path", "/chat") == 0
    assert "would listen on http://127.0.0.1:8000/chat/" in capsys.readouterr().out
    weights = home / "runs" / "talk" / "checkpoints" / "step_000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run("--run", "talk", "--dry-run") == 1
    assert "damaged" in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("", 2, "give the model"),
        ("--run nobody", 1, "no run nobody"),
        ("--run talk --step 7", 1, "no complete checkpoint of step 7"),
        ("--run talk --api-keys-file /nowhere/keys", 1, "cannot be read"),
        ("--run talk --host nowhere.invalid", 1, "cannot be listened on"),
        ("--run talk --replicas 4:1", 2, "--replicas"),
        ("--run talk --root-path chat/", 2, "--root-path"),
        ("--run talk,talk", 2, "two models are named talk"),
    ],
)
def test_mistakes_are_told(
    started: list[tuple[ModelChoice, ...]],
    capsys: pytest.CaptureFixture[str],
    flags: str,
    code: int,
    message: str,
) -> None:
    assert run(*flags.split()) == code
    assert message in capsys.readouterr().err
    assert not started


def test_a_port_that_is_taken(
    started: list[tuple[ModelChoice, ...]], capsys: pytest.CaptureFixture[str], taken_port: int
) -> None:
    assert run("--run", "talk", "--port", str(taken_port)) == 1
    assert "take another --port" in capsys.readouterr().err


def test_an_open_door_is_warned_of(
    started: list[tuple[ModelChoice, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("--run", "talk", "--port", "8798") == 0
    assert "warning" not in capsys.readouterr().err
    assert run("--run", "talk", "--port", "8798", "--host", "0.0.0.0") == 0
    assert "warning: whoever reaches 0.0.0.0:8798 may ask" in capsys.readouterr().err
    monkeypatch.setenv("NANORAY_API_KEYS", "a-secret-of-ours")
    assert run("--run", "talk", "--port", "8798", "--host", "0.0.0.0") == 0
    said = capsys.readouterr()
    assert "warning" not in said.err
    assert "a-secret-of-ours" not in said.out + said.err


def test_the_tokenizer_is_exported(started: list[tuple[ModelChoice, ...]], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    assert run("--run", "talk", "--export-tokenizer", str(tmp_path / "hf")) == 0
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert exported.encode("Hello", add_special_tokens=False).ids == TOKENIZER.encode("Hello")
    assert not started


def test_the_proxy_does_without_torch() -> None:
    code = "import sys, serve.proxy; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
