"""Translation of operators that move or mix elements: reshapes, permutations, concatenation, slices, pooling, resizing, padding."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import onnx_ir as ir

from bnctl.engines.onnx.translated import Rule, Scope, Translated, axis_attribute, flag, input_of
from bnctl.graph import ops


def _identity(node: ir.Node, scope: Scope) -> Translated:
    return Translated(ops.Identity())


def _dropout(node: ir.Node, scope: Scope) -> Translated | None:
    """The identity, but for opset 12 and later with the input ``training_mode``. A mask that somebody reads makes it opaque."""
    if input_of(node, 2) is None:
        return Translated(ops.Identity())
    mode = scope.constant(node, 2)
    return Translated(ops.Identity()) if mode is not None and not mode.any() else None


def _cast(node: ir.Node, scope: Scope) -> Translated | None:
    same = scope.of(node.inputs[0]).dtype
    return Translated(ops.Identity()) if same and same == scope.of(node.outputs[0]).dtype else None


def _shape(node: ir.Node, scope: Scope) -> Translated:
    """It reads sizes, not elements: nobody minds what becomes of those."""
    return Translated(ops.Opaque(node.op_type), reads=())


def _reshape(node: ir.Node, scope: Scope) -> Translated:
    return Translated(ops.Reshape())


def _transpose(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    if rank is None:
        return None
    return Translated(ops.Permute(tuple(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))))


def _concat(node: ir.Node, scope: Scope) -> Translated | None:
    if any(v is None or v in scope.constants for v in node.inputs):
        return None
    return Translated(ops.Concat(axis_attribute(node, 0)))


def _split(node: ir.Node, scope: Scope) -> Translated | None:
    axis = axis_attribute(node, 0)
    shapes = [scope.shape(value) for value in node.outputs]
    sizes = [shape[axis] for shape in shapes if shape is not None]
    known = [n for n in sizes if isinstance(n, int)]
    if len(known) != len(node.outputs):
        return None
    return Translated(ops.Slice(axis, tuple(accumulate(known[:-1], initial=0))), outputs=tuple(node.outputs))


def _slice(node: ir.Node, scope: Scope) -> Translated | None:
    """A contiguous part along one axis."""
    shape = scope.shape(node.inputs[0])
    starts, ends = scope.integers(node, 1, "starts"), scope.integers(node, 2, "ends")
    if shape is None or starts is None or ends is None or len(starts) != 1:
        return None
    axes = scope.integers(node, 3, "axes") or ((0,) if input_of(node, 3) is None else None)
    steps = (1,) if input_of(node, 4) is None else scope.integers(node, 4, "steps")
    if axes is None or steps != (1,):
        return None
    size, start = shape[axes[0]], starts[0]
    if isinstance(size, int):
        start = min(max(start + size if start < 0 else start, 0), size)
    return Translated(ops.Slice(axes[0], (start,))) if start >= 0 else None


def _average_pool(node: ir.Node, scope: Scope) -> Translated | None:
    """The weights of a window sum to one, unless zeros from outside are counted."""
    rank = scope.rank(node.inputs[0])
    outside = (
        any(node.attributes.get_ints("pads", ()))
        or node.attributes.get_string("auto_pad", "NOTSET") in {"SAME_UPPER", "SAME_LOWER"}
        or flag(node, "ceil_mode")
    )
    if rank is None or (outside and flag(node, "count_include_pad")):
        return None
    return Translated(ops.Average(rank - 2))


def _max_pool(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    return None if rank is None else Translated(ops.MaxPool(rank - 2))


def _global_average(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    return None if rank is None else Translated(ops.Mean(tuple(range(2, rank)), keepdims=True))


def _reduce_mean(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    given = "axes" in node.attributes or input_of(node, 1) is not None
    axes = scope.integers(node, 1, "axes") if given else ()
    if rank is None or axes is None:
        return None
    if not axes and flag(node, "noop_with_empty_axes"):
        return Translated(ops.Identity())
    return Translated(ops.Mean(axes or tuple(range(rank)), keepdims=flag(node, "keepdims", default=True)))


def _resize(node: ir.Node, scope: Scope) -> Translated | None:
    """Nearest and linear interpolation over space; others overshoot, and a crop fills in a constant."""
    before, after = scope.shape(node.inputs[0]), scope.shape(node.outputs[0])
    if (
        node.attributes.get_string("mode", "nearest") not in {"nearest", "linear", "bilinear"}
        or before is None
        or after is None
        or len(before) < 3
    ):
        return None
    crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    channels_kept = isinstance(before[1], int) and before[1] == after[1]
    samples_kept = before[0] == after[0] or not isinstance(before[0], int)
    return Translated(ops.Average(len(before) - 2)) if channels_kept and samples_kept and not crop else None


def _pad(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    pads = scope.integers(node, 1, "pads")
    if rank is None or pads is None or len(pads) != 2 * rank:  # a shorter list pads chosen axes only (opset 18)
        return None
    if not any(pads):
        return Translated(ops.Identity())
    if node.attributes.get_string("mode", "constant") == "constant":
        return Translated(ops.ConstantPad())
    beyond_space = np.reshape(pads, (2, rank))[:, :2].any()
    return None if beyond_space or input_of(node, 3) is not None else Translated(ops.Average(rank - 2))


RULES: dict[str, Rule] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Shape": _shape,
    "Size": _shape,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _max_pool,
    "ReduceMean": _reduce_mean,
    "Resize": _resize,
    "Upsample": _resize,
    "Pad": _pad,
}
