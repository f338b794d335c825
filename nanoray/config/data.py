"""Configuration of the data jobs (``python -m jobs.data …``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from nanoray.config.base import JobConfig


class DownloadConfig(JobConfig):
    """``python -m jobs.data download``: fetch shards of a published corpus."""

    corpus: Literal["climbmix", "fineweb-edu"] = Field(
        "climbmix", description="which corpus, and its name under NANORAY_HOME/data"
    )
    num_shards: int = Field(
        8, ge=1, description="training shards (the validation shard is always fetched too)"
    )
    num_workers: int = Field(8, ge=1, le=64, description="connections at once")
    base_url: str | None = Field(
        None, description="where the shards are served (default: Hugging Face)"
    )


class BuildConfig(JobConfig):
    """``python -m jobs.data build``: make a corpus from docstrings or from your files."""

    model_config = SettingsConfigDict(cli_shortcuts={"source": "from"})

    corpus: str = Field("docstrings", description="name under NANORAY_HOME/data, or a path or URI")
    source: str | None = Field(
        None,
        description="your parquet, JSONL (.gz) or text files: PATH, GLOB, folder or URI "
        "(default: the docstrings of the installed packages)",
    )
    text_column: str = Field("text", description="parquet column or JSON key of the text")
    max_bytes: int = Field(20_000_000, ge=10_000, description="bytes of text (docstrings only)")
    seed: int = Field(42, ge=0, le=2**63 - 1, description="of the shuffle")
    shard_chars: int = Field(250_000_000, ge=1000, description="characters of a shard at most")
    num_workers: int | None = Field(
        None, ge=1, description="processes that parse docstrings (default: cores)"
    )
    on_bad_shard: Literal["fail", "skip"] = Field(
        "fail", description="unusable rows: stop and name them, or leave them out and count"
    )


class RepackageConfig(JobConfig):
    """``python -m jobs.data repackage``: shuffle a large corpus globally on Ray."""

    model_config = SettingsConfigDict(cli_shortcuts={"source": "from"})

    corpus: str | None = Field(
        None, description="the new corpus (needed): name under NANORAY_HOME/data, path or URI"
    )
    source: str | None = Field(
        None, description="the old one (needed): corpus name, folder, glob or parquet file"
    )
    text_column: str = Field("text", description="parquet column of the text")
    seed: int = Field(42, ge=0, le=2**63 - 1, description="of the shuffle")
    shard_chars: int = Field(250_000_000, ge=1000, description="characters of a shard, about")
    row_group_size: int = Field(1024, ge=1, description="documents of a row group")
    on_bad_shard: Literal["fail", "skip"] = Field(
        "fail", description="unusable rows: stop and name them, or leave them out and count"
    )


class InspectConfig(JobConfig):
    """``python -m jobs.data inspect``: count a corpus, show some of it, list what is wrong."""

    corpus: str = Field("docstrings", description="name under NANORAY_HOME/data, or a path or URI")
    num_documents: int = Field(3, ge=0, le=1000, description="documents to show")
    num_workers: int = Field(4, ge=1, le=64, description="shards read at once")
