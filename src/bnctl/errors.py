"""What can go wrong, and how the process ends.

    BnctlError                      4   internal: a bug of ours
    ├── UsageError                  2   the command line or the configuration is off
    ├── InputError                  2   a model, a file or data cannot be used
    │   ├── ModelError              2     the model cannot be loaded, run or written
    │   │   └── UntrustedError      2     the file would run code, and nobody said it may
    │   ├── DataError               2     the data cannot be read, or do not fit the model
    │   └── OverflowInFoldError     2     folded parameters do not fit the dtype of the layer
    ├── WorkerError                 2   another process of the run has failed, or is gone
    ├── EquivalenceError            1   the surgery changed the function: nothing was written
    └── Interrupted               130   by Ctrl-C; half-written outputs are gone

A gate's outcome is a result, not an exception: see :mod:`bnctl.bench.gates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit status of the command line; stable."""

    OK = 0
    FAILED = 1
    USAGE = 2
    INCONCLUSIVE = 3
    INTERNAL = 4
    INTERRUPTED = 130


class BnctlError(Exception):
    """Base of all errors that bnctl raises on purpose.

    Args:
        message: the cause, naming the file or layer.
        hint: the next step for the user, if there is one.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(BnctlError):
    """The command line or the configuration is off."""

    exit_code = ExitCode.USAGE


class InputError(BnctlError):
    """A model, a file or data cannot be used."""

    exit_code = ExitCode.USAGE


class ModelError(InputError):
    """The model cannot be loaded, run or written."""


class UntrustedError(ModelError):
    """The file would run code, and nobody said that it may."""


class DataError(InputError):
    """The data cannot be read, or do not fit the model."""


class OverflowInFoldError(InputError):
    """Folded parameters do not fit the dtype of the layer (BN115).

    Args:
        message: says so.
        layer: whose parameters they are.
        hint: the next step.
    """

    def __init__(self, message: str, *, layer: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.layer = layer


class WorkerError(BnctlError):
    """Another process of the run has failed, or is gone; the message names it."""

    exit_code = ExitCode.USAGE


class EquivalenceError(BnctlError):
    """The surgery changed what the model computes; nothing was written.

    ``verification`` holds what was measured, as the report shows it.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str | None = None, verification: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.verification = verification


class Interrupted(BnctlError):
    """The user pressed Ctrl-C."""

    exit_code = ExitCode.INTERRUPTED
