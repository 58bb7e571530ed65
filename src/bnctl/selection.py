"""Globs over layer names, as `--where` and `--skip` give them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal

from bnctl.errors import UsageError


class Selection:
    """Which layers the user means.

    Args:
        where: globs of which one must match (none given: all layers); a glob without wildcard names a layer exactly.
        skip: globs of which none may match.
    """

    def __init__(self, where: str | Iterable[str] | None = None, skip: str | Iterable[str] | None = None) -> None:
        self.where = _globs(where)
        self.skip = _globs(skip)

    def __call__(self, name: str) -> Literal["yes", "named", "no"]:
        """Whether a layer is meant; "named" where a glob is its very name."""
        if any(fnmatchcase(name, glob) for glob in self.skip):
            return "no"
        if not self.where:
            return "yes"
        if name in self.where:
            return "named"
        return "yes" if any(fnmatchcase(name, glob) for glob in self.where) else "no"

    def takes(self, name: str) -> bool:
        """Whether a layer is meant at all."""
        return self(name) != "no"

    def check(self, names: Iterable[str]) -> None:
        """Refuse a glob that matches nothing: a typing error must not look like "nothing to do".

        Raises:
            UsageError: naming the glob and some layers.
        """
        known = list(names)
        for glob in (*self.where, *self.skip):
            if not any(fnmatchcase(name, glob) for name in known):
                shown = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
                raise UsageError(
                    f"no layer matches {glob!r}", hint=f"the layers are {shown or 'none'}; bnctl inspect lists them"
                )


def _globs(given: str | Iterable[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)
