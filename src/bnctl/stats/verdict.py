"""From an interval and a limit to one of three answers."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["pass", "fail", "inconclusive"]


def judge(low: float, high: float, limit: float) -> Verdict:
    """Whether a quantity known to lie in ``[low, high]`` is at most ``limit``.

    ``pass`` if ``high <= limit``, ``fail`` if ``low > limit``, else ``inconclusive``: the data do not say. With a 95
    % interval each of the two claims is wrong in at most 2.5 % of cases. This is a test of non-inferiority, with the
    limit as the margin; that an effect is not significant proves nothing, and is not asked.
    """
    if high <= limit:
        return "pass"
    return "fail" if low > limit else "inconclusive"


def worst(verdicts: list[Verdict]) -> Verdict:
    """Several verdicts as one: ``fail`` beats ``inconclusive`` beats ``pass``; nothing asked is ``pass``."""
    return max(verdicts, key=("pass", "inconclusive", "fail").index, default="pass")
