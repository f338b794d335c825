"""Everything a run leaves, on ``s3://``: against a local server that speaks S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from conftest import make_texts
from engine_models import one_thread  # noqa: F401
from pretrain_runs import run_plan, tiny_flags, tiny_plan
from serve_cluster import free_port, wait_for
from serve_runs import TOKENIZER, save_run, speaker

import jobs.data
import jobs.status
import jobs.tokenizer
from nanoray import storage
from nanoray.checkpoint import Checkpoint, list_steps
from nanoray.config.serve import ChatServiceConfig
from nanoray.engine import SamplingParams
from nanoray.errors import NanorayError
from nanoray.lease import Lease, read_lease
from serve.host import Host

pytest.importorskip("s3fs", reason="s3:// needs s3fs (the extra `s3`)")
moto_server = pytest.importorskip("moto.server", reason="the local S3 server needs moto[server]")

ROOT = Path(__file__).parents[1]
DEADLINE_S = 240


@pytest.fixture(scope="module")
def endpoint() -> Iterator[None]:
    """A server on loopback; all of this module and what it starts go there."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-of-s3")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    server.stop()


@pytest.fixture
def bucket(endpoint: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A NANORAY_HOME in a new bucket."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    fs, _path = storage.filesystem(f"s3://{name}")
    fs.mkdir(name)
    monkeypatch.setenv("NANORAY_HOME", f"s3://{name}/home")
    return f"s3://{name}/home"


def build(folder: Path) -> None:
    """A corpus `mine` and its tokenizer in NANORAY_HOME."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(800)))
    data = ["build", "--corpus", "mine", "--from", str(texts), "--shard-chars", "100000"]
    assert jobs.data.main(data) == 0
    assert jobs.tokenizer.main(["train", "--corpus", "mine", "--vocab-size", "400"]) == 0


def test_files(bucket: str) -> None:
    a, b = storage.join(bucket, "sub", "a.txt"), storage.join(bucket, "sub", "deep", "b.bin")
    assert storage.list_names(bucket) == []
    assert not storage.exists(a)
    storage.write_text(a, "grüße")
    storage.write_bytes(b, memoryview(b"\x00\x01"))
    assert storage.exists(a)
    assert storage.exists(storage.join(bucket, "sub"))
    assert storage.list_names(storage.join(bucket, "sub")) == ["a.txt", "deep"]
    before = storage.version(a)
    storage.write_text(a, "new")
    assert storage.version(a) != before
    assert storage.read_text(a) == "new"
    with storage.staged(b) as path:
        Path(path).write_bytes(b"large")
    with storage.local_copy(b) as path:
        assert Path(path).read_bytes() == b"large"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(bucket, "nothing"))
    storage.check_writable(bucket)
    storage.remove(storage.join(bucket, "sub"))
    assert storage.list_names(bucket) == []


def test_a_write_by_another_is_seen_at_once(bucket: str) -> None:
    """Listings that this process has read must not hide what others write since."""
    folder = storage.join(bucket, "runs", "r")
    assert not storage.exists(storage.join(folder, "lease.json"))
    code = "import sys; from nanoray import storage; storage.write_text(sys.argv[1], '{}')"
    subprocess.run([sys.executable, "-c", code, storage.join(folder, "lease.json")], check=True)
    assert storage.list_names(folder) == ["lease.json"]
    assert storage.exists(storage.join(folder, "lease.json"))


def test_a_lease(bucket: str) -> None:
    folder = storage.join(bucket, "runs", "r")
    lease = Lease(folder)
    try:
        with pytest.raises(NanorayError, match="is being written by process"):
            Lease(folder)
    finally:
        lease.release()
    found = read_lease(folder)
    assert found is not None
    assert found["released"]


def test_a_bucket_that_is_not_there(endpoint: None) -> None:
    with pytest.raises(NanorayError, match="is not writable") as told:
        storage.check_writable("s3://nobody-has-this-bucket/home")
    assert "test-secret-of-s3" not in str(told.value)


def test_corpus_and_tokenizer(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path)
    assert jobs.data.main(["inspect", "--corpus", "mine"]) == 0
    assert "800" in capsys.readouterr().out
    assert jobs.tokenizer.main(["eval", "--corpus", "mine", "--show", "the river"]) == 0


def test_models_are_served_and_swapped(bucket: str, one_thread: None) -> None:  # noqa: F811
    """As a replica loads them: a name and a URI; a broken checkpoint leaves the old one."""
    save_run("talk", 10, speaker("a"))
    host = Host(drain_s=5)
    try:
        host.reconfigure(chat_service(run="talk"))
        assert say(host) == "abab"
        save_run("other", 5, speaker("c"))
        host.reconfigure(chat_service(run=storage.run_dir("other")))
        assert say(host) == "cdcd"
        folder = save_run("other", 6, speaker("e"))
        weights = storage.join(folder, "model.safetensors")
        storage.write_bytes(weights, storage.read_bytes(weights)[:-100])
        with pytest.raises(NanorayError):
            host.reconfigure(chat_service(run=folder))
        assert say(host) == "cdcd"
    finally:
        host.close()


def chat_service(run: str) -> ChatServiceConfig:
    models = [{"name": "chat", "run": run}]
    return ChatServiceConfig.model_validate(
        {"models": models, "num_slots": 4, "max_len": 600, "dtype": "float32"}
    )


def say(host: Host) -> str:
    prompt = TOKENIZER.render_for_completion({"messages": [{"role": "user", "content": "hi"}]})
    params = SamplingParams(temperature=0, max_tokens=4)
    return host.model(None).engine.generate([prompt], params)[0].text


@pytest.mark.slow
def test_a_run_without_ray_resumes(bucket: str, tmp_path: Path) -> None:
    """Checkpoints, log, samples: stopped at step 8, gone on to the end, as in one go."""
    build(tmp_path)
    tokenizer = storage.tokenizer_dir("mine")
    corpus = storage.data_dir("mine")
    whole = tiny_plan(corpus, tokenizer, "whole", num_iterations=12)
    run_plan(whole)
    again = tiny_plan(corpus, tokenizer, "again", num_iterations=12)
    run_plan(again, stop_step=8)
    (stopped,) = list_steps(again.checkpoints_dir)
    assert 1 <= stopped < 12
    assert run_plan(again)["status"] == "finished"
    with Checkpoint(whole.checkpoints_dir, 12) as a, Checkpoint(again.checkpoints_dir, 12) as b:
        assert a.meta["step"] == b.meta["step"] == 12
    files = [storage.join(p.checkpoints_dir, "step_000012", "model.safetensors")
             for p in (whole, again)]  # fmt: skip
    assert storage.read_bytes(files[0]) == storage.read_bytes(files[1])


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_jobs_on_a_bucket(
    bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a user runs them: pretraining through Ray is stopped, goes on, is measured, talks, and is
    served.
    """
    build(tmp_path)
    flags = tiny_flags("mine", "mine", "r", num_iterations=300, save_every=50)
    command = [sys.executable, "-m", "jobs.pretrain", *flags]
    first = subprocess.Popen(command, cwd=ROOT, env=os.environ)
    log = storage.join(storage.run_dir("r"), "checkpoints")
    deadline = time.monotonic() + DEADLINE_S
    while not list_steps(log):  # on a bucket the log comes with the checkpoints
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    first.wait(DEADLINE_S)
    stopped = list_steps(log)[-1]
    assert "run r stopped" in capfd.readouterr().out or stopped == 300
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE_S)
    assert "run r finished" in capfd.readouterr().out
    assert list_steps(log)[-1] == 300

    metrics = storage.read_text(storage.join(storage.run_dir("r"), "metrics.jsonl"))
    records = [json.loads(line) for line in metrics.splitlines()]
    told = {r["step"]: r["batch_hash"] for r in records if "batch_hash" in r}
    assert list(told) == list(range(1, 301))
    assert jobs.status.main([]) == 0
    assert "finished" in capfd.readouterr().out

    for words in (["jobs.eval", "bpb", "--run", "r", "--eval-tokens", "2048"],
                  ["jobs.chat", "--run", "r", "-p", "The river"]):  # fmt: skip
        subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, timeout=DEADLINE_S)
    assert storage.list_names(storage.join(storage.run_dir("r"), "evals"))

    port = free_port()
    words = ["jobs.serve", "--run", "r", f"--port={port}", "--dtype=float32"]
    server = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}/v1/completions"
        asked = {"prompt": "The river", "max_tokens": 4}

        def answer() -> bool:
            assert server.poll() is None
            try:
                return requests.post(url, json=asked, timeout=30).ok
            except requests.ConnectionError:
                return False

        wait_for(answer, DEADLINE_S, "an answer")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(DEADLINE_S)
