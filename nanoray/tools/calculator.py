"""The calculator behind ``<|python_start|>``: arithmetic and ``"text".count("x")``.

An expression is matched against a small lexicon, parsed with ``ast`` and folded node by node;
nothing is evaluated by Python itself and no operation starts before its cost is known. So it needs
no alarm to be bounded, and works in any thread.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_EXPRESSION_CHARS = 512
MAX_DEPTH = 100
MAX_INT_BITS = 1024
MAX_RESULT_CHARS = 128

Number = int | float

# No backslash in strings: escapes would make the parser print warnings about a model's typos.
# No triple quotes: inside them this lexicon would see numbers where Python sees text.
_TOKEN = re.compile(
    r"""(?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d*)?(?:[eE][+-]?\d+)?(?![\w.])
         |\.\d+(?:[eE][+-]?\d+)?(?![\w.]))
       |([-+*/%()]|\.\s*count\b|[ \t]+
         |""(?!")|"[^"\\\n]+"|''(?!')|'[^'\\\n]+')""",
    re.VERBOSE | re.ASCII,
)

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class _RefusedError(Exception):
    """The expression is none that the calculator computes."""


def calculate(expression: str) -> str | None:
    """What Python would print for the expression, or None if it is not the calculator's business.

    Understood are ``+ - * / // % **``, signs, parentheses, decimals, thousands commas (``1,234``,
    as nanochat strips them) and ``"text".count("x")``. None also answers division by zero, results
    that are complex, infinite or longer than 128 characters, integers beyond 1,024 bits on the
    way, and expressions over 512 characters or 100 levels deep. Pure; under a millisecond.
    """
    source = _lex(expression)
    if source is None:
        return None
    try:
        result = _fold(ast.parse(source, mode="eval").body, MAX_DEPTH)
    # The parser answers wild nesting with MemoryError or RecursionError.
    except (_RefusedError, SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None
    text = repr(result)
    return text if len(text) <= MAX_RESULT_CHARS else None


def _lex(expression: str) -> str | None:
    """The expression without thousands commas, or None if it holds anything but our tokens."""
    if len(expression) > MAX_EXPRESSION_CHARS:
        return None
    expression = expression.strip(" \t\n")
    pieces, position = [], 0
    while position < len(expression):
        token = _TOKEN.match(expression, position)
        if token is None:
            return None
        pieces.append(token["number"].replace(",", "") if token["number"] else token[0])
        position = token.end()
    return "".join(pieces)


def _fold(node: ast.expr, depth: int) -> Number:
    if depth == 0:
        raise _RefusedError
    match node:
        case ast.Constant(value=int() | float() as value):
            return _checked(value)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _fold(operand, depth - 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_fold(operand, depth - 1)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _fold(left, depth - 1), _fold(right, depth - 1)
            if isinstance(op, ast.Pow) and isinstance(a, int) and isinstance(b, int):
                _check_power(a, b)
            return _checked(_BINARY[type(op)](a, b))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
        case _:
            raise _RefusedError


def _check_power(base: int, exponent: int) -> None:
    """Refuse before computing: the result has about ``bits(base) * exponent`` bits."""
    if base.bit_length() * abs(exponent) > MAX_INT_BITS:
        raise _RefusedError


def _checked(value: object) -> Number:
    """A real finite number of bounded size; two bounded factors make at most twice the bits."""
    if type(value) is int and value.bit_length() <= MAX_INT_BITS:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    raise _RefusedError
