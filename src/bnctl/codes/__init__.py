"""Every reason code, in one place: what it means, why, an example, and what the user can do.

BN1xx  fold          BN2xx  insert          BN3xx  recalibrate          BN4xx  check
"""

from __future__ import annotations

from bnctl.codes.code import Code, Obstacle
from bnctl.codes.fold import FOLD
from bnctl.codes.surgery import CHECK, INSERT, RECALIBRATE

__all__ = ["CODES", "Code", "Obstacle"]

CODES: dict[str, Code] = {code.id: code for code in (*FOLD, *INSERT, *RECALIBRATE, *CHECK)}
