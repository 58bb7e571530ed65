"""The grammar of symbolic sizes in a `.pt2` archive.

torch hands these strings to `sympy.sympify`, which evaluates them as Python. What torch writes is sympy's `srepr`:

    expression = "-"? number | constant | function "(" [ argument { "," argument } ] ")"
    argument   = expression | name "=" ( "True" | "False" | digits )
    Symbol's first argument is a quoted identifier, Float's a quoted decimal; the names of constants and functions stand below.

Nothing else is accepted. Exponents and shifts must be small literal integers, so that evaluating cannot run away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bnctl.errors import UntrustedError

_CONSTANTS = frozenset({"true", "false", "oo"})
_QUOTED = {
    "Symbol": re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII),
    "Float": re.compile(r"-?\d{1,64}(\.\d{0,64})?(e[+-]?\d{1,3})?", re.ASCII),
}
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_FUNCTIONS = frozenset(
    {
        *_QUOTED,
        *_POWERS,
        *("Integer", "Rational", "Add", "Mul", "Max", "Min", "Mod", "Abs", "floor", "ceiling"),
        *(
            "Equality",
            "Unequality",
            "LessThan",
            "StrictLessThan",
            "GreaterThan",
            "StrictGreaterThan",
            "And",
            "Or",
            "Not",
        ),
        *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilDiv", "FloatTrueDiv", "IntTrueDiv"),
        *("CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "TruncToFloat", "RoundDecimal", "ToFloat", "Identity"),
        "IsNonOverlappingAndDenseIndicator",
    }
)
_TOKEN = re.compile(
    r" *(?:(?P<name>[A-Za-z_]\w*)|(?P<number>\d+(?:\.\d*)?)|'(?P<quoted>[^'\\]*)'|(?P<mark>[(),=-]))", re.ASCII
)
_MAX_LENGTH = 10_000
_MAX_DEPTH = 50
_MAX_DIGITS = 20
_MAX_POWER = 64

_Token = tuple[str, str]


def check_expression(text: str, where: str) -> None:
    """Check that `text` is a symbolic size as torch writes it; `where` is named in the error.

    Raises:
        UntrustedError: it is anything else.
    """
    try:
        if len(text) > _MAX_LENGTH:
            raise _Refused("it is too long")
        _Parser(_tokens(text)).whole()
    except _Refused as refused:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise UntrustedError(
            f"{where}: {shown!r} is not a symbolic size, and torch would evaluate it as Python: {refused}",
            hint="--trust, if you know where this file comes from",
        ) from None


class _Refused(Exception):
    """The text is not in the grammar."""


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    end = len(text.rstrip(" "))
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise _Refused(f"unexpected {text[position]!r} at {position}")
        yield match.lastgroup, match[match.lastgroup]
        position = match.end()
    yield "end", ""


class _Parser:
    """Recursive descent over the tokens; an expression's value is its integer if it is a literal one, else None."""

    def __init__(self, tokens: Iterator[_Token]) -> None:
        self._rest = tokens
        self._next = next(tokens)

    def whole(self) -> None:
        self._expression(0)
        self._expect("end", "")

    def _take(self) -> _Token:
        token = self._next
        self._next = next(self._rest, ("end", ""))
        return token

    def _expect(self, kind: str, value: str) -> None:
        if (token := self._take()) != (kind, value):
            raise _Refused(f"{value or 'the end'} expected, not {token[1]!r}")

    def _expression(self, depth: int) -> int | None:
        if depth > _MAX_DEPTH:
            raise _Refused("it is nested too deeply")
        kind, value = self._take()
        negative = (kind, value) == ("mark", "-")
        if negative:
            kind, value = self._take()
        if kind == "number":
            return _literal(value, negative)
        if kind != "name" or negative:
            raise _Refused(f"unexpected {value!r}")
        if value in _CONSTANTS:
            return None
        if value not in _FUNCTIONS:
            raise _Refused(f"{value} is no known function")
        return self._call(value, depth + 1)

    def _call(self, function: str, depth: int) -> int | None:
        self._expect("mark", "(")
        values: list[int | None] = []
        while self._next != ("mark", ")"):
            if values:
                self._expect("mark", ",")
            values.append(self._argument(function, first=not values, depth=depth))
        self._take()
        if function in _POWERS and (len(values) != 2 or values[1] is None or abs(values[1]) > _MAX_POWER):
            raise _Refused(f"the exponent of {function} is not a small integer")
        return values[0] if function == "Integer" and len(values) == 1 else None

    def _argument(self, function: str, *, first: bool, depth: int) -> int | None:
        if function in _QUOTED and first:
            kind, value = self._take()
            if kind != "quoted" or not _QUOTED[function].fullmatch(value):
                raise _Refused(f"{function} of {value!r}")
            return None
        if function in _QUOTED:
            kind, _ = self._take()
            self._expect("mark", "=")
            flag = self._take()
            if kind != "name" or (flag[1] not in ("True", "False") and flag[0] != "number"):
                raise _Refused(f"unexpected {flag[1]!r} in {function}")
            return None
        return self._expression(depth)


def _literal(digits: str, negative: bool) -> int | None:
    if len(digits) > _MAX_DIGITS:
        raise _Refused("a number is too long")
    return None if "." in digits else int(digits) * (-1 if negative else 1)
