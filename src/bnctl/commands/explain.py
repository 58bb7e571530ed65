"""`bnctl explain`: what a reason code means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from bnctl import __version__
from bnctl.codes import CODES, Code
from bnctl.errors import UsageError
from bnctl.report import SCHEMA_VERSION


def document(codes: Iterable[Code]) -> dict[str, Any]:
    """Codes as one JSON document."""
    found = [asdict(code) for code in codes]
    return {"schema_version": SCHEMA_VERSION, "command": "explain", "bnctl": __version__, "codes": found}


def find_code(word: str) -> Code:
    """The code that a user asks for, in any case.

    Raises:
        UsageError: there is no such code.
    """
    key = word.strip().upper()
    if key in CODES:
        return CODES[key]
    near = get_close_matches(key, CODES, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "bnctl explain without a code lists them all"
    raise UsageError(f"there is no code {word}", hint=hint)
