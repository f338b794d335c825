"""``python -m jobs.tokenizer``: bad shards and rows are named, or left out and counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import make_texts

from jobs.tokenizer import main
from nanoray.data.writer import write_shard
from nanoray.errors import NanorayError


def test_bad_shards_and_rows_are_named_or_skipped(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "mine"
    for i in range(4):
        texts = make_texts(50, seed=i)
        texts[7] = " " if i in (0, 3) else texts[7]
        write_shard(str(corpus / f"shard_{i:05d}.parquet"), texts)
    flags = ["--corpus", str(corpus), "--vocab-size", "300"]
    with pytest.raises(NanorayError, match=r"shard_00000.*row 7.*--on-bad-shard skip"):
        main(["train", *flags])
    os.truncate(corpus / "shard_00001.parquet", 1000)
    assert main(["train", *flags, "--on-bad-shard", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "left out: 1 empty\n" in printed
    assert "left out: 1 shard damaged\n" in printed
    assert (home / "tokenizers" / "mine").is_dir()
    with pytest.raises(NanorayError, match=r"shard_00003.*row 7"):
        main(["eval", *flags, "--dry-run"])
    assert main(["eval", *flags, "--dry-run", "--on-bad-shard", "skip"]) == 0
    assert "49 validation documents are fine" in capsys.readouterr().out
