"""Where API keys come from. They are read where they are used, and shown nowhere."""

from __future__ import annotations

import os
from pathlib import Path

from nanoray.errors import NanorayError

KEYS_VARIABLE = "NANORAY_API_KEYS"
_LEAST_LENGTH = 8


def read_api_keys(file: str | None) -> tuple[str, ...]:
    """The keys of a file (one a line, # comments) and of NANORAY_API_KEYS (with commas).

    None at all: everybody may ask.

    Raises:
        NanorayError: the file cannot be read or holds no key (the service shall not stand open
            because of a slip), or a key could be guessed or cannot stand in a header.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise NanorayError(
                f"the API keys in {file} cannot be read ({type(error).__name__}); give a text "
                f"file with one key a line that every node sees"
            ) from error
        found = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(found):
            raise NanorayError(f"{file} holds no API key; write one a line, or leave the flag out")
        keys += found
    keys = [key for key in keys if key]
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise NanorayError(
                f"API key {number} is no good: take at least {_LEAST_LENGTH} printable ASCII "
                f"characters without spaces"
            )
    return tuple(dict.fromkeys(keys))
