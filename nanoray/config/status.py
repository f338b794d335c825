"""Configuration of ``python -m jobs.status``."""

from __future__ import annotations

import warnings

from pydantic import Field

from nanoray.config.base import JobConfig

with warnings.catch_warnings():
    # The flag's name is that of a deprecated method of pydantic's models, which nobody calls.
    warnings.filterwarnings("ignore", message='Field name "json"')

    class StatusConfig(JobConfig):
        """``python -m jobs.status``: what is under NANORAY_HOME, and what runs."""

        json: bool = Field(False, description="one JSON object instead of a table")  # type: ignore[assignment]
