"""Batch normalisation surgery on PyTorch and ONNX models.

    import bnctl
    r = bnctl.fold(model, inputs)                       # nn.Module, onnx.ModelProto or a path; the input model is left alone
    r = bnctl.insert(model, data, where="features.*")   # data: an iterable of batches
    r = bnctl.recalibrate(model, data, method="exact")  # or "batch"
    r.model, r.report                                   # same kind as what went in
    model = bnctl.load("some-dir/")                     # a bundle, back as the user's own class

Importing bnctl imports neither torch nor onnx nor onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Result", "__version__", "fold", "insert", "load", "recalibrate", "verify"]

if TYPE_CHECKING:
    from bnctl.api import Result, fold, insert, load, recalibrate, verify


def __getattr__(name: str) -> Any:
    if name in __all__:
        from bnctl import api

        return getattr(api, name)
    raise AttributeError(f"module 'bnctl' has no attribute {name!r}")
