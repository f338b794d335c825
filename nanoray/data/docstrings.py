"""English prose that every machine has: the docstrings of the installed Python packages.

Sources are parsed (`ast`), never imported. Packages come in ascending order of the size of their
sources (ties by name): hundreds of small ones, the standard library's among them, come before the
few giants, so that a corpus of 20 MB has many authors instead of three. Within a package files go
by path, within a file docstrings by position. All of it follows from the environment alone.
"""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from nanoray.machine import available_cpus

MIN_CHARS = 80
# Chosen by reading samples of this environment: below these, docstrings are mostly doctests,
# formulas and tables. They drop a fifth of the documents' bytes.
MIN_STOPWORD_SHARE = 0.13
MIN_LETTER_SHARE = 0.6
MIN_ASCII_SHARE = 0.97
_FILES_PER_TASK = 32
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
_WORD = re.compile(r"[A-Za-z]+")
_STOPWORDS = re.compile(
    r"\b(?:a|all|also|an|and|any|are|as|at|be|been|but|by|can|do|each|for|from|has|have|if|in|into"
    r"|is|it|its|may|must|not|of|on|only|or|other|should|so|some|than|that|the|their|then|there|these"
    r"|they|this|to|use|used|was|we|were|when|where|which|will|with|you|your)\b",
    re.IGNORECASE,
)


def iter_docstrings(num_workers: int | None = None) -> Iterator[str]:
    """All English docstrings of the environment in their fixed order, duplicates included.

    Args:
        num_workers: processes (default: the number of cores).
    """
    files = source_files()
    tasks = [files[i : i + _FILES_PER_TASK] for i in range(0, len(files), _FILES_PER_TASK)]
    # spawn: forking a process that has threads (rich, Ray, pytest) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers or available_cpus(), mp_context=context)
    try:
        for documents in pool.map(_docstrings_of_files, tasks):
            yield from documents
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def source_files() -> list[str]:
    """Paths of the ``.py`` files of the standard library and of site-packages, in order."""
    paths = sysconfig.get_paths()
    packages: list[tuple[int, str, list[str]]] = []
    for base in sorted({os.path.realpath(paths[key]) for key in ("stdlib", "purelib", "platlib")}):
        for entry in os.scandir(base):
            files = _python_files(entry)
            if files:
                size = sum(os.path.getsize(file) for file in files)
                packages.append((size, entry.name, files))
    return [file for _size, _name, files in sorted(packages) for file in files]


def _python_files(entry: os.DirEntry[str]) -> list[str]:
    if entry.is_file():
        return [entry.path] if entry.name.endswith(".py") else []
    if not entry.is_dir() or entry.name in _SKIPPED_FOLDERS:
        return []
    found = []
    for folder, subfolders, names in os.walk(entry.path):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(filter(os.path.isfile, found))  # not links to nowhere (editors' lock files)


def _docstrings_of_files(paths: list[str]) -> list[str]:
    return [text for path in paths for text in docstrings_of_file(path)]


def docstrings_of_file(path: str) -> list[str]:
    """The cleaned English docstrings of one source file; none if it cannot be parsed."""
    try:
        with open(path, "rb") as file:
            source = file.read()
        if b'"""' not in source and b"'''" not in source:  # parsing is what takes the time
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        raw = list(_walk(tree))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [text for text in (inspect.cleandoc(doc).strip() for doc in raw) if is_english(text)]


def _walk(node: ast.AST) -> Iterator[str]:
    """Docstrings in order of position. Only statements are entered: expressions hold none."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    for field in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, field, ())
        if isinstance(children, list):
            for child in children:
                yield from _walk(child)


def is_english(text: str) -> bool:
    """Whether ``text`` is long enough and mostly English prose, by shares of its words."""
    if len(text) < MIN_CHARS or "\0" in text:
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    num_ascii = len(text) if text.isascii() else sum(char < "\x80" for char in text)
    if num_ascii < MIN_ASCII_SHARE * len(text):
        return False
    words = _WORD.findall(text)
    num_letters = sum(map(len, words)) + text.count(" ")
    num_stopwords = len(_STOPWORDS.findall(text))
    return num_stopwords >= MIN_STOPWORD_SHARE * max(
        1, len(words)
    ) and num_letters >= MIN_LETTER_SHARE * len(text)
