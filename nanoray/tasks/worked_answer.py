"""Answers in GSM8K's form (Cobbe et al. 2021): steps with calculator notes, then ``#### number``.

Mia has 17 + 25 = <<17+25=42>>42 apples.
#### 42
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from nanoray.errors import NanorayError

_NOTE = re.compile(r"<<(.*?)>>", re.DOTALL)
_FINAL = re.compile(r"####\s*\$?\s*(-?[\d.,]*\d)")


def calculator_parts(answer: str) -> list[dict[str, str]]:
    """The parts of an assistant's message: each note becomes a call and what it gave.

    Raises:
        NanorayError: a note has no ``=``.
    """
    parts = []
    for number, piece in enumerate(_NOTE.split(answer)):
        if number % 2 == 0:
            if piece:
                parts.append({"type": "text", "text": piece})
            continue
        expression, equals, result = piece.rpartition("=")
        if not equals:
            raise NanorayError(f"the calculator note <<{piece}>> must be <<expression=result>>")
        parts.append({"type": "python", "text": expression})
        parts.append({"type": "python_output", "text": result})
    return parts


def final_number(text: str) -> Decimal | None:
    """The number after the first ``####``; thousands commas do not count. None: there is none."""
    found = _FINAL.search(text)
    try:
        return Decimal(found[1].replace(",", "")) if found else None
    except InvalidOperation:  # two decimal points
        return None
