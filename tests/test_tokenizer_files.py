"""Stored tokenizers: what is saved comes back, what is damaged is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = ["some text that repeats, some text that repeats again and again"] * 3
BPE = train_tokenizer(TEXTS, 280)
TEXT = "some text, 12 and é😀\n"


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "byte"])
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "deep" / "tok")
    loaded = load_tokenizer(tmp_path / "deep" / "tok")
    assert type(loaded) is type(tokenizer)
    for other in (loaded, Tokenizer.from_files(tokenizer.to_files())):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.vocab_size == tokenizer.vocab_size
        assert other.special_tokens == tokenizer.special_tokens
        assert other.encode(TEXT) == tokenizer.encode(TEXT)
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint
    assert BPE.fingerprint != ByteTokenizer().fingerprint


def test_object_stores_work_too() -> None:
    BPE.save("memory://bucket/tok")
    assert load_tokenizer("memory://bucket/tok").fingerprint == BPE.fingerprint


def test_saving_over_another_switches_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BPE.save(tmp_path)
    new = train_tokenizer(TEXTS, 275)
    write = storage.write_bytes

    def fail_at_json(uri: str, data: bytes) -> None:
        if uri.endswith("tokenizer.json"):
            raise OSError("disk full")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", fail_at_json)
    with pytest.raises(OSError, match="disk full"):
        new.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == BPE.fingerprint
    monkeypatch.undo()
    new.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == new.fingerprint
    assert len(list(tmp_path.iterdir())) == 2  # the old rank file is gone


def test_wrong_kind_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NanorayError, match=r"no tokenizer in .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    BPE.save(tmp_path)
    with pytest.raises(NanorayError, match="kind is 'bpe', expected byte"):
        ByteTokenizer.load(tmp_path)
    assert isinstance(BPETokenizer.load(tmp_path), BPETokenizer)


FILES = BPE.to_files()
RANKS = next(name for name in FILES if name.startswith("ranks-"))
LINES = FILES[RANKS].split(b"\n")[:-1]


def with_line(number: int, line: bytes) -> dict[str, bytes]:
    lines = [*LINES[: number - 1], line, *LINES[number:]]
    return FILES | {RANKS: b"\n".join(lines) + b"\n"}


def with_meta(**changes: object) -> dict[str, bytes]:
    meta = json.loads(FILES["tokenizer.json"]) | changes
    return FILES | {"tokenizer.json": json.dumps(meta).encode()}


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "tokenizer.json is missing"),
        ({"tokenizer.json": FILES["tokenizer.json"]}, f"{RANKS}.*is missing"),
        (FILES | {"tokenizer.json": b'{\n"a": }'}, r"tokenizer\.json, line 2: no JSON"),
        (FILES | {"tokenizer.json": b"\xff\xfe"}, "no UTF-8"),
        (FILES | {"tokenizer.json": b"[]"}, "format"),
        (with_meta(format="other"), "format"),
        (with_meta(version=2), "version 2 is not known"),
        (with_meta(kind="sentencepiece"), "kind is 'sentencepiece', expected bpe or byte"),
        (with_meta(kind=["bpe"]), "kind is"),
        (with_meta(special_tokens=["<|bos|>"]), "special_tokens must be"),
        (with_meta(vocab_size=281), "vocab_size is 281.*271 ranks"),
        (with_meta(pattern="(unclosed"), "does not compile"),
        (with_meta(pattern=None), "pattern"),
        (with_meta(ranks_file=None), "ranks_file"),
        (with_meta(ranks_file="gone"), "gone.*missing"),
        (with_meta(ranks_sha256="00"), "another sha256"),
        (with_line(5, b"!!!! 4"), f"{RANKS}, line 5: bad base64"),
        (with_line(5, b"BA== 3"), f"{RANKS}, line 5: the rank is 3, expected 4"),
        (with_line(5, b"BA== x"), f"{RANKS}, line 5: the rank is x"),
        (with_line(5, b"BA=="), f"{RANKS}, line 5: expected `<base64> <rank>`"),
        (with_line(5, b""), f"{RANKS}, line 5: expected"),
        (with_line(5, LINES[3].split()[0] + b" 4"), f"{RANKS}, line 5: the same token"),
        (with_line(5, b"YWJjZGVmZw== 4"), "1 of the 256 single bytes"),
        (FILES | {RANKS: b"\n".join(LINES[:265]) + b"\n"}, "another sha256"),
        (FILES | {RANKS: b""}, "256 of the 256"),
    ],
)
def test_damage_is_named(files: dict[str, bytes], match: str) -> None:
    with pytest.raises(NanorayError, match=match) as caught:
        Tokenizer.from_files(files, where="the store")
    assert "cannot load the tokenizer from the store" in str(caught.value)


def test_damaged_byte_tokenizer() -> None:
    meta = json.loads(ByteTokenizer().to_files()["tokenizer.json"]) | {"vocab_size": 256}
    with pytest.raises(NanorayError, match="257"):
        Tokenizer.from_files({"tokenizer.json": json.dumps(meta).encode()})
