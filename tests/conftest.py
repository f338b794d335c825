"""What tests share: a home of their own, a small English-like corpus, one Ray session."""

from __future__ import annotations

import os
import random
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _private_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's home, nor sees the user's settings.

    Nothing is put back: the process ends, and Ray's threads may read the environment meanwhile.
    """
    home = tmp_path_factory.mktemp("home")
    for name in [n for n in os.environ if n.startswith(("NANORAY_", "RAY_ADDRESS"))]:
        del os.environ[name]
    os.environ |= {
        "HOME": str(home),
        "NANORAY_HOME": str(home / "nanoray"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TIKTOKEN_CACHE_DIR": os.environ.get("TIKTOKEN_CACHE_DIR", str(home / "tiktoken")),
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh NANORAY_HOME for one test."""
    monkeypatch.setenv("NANORAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def local_root(tmp_path: Path) -> str:
    """A folder for checkpoints."""
    return str(tmp_path / "checkpoints")


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 1 MB or of the size that is its parameter."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size={getattr(request, 'param', '1m')}",
        "tmpfs",
        str(folder),
    ]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, local_root: str) -> str:
    """A place for checkpoints: a folder, and a bucket of an object store."""
    bucket = f"memory://bucket-{uuid.uuid4().hex[:8]}/checkpoints"
    return local_root if request.param == "local" else bucket


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets beside the repository; tests that need them skip without."""
    if not SHARED.is_dir():
        pytest.skip(f"no data sets at {SHARED}")
    return SHARED


def make_texts(num_documents: int, seed: int = 0) -> list[str]:
    """Documents of made-up sentences over a small vocabulary: learnable, and all different."""
    rng = random.Random(seed)
    nouns = "river mountain teacher engine garden window letter captain winter orchard".split()
    verbs = "follows opens carries answers watches builds remembers crosses paints keeps".split()
    adjectives = "quiet old bright narrow heavy green distant careful wooden simple".split()
    texts = []
    for i in range(num_documents):
        sentences = [
            f"The {rng.choice(adjectives)} {rng.choice(nouns)} {rng.choice(verbs)} the "
            f"{rng.choice(adjectives)} {rng.choice(nouns)}."
            for _ in range(rng.randint(1, 30))
        ]
        texts.append(f"Story {i}. " + " ".join(sentences))
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of 3 training shards and a validation shard, with small row groups."""
    from nanoray.data.writer import write_shard

    folder = tmp_path_factory.mktemp("corpus") / "stories"
    for i in range(4):
        texts = make_texts(400, seed=i)
        write_shard(str(folder / f"shard_{i:05d}.parquet"), texts, row_group_size=50)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BPE tokenizer of 512 ids, trained on the corpus's kind of text."""
    from nanoray.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "stories"
    train_tokenizer(make_texts(400), 400).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need it."""
    import ray

    from nanoray import fleet

    fleet.connect()
    yield
    ray.shutdown()
