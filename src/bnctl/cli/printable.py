"""Text of a model's, a file's or a user's that a terminal, a log or an XML parser can take."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
"""Characters that steer a terminal, or that XML 1.0 does not allow. Tabs and line feeds stay; bytes of a file's name (surrogates) are written as such."""


def printable(text: str) -> str:
    """The text with control characters written out: an escape character becomes the four characters ``\\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def printable_all(value: Any) -> Any:
    """Dataclasses, mappings and sequences with every text in them :func:`printable`."""
    if type(value) is str:
        return printable(value)
    if isinstance(value, dict):
        return {printable_all(key): printable_all(item) for key, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(printable_all(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: printable_all(getattr(value, f.name)) for f in fields(value) if f.init})
    return value
