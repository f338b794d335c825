"""Downloading against a server that fails in every way; interrupted, doubled, out of room."""

from __future__ import annotations

import os
import random
import signal
import string
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import fsspec
import pytest
from fault_server import FaultServer
from requests.structures import CaseInsensitiveDict

from nanoray import storage
from nanoray.data.corpus import read_corpus
from nanoray.data.download import PUBLISHED, Published, download_corpus, wanted_shards
from nanoray.data.fetch import FileFetch, Patience, Stopped, retry_after_s
from nanoray.data.shards import list_shards, read_row_group
from nanoray.data.writer import write_shard
from nanoray.errors import NanorayError

ROOT = Path(__file__).parents[1]
HURRIED = Patience(attempts=4, connect_s=1, read_s=0.5, backoff_s=0.01, backoff_max_s=0.02)
NAME = "shard_00000.parquet"


def make_shard(folder: Path, num_texts: int, seed: int = 0) -> bytes:
    rng = random.Random(seed)
    letters = string.ascii_letters + " "
    texts = ["".join(rng.choices(letters, k=1000)) for _ in range(num_texts)]
    path = folder / "made.parquet"
    write_shard(str(path), texts, row_group_size=256)
    return path.read_bytes()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_shard(tmp_path_factory.mktemp("made"), 1200)  # about 900 KB


def fetch(server: FaultServer, folder: Path, patience: Patience = HURRIED) -> bool:
    (folder / "aside").mkdir(exist_ok=True)
    return FileFetch(
        f"{server.url}/{NAME}",
        str(folder / NAME),
        folder / "aside",
        patience,
        threading.Event(),
        lambda done, total: None,
        lambda text: None,
    ).run()


@pytest.mark.parametrize(
    ("faults", "statuses"),
    [
        ([], [200]),
        (["cut"], [200, 206]),
        (["cut", "cut", "cut", "cut", "cut", "cut"], [200] + [206] * 6),  # progress: never given up
        (["stall"], [200, 206]),
        (["500", "503", "429"], [500, 503, 429, 200]),
        (["short"], [200, 200]),
        (["corrupt"], [200, 200]),
        (["flip"], [200, 200]),
        (["cut", "norange"], [200, 200]),
        (["cut", "416"], [200, 416, 200]),
        (["cut", "other", "", ""], [200, 200, 200]),  # changed, then changed back
    ],
    ids=lambda value: "-".join(map(str, value)) or "fine",
)
def test_survives(tmp_path: Path, shard: bytes, faults: list[str], statuses: list[int]) -> None:
    with FaultServer({NAME: shard}) as server:
        server.faults[NAME] = list(faults)
        assert fetch(server, tmp_path)
        assert (tmp_path / NAME).read_bytes() == shard
        assert [status for _span, status in server.requests_of(NAME)] == statuses
        assert not fetch(server, tmp_path)  # there already
    assert [p.name for p in (tmp_path / "aside").iterdir()] == [f"{NAME}.lock"]


