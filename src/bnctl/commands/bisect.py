"""Which of many changes breaks a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def bisect(changes: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
    """A smallest part of the changes that fails by itself, found by halving: about ``2 log2(n)`` trials.

    One change, as a rule; more where only several together fail and neither half does.

    Args:
        changes: all of them; together they are known to fail.
        fails: whether a part of them, alone, fails.
    """
    suspects = tuple(changes)
    while len(suspects) > 1:
        middle = len(suspects) // 2
        part = next((half for half in (suspects[:middle], suspects[middle:]) if fails(half)), None)
        if part is None:
            break
        suspects = part
    return suspects
