"""Importing what the user names: from the current folder too, and torchvision beside a torch without its operators."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # a torch.library.Library takes its schemas with it when it is collected


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Put the current folder first in `sys.path`, and take it out again."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # By value, from the front: the import may have changed the path too.
        if folder in sys.path:
            sys.path.remove(folder)


def import_module(name: str) -> ModuleType:
    """Import a module; where it brings in a torchvision whose compiled operators do not fit this torch, declare those and try again.

    torchvision registers shape functions for `torchvision::nms` on import, and fails where its extension library could not be loaded
    (a build for CUDA beside a torch for CPU). The declared schemas have no kernel: architectures can be built and run, but not
    non-maximum suppression.
    """
    before = set(sys.modules)
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    # Python drops the packages that failed but keeps their submodules, which would then be found and not set on the new package.
    for half in set(sys.modules) - before:
        if half.partition(".")[0] not in sys.modules:
            del sys.modules[half]
    _declare_torchvision_operators()
    return importlib.import_module(name)


def _declare_torchvision_operators() -> None:
    import torch

    library: Any = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    _libraries.append(library)