def test_range_begins_at_what_is_there(tmp_path: Path, shard: bytes) -> None:
    with FaultServer({NAME: shard}) as server:
        server.faults[NAME] = ["cut"]
        fetch(server, tmp_path)
        span, _status = server.requests_of(NAME)[1]
    assert span is not None
    begin = int(span.removeprefix("bytes=").removesuffix("-"))
    assert len(shard) // 2 - (16 << 10) <= begin <= len(shard) // 2


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["404"], "answered 404"),
        (["403"], "answered 403"),
        (["500"] * 9, "the server answered 500, and 4 attempts in a row"),
        (["norange-cut"] * 9, "attempts in a row brought nothing new"),
        (["corrupt"] * 9, "fetched 3 times and is no whole parquet shard"),
        (["flip"] * 9, "fetched 3 times and is no whole parquet shard"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_gives_up_with_a_sentence(
    tmp_path: Path, shard: bytes, faults: list[str], message: str
) -> None:
    with FaultServer({NAME: shard}) as server:
        server.faults[NAME] = list(faults)
        with pytest.raises(NanorayError, match=message):
            fetch(server, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_nobody_there(tmp_path: Path) -> None:
    with FaultServer() as server:
        pass
    with pytest.raises(NanorayError, match="the connection failed"):
        fetch(server, tmp_path)


def test_retry_after_is_honoured(tmp_path: Path, shard: bytes) -> None:
    with FaultServer({NAME: shard}) as server:
        server.faults[NAME] = ["429:1"]
        fetch(server, tmp_path)
        assert server.times[1] - server.times[0] >= 1.0


def test_retry_after_forms() -> None:
    def wait(value: str) -> float:
        return retry_after_s(CaseInsensitiveDict({"retry-after": value}))

    assert wait("7") == 7
    assert 55 < wait(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert wait(formatdate(time.time() - 60, usegmt=True)) == 0
    assert wait("soon") == wait("") == 0


def test_a_damaged_published_shard_is_replaced(tmp_path: Path, shard: bytes) -> None:
    (tmp_path / NAME).write_bytes(shard[: len(shard) // 2])
    with FaultServer({NAME: shard}) as server:
        assert fetch(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == shard


def test_a_stop_ends_the_fetch_and_keeps_the_part(tmp_path: Path, shard: bytes) -> None:
    stop = threading.Event()
    with FaultServer({NAME: shard}) as server:
        job = FileFetch(
            f"{server.url}/{NAME}",
            str(tmp_path / NAME),
            tmp_path,
            HURRIED,
            stop,
            lambda done, total: stop.set() if done > 300_000 else None,
            lambda text: None,
        )
        with pytest.raises(Stopped):
            job.run()
    assert 300_000 < (tmp_path / f"{NAME}.part").stat().st_size < len(shard)


def corpus_at(server: FaultServer, last: int = 9) -> Published:
    return Published("tiny", server.url, last)


def test_corpus_validation_first_and_skips_what_is_there(tmp_path: Path, shard: bytes) -> None:
    home = str(tmp_path / "data")
    with FaultServer(default=shard) as server:
        done = download_corpus(corpus_at(server), home, 3, 2, HURRIED)
        assert (done.fetched, done.present) == (4, 0)
        assert server.log[0][0] == "shard_00009.parquet"
        more = download_corpus(corpus_at(server), home, 4, 2, HURRIED)
        assert (more.fetched, more.present) == (1, 4)
    assert [s.rsplit("_")[-1] for s in list_shards(home)] == [
        f"{i:05d}.parquet" for i in (0, 1, 2, 3, 9)
    ]
    corpus = read_corpus(home)
    assert corpus == more.corpus
    assert corpus.num_documents == 5 * 1200
    assert corpus.fingerprint != done.corpus.fingerprint


def test_corpus_keeps_what_arrived_when_a_shard_is_missing(tmp_path: Path, shard: bytes) -> None:
    names = wanted_shards(Published("tiny", "", 9), 3)
    with (
        FaultServer(dict.fromkeys(names[:-1], shard)) as server,
        pytest.raises(NanorayError, match=r"shard_00002.parquet answered 404"),
    ):
        download_corpus(corpus_at(server), str(tmp_path), 3, 1, HURRIED)
    assert len(list_shards(str(tmp_path))) == 3


def test_corpus_in_an_object_store(shard: bytes) -> None:
    home = "memory://bucket/data/tiny"
    with FaultServer(default=shard) as server:
        server.faults["shard_00000.parquet"] = ["cut"]
        assert download_corpus(corpus_at(server), home, 1, 2, HURRIED).fetched == 2
        assert download_corpus(corpus_at(server), home, 1, 2, HURRIED).present == 2
    shards = list_shards(home)
    assert storage.read_bytes(shards[0]) == shard
    assert len(read_row_group(shards[1], 0)[0]) == 256
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_refusals(tmp_path: Path, shard: bytes) -> None:
    with pytest.raises(NanorayError, match="6542 training shards, but --num-shards is 9999"):
        wanted_shards(PUBLISHED["climbmix"], 9999)
    (tmp_path / "file").write_text("in the way")
    with FaultServer(default=shard) as server:
        with pytest.raises(NanorayError, match="not writable"):
            download_corpus(corpus_at(server), str(tmp_path / "file" / "x"), 1, 1, HURRIED)
        download_corpus(corpus_at(server), str(tmp_path / "a"), 1, 1, HURRIED)
        with pytest.raises(NanorayError, match="another source"):
            download_corpus(Published("other", server.url, 9), str(tmp_path / "a"), 1, 1, HURRIED)


def start_job(home: Path, url: str, *flags: str, prelude: str = "") -> subprocess.Popen[str]:
    code = (
        f"{prelude}\nfrom jobs.data import main\nfrom nanoray.config import run_job\nrun_job(main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "download", "--base-url", url, *flags],
        cwd=ROOT,
        env={**os.environ, "NANORAY_HOME": str(home), "NO_PROXY": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_sigkill_and_again_goes_on_from_the_part(tmp_path: Path) -> None:
    body = make_shard(tmp_path, 4000)
    part = tmp_path / "home/data/climbmix/.download/shard_06542.parquet.part"
    with FaultServer(default=body) as server:
        server.pause_s = 0.1
        job = start_job(tmp_path / "home", server.url, "--num-shards", "1")
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size > len(body) // 4):
            assert time.monotonic() < deadline
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        have = part.stat().st_size
        server.pause_s = 0.0
        job = start_job(tmp_path / "home", server.url, "--num-shards", "1")
        output = job.communicate(timeout=60)[0]
        assert job.returncode == 0, output
        assert server.requests_of("shard_06542.parquet") == [(None, 200), (f"bytes={have}-", 206)]
    assert "2 shards fetched" in output
    assert (tmp_path / "home/data/climbmix/shard_06542.parquet").read_bytes() == body


@pytest.mark.slow
def test_two_jobs_fetch_each_shard_once(tmp_path: Path, shard: bytes) -> None:
    with FaultServer(default=shard) as server:
        server.pause_s = 0.05
        flags = ("--num-shards", "3", "--num-workers", "2")
        jobs = [start_job(tmp_path, server.url, *flags) for _ in range(2)]
        outputs = [job.communicate(timeout=60)[0] for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], outputs
        assert sorted(name for name, _span, _status in server.log) == sorted(
            wanted_shards(PUBLISHED["climbmix"], 3)
        )


def test_a_full_disk_is_a_sentence(tmp_path: Path, shard: bytes) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    with FaultServer(default=shard) as server:
        job = start_job(tmp_path, server.url, "--num-shards", "1", prelude=limit)
        output = job.communicate(timeout=60)[0]
    assert job.returncode == 1
    assert "error: there is no room to write" in output
    assert "Traceback" not in output
