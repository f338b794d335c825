"""``python -m jobs.data``: flags, exit codes, sentences."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_server import FaultServer

from jobs.data import main
from nanoray.config import run_job
from nanoray.data.shards import list_shards
from nanoray.data.writer import write_shard

ROOT = Path(__file__).parents[1]
Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Runs the job in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("NANORAY_HOME", str(tmp_path / "home"))

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            run_job(main, argv)
        out, err = capsys.readouterr()
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return code or 0, out, err

    return run


def words_file(folder: Path) -> str:
    path = folder / "words.txt"
    path.write_text("\n\n".join(f"Paragraph {i} is here. " * 20 for i in range(200)))
    return str(path)


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jobs.data", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert "download" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray"}


@pytest.mark.parametrize("word", ["download", "build", "repackage", "inspect"])
def test_help_tells_every_flag(job: Job, word: str) -> None:
    code, out, _err = job(word, "--help")
    assert code == 0
    assert "--dry-run" in out
    assert "--corpus" in out
    assert "default:" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: python -m jobs.data"),
        (["frobnicate"], "usage: python -m jobs.data"),
        (["build", "--bogus", "1"], "unrecognized arguments: --bogus"),
        (["build", "--corpus", "mine"], "--corpus mine needs --from"),
        (["build", "--on-bad-shard", "maybe"], "--on-bad-shard"),
        (["download", "--num-shards", "0"], "--num-shards: Input should be greater"),
        (["download", "--corpus", "other"], "--corpus"),
        (["download", "--base-url", "ftp://x"], "not an http:// or https:// address"),
        (["repackage", "--corpus", "x"], "repackage needs --from OLD and --corpus NEW"),
        (["inspect", "--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_2(job: Job, argv: list[str], message: str) -> None:
    code, out, err = job(*argv)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "--corpus", "nope"], "no corpus at"),
        (["build", "--corpus", "x", "--from", "/nowhere"], "no file or folder /nowhere"),
        (["build", "--corpus", "../x y"], "needs --from"),
        (["download", "--num-shards", "6543"], "has 6542 training shards"),
        (["repackage", "--corpus", "x", "--from", "nope"], "no file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_failure_is_1_or_2_with_one_sentence(job: Job, argv: list[str], message: str) -> None:
    code, _out, err = job(*argv)
    assert code in (1, 2)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_build_then_inspect(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = words_file(tmp_path)
    code, out, _err = job("build", "--corpus", "words", "--from", source, "--dry-run")
    assert code == 0
    assert "dry run" in out
    folder = str(tmp_path / "home/data/words")
    assert os.listdir(folder) == []
    assert job("build", "--corpus", "words", "--from", source)[0] == 0
    assert len(list_shards(folder)) == 9
    code, out, _err = job("inspect", "--corpus", "words", "--num-documents", "1")
    assert code == 0
    assert "9 shards (the last for validation), 9 row groups" in out
    assert "--- document 1" in out
    assert "no problems" in out
    os.truncate(list_shards(folder)[3], 1000)
    write_shard(list_shards(folder)[4], ["fine", " ", "fine"])
    code, out, _err = job("inspect", "--corpus", "words")
    assert code == 1
    assert "shard_00003.parquet: " in out
    assert "shard_00004.parquet: row group 0: empty or white-space rows: 1" in out
    assert "2 of 9 shards have problems" in out


def test_environment_and_yaml(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"corpus: words\nsource: {words_file(tmp_path)}\ndry-run: true\n")
    code, out, _err = job("build", "--config", str(config))
    assert code == 0
    assert "data/words" in out
    monkeypatch.setenv("NANORAY_CORPUS", "from-env")
    assert "data/from-env" in job("build", "--config", str(config))[1]
    assert "data/flag" in job("build", "--config", str(config), "--corpus", "flag")[1]
    config.write_text("corpuss: words\n")
    code, _out, err = job("build", "--config", str(config))
    assert code == 2
    assert "unknown keys: corpuss" in err


def test_a_dry_run_says_what_the_job_would_refuse(job: Job, tmp_path: Path) -> None:
    flags = ("build", "--corpus", "words", "--from", words_file(tmp_path))
    assert "holds a corpus" not in job(*flags, "--dry-run")[1]
    assert job(*flags)[0] == 0
    code, out, _err = job(*flags, "--seed", "7", "--dry-run")
    assert code == 0
    assert "data/words holds a corpus, which stays: if made of other data" in out
    code, _out, err = job(*flags, "--seed", "7")
    assert code == 1
    assert "already holds a corpus of another source: seed 42 instead of 7; delete" in err
    other = tmp_path / "home" / "data" / "climbmix"
    other.mkdir(parents=True)
    (other / "corpus.json").write_text('{"source": {"kind": "files"}, "complete": true}')
    code, _out, err = job("download", "--dry-run")
    assert code == 1
    assert "holds a corpus of another source: kind 'files' instead of 'download'" in err
    (other / "corpus.json").write_text('{"source": null, "complete": true}')
    code, _out, err = job("download")
    assert code == 1
    assert "corpus.json is not a corpus description" in err


def test_left_out_files_are_told(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    words_file(folder)
    (folder / "page.html").write_text("<p>")
    out = job("build", "--corpus", "words", "--from", str(folder), "--dry-run")[1]
    assert "left out: 1 files of other kinds than .parquet" in out


def test_download(job: Job, tmp_path: Path) -> None:
    write_shard(str(tmp_path / "x.parquet"), [f"document {i}" for i in range(100)])
    with FaultServer(default=(tmp_path / "x.parquet").read_bytes()) as server:
        flags = ("--base-url", server.url, "--num-shards", "2")
        code, out, _err = job("download", *flags, "--dry-run")
        assert code == 0
        assert "0 are there, 3 would be fetched" in out
        assert server.log == []
        code, out, _err = job("download", *flags)
        assert code == 0
        assert "3 shards fetched, 0 were there" in out
        assert "3 shards (the last for validation), 300 documents" in out
        assert "3 are there, 0 would be fetched" in job("download", *flags, "--dry-run")[1]
    code, _out, err = job("download", "--base-url", server.url + "/gone", "--num-shards", "2")
    assert code == 0, err  # nothing is missing, so the server is not asked
