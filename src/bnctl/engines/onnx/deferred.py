"""Importing a module without one that it imports at once and hardly needs.

onnx-ir imports sympy, for arithmetic with symbolic sizes that bnctl never asks for. That takes as long as it takes to read a model of 100 MB and to write it.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any


class _StandIn(ModuleType):
    """Stands for a module. While others are being imported, it gives functions that call the real ones later."""

    importing = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not self.importing:
            return getattr(import_module(self.__name__), name)

        def call(*args: Any) -> Any:
            return getattr(import_module(self.__name__), name)(*args)

        return call


def import_without(needless: str, name: str) -> None:
    """Import a module, and a second one that it imports only when something is first done with it.

    The second one is imported as usual where the first takes more from it than functions, where it is there already, or where other threads might import it
    meanwhile. Nobody but the first ever sees the stand-in.

    Args:
        needless: a top-level module.
        name: the module that imports it.
    """
    if needless not in sys.modules and threading.active_count() == 1:
        stand_in = sys.modules[needless] = _StandIn(needless)
        try:
            with suppress(Exception):
                import_module(name)
        finally:
            del sys.modules[needless]
            stand_in.importing = False
    import_module(name)
