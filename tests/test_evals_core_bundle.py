"""Bundles that are damaged, and how they come from the network."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fault_server import FaultServer
from hypothesis import given
from hypothesis import strategies as st

from nanoray.data.fetch import Patience
from nanoray.errors import NanorayError
from nanoray.evals.core_bundle import Example, parse_example, read_bundle
from nanoray.evals.core_download import download_bundle, unpack_bundle

CHOICE = {"query": "q", "choices": ["a", "b"], "gold": 1}
ENTRY = {
    "label": "toy",
    "dataset_uri": "words/toy.jsonl",
    "num_fewshot": [1],
    "icl_task_type": "multiple_choice",
}
BASELINES = 'Eval Task,Random baseline,Description\ntoy,25,"one, two"\n'


def write(folder: Path, entry: dict | None = None, lines: list[str] | None = None) -> str:
    (folder / "eval_data" / "words").mkdir(parents=True)
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [ENTRY | (entry or {})]}))
    (folder / "eval_meta_data.csv").write_text(BASELINES)
    text = "".join(line + "\n" for line in lines or [json.dumps(CHOICE)] * 3)
    (folder / "eval_data" / "words" / "toy.jsonl").write_text(text)
    return str(folder)


def test_reads_a_bundle(tmp_path: Path) -> None:
    (task,) = read_bundle(write(tmp_path))
    assert (task.label, task.kind, task.num_fewshot) == ("toy", "multiple_choice", 1)
    assert (task.delimiter, task.baseline) == (" ", 0.25)
    assert task.examples == (Example(("q", "q"), ("a", "b"), 1),) * 3
    with pytest.raises(NanorayError, match="no CORE task 'tou'; there are toy"):
        read_bundle(str(tmp_path), ["tou"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"icl_task_type": "essay"}, r"core.yaml, task toy: icl_task_type is 'essay'"),
        ({"dataset_uri": "../toy.jsonl"}, r"task toy: dataset_uri '../toy.jsonl' is no path"),
        ({"dataset_uri": "/etc/passwd"}, r"is no path inside eval_data/"),
        ({"dataset_uri": "words/none.jsonl"}, r"no file .*words/none.jsonl"),
        ({"dataset_uri": "words"}, r"words"),
        ({"num_fewshot": 10}, r"num_fewshot is 10, and must be like \[10\]"),
        ({"num_fewshot": [-1]}, r"num_fewshot"),
        ({"num_fewshot": [True]}, r"num_fewshot"),
        ({"num_fewshot": [3]}, r"toy.jsonl has 3 examples, too few to show 3"),
        ({"label": None}, r"core.yaml, task 1 has no label"),
        ({"label": "other"}, r"eval_meta_data.csv has no line for the task other"),
        ({"continuation_delimiter": 3}, r"continuation_delimiter 3 is no text"),
    ],
)
def test_malformed_tasks(tmp_path: Path, entry: dict, message: str) -> None:
    with pytest.raises(NanorayError, match=message):
        read_bundle(write(tmp_path, entry))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q"', r"no JSON"),
        ("", r"no JSON"),
        ("[" * 100_000, r"no JSON"),
        ("[1]", r"not a JSON object"),
        (json.dumps(CHOICE | {"gold": 2}), r"gold is 2, and must be one of 0 to 1"),
        (json.dumps(CHOICE | {"gold": True}), r"gold is True"),
        (json.dumps(CHOICE | {"query": " "}), r"query is ' '"),
        (json.dumps(CHOICE | {"choices": ["a"]}), r"choices must be a list of at least two"),
        (json.dumps(CHOICE | {"choices": ["a", 7]}), r"choices is 7"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    folder = write(tmp_path, lines=[json.dumps(CHOICE), line, json.dumps(CHOICE)])
    with pytest.raises(NanorayError, match=rf"toy.jsonl, line 2: {message}"):
        read_bundle(folder)


def damage_config(folder: Path) -> None:
    (folder / "core.yaml").write_text("icl_tasks: [")


def damage_twice(folder: Path) -> None:
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [ENTRY, ENTRY]}))


def damage_list(folder: Path) -> None:
    (folder / "core.yaml").write_text("- 1\n")


def damage_baseline(folder: Path) -> None:
    (folder / "eval_meta_data.csv").write_text(BASELINES.replace("25", "a lot"))


def damage_columns(folder: Path) -> None:
    (folder / "eval_meta_data.csv").write_text("a,b\n")


def damage_encoding(folder: Path) -> None:
    (folder / "eval_data" / "words" / "toy.jsonl").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "core.yaml is no YAML"),
        (damage_twice, "task 2: the label toy is there twice"),
        (damage_list, "core.yaml has no list icl_tasks"),
        (damage_baseline, "eval_meta_data.csv, line 2: Random baseline is 'a lot'"),
        (damage_columns, "eval_meta_data.csv has no column 'Eval Task'"),
        (damage_encoding, "toy.jsonl is no UTF-8 text"),
    ],
)
def test_malformed_files(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write(tmp_path)
    damage(tmp_path)
    with pytest.raises(NanorayError, match=message):
        read_bundle(folder)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(NanorayError, match=r"no file .*core.yaml; give the folder"):
        read_bundle(str(tmp_path / "nothing"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["query", "choices", "gold", "context", "context_options", "continuation"])


@given(
    st.sampled_from(["multiple_choice", "schema", "language_modeling"]),
    st.dictionaries(KEYS, JSON | st.lists(st.text(max_size=3), min_size=2, max_size=3)),
)
def test_any_object_is_an_example_or_a_value_error(kind, item) -> None:
    try:
        example = parse_example(kind, json.dumps(item))
    except ValueError:
        return
    assert len(example.contexts) == len(example.continuations) > example.gold >= 0
    assert all(map(str.strip, example.contexts + example.continuations))


def archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in files.items():
            bundle.writestr(name, text)
    return buffer.getvalue()


WHOLE = {
    "eval_bundle/core.yaml": yaml.safe_dump({"icl_tasks": [ENTRY]}),
    "eval_bundle/eval_meta_data.csv": BASELINES,
    "eval_bundle/eval_data/words/toy.jsonl": (json.dumps(CHOICE) + "\n") * 3,
    "__MACOSX/eval_bundle/._core.yaml": "",
}
HASTY = Patience(attempts=2, backoff_s=0.01, connect_s=1, read_s=1)


def test_download_once(home: Path) -> None:
    with FaultServer({"eval_bundle.zip": archive(WHOLE)}) as server:
        server.faults["eval_bundle.zip"] = ["503", "cut"]
        url = f"{server.url}/eval_bundle.zip"
        folder = download_bundle(url=url, patience=Patience(backoff_s=0.01))
        assert Path(folder) == home / "eval_bundle"
        assert [task.label for task in read_bundle(folder)] == ["toy"]
        requests = len(server.log)
        assert download_bundle(url=url) == folder
        assert len(server.log) == requests
    assert not (home / "eval_bundle" / "._core.yaml").exists()


def test_download_without_a_network(home: Path) -> None:
    with FaultServer() as server:
        url = f"{server.url}/eval_bundle.zip"
    with pytest.raises(
        NanorayError, match=r"could not be downloaded.*copy a bundle .* to .*eval_b"
    ):
        download_bundle(url=url, patience=HASTY)


@pytest.mark.parametrize(
    "name", ["eval_bundle/../../evil", "/evil", "../evil", "eval_bundle/C:evil", "a\\..\\evil"]
)
def test_archives_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(archive(WHOLE | {name: "evil"}))
    target = tmp_path / "home" / "bundle"
    with pytest.raises(NanorayError, match="outside of its folder"):
        unpack_bundle(path, str(target))
    assert not target.exists()


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "flipped"])
def test_damaged_archives(tmp_path: Path, damage: str) -> None:
    content = archive(WHOLE)
    path = tmp_path / "bundle.zip"
    middle = content.index(b"eval_bundle/core.yaml") + 40
    flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    damaged = {"truncated": content[:-40], "noise": b"no zip" * 100, "flipped": flipped}
    path.write_bytes(damaged.get(damage, archive({})))
    with pytest.raises(NanorayError, match=r"bundle.zip (is no whole zip|has no eval_bundle/core)"):
        unpack_bundle(path, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "core.yaml").exists()
