"""A model that was read in: the native object, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bnctl.models.origin import Origin

if TYPE_CHECKING:
    import onnx_ir
    import torch


@dataclass
class Model:
    """A model in memory.

    Args:
        kind: which engine works on it.
        native: the model itself. For a `.pt2` archive, the program's graph module.
        word: the MODEL word as the user gave it.
        sha256: hex digest of the file; of `bnctl.json` for a bundle (which holds the digest of its tensors); of the weights for a
            factory with weights; None for a factory without.
        origin: how a torch model is built again, where that is known; a bundle records it.
        program: the exported program behind `native`, for a `.pt2` archive.
        dynamic_axes: the axes of any size of each input tensor of a `.pt2` archive, inputs flattened; surgery keeps them.
    """

    kind: Literal["onnx", "torch"]
    native: onnx_ir.Model | torch.nn.Module
    word: str
    sha256: str | None = None
    origin: Origin | None = None
    program: torch.export.ExportedProgram | None = None
    dynamic_axes: tuple[tuple[int, ...], ...] | None = None
