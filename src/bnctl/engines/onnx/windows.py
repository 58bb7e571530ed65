"""Translation of operators that mix positions: pooling, reductions, interpolation."""

from __future__ import annotations

import math
from typing import Literal

import onnx_ir as ir

from bnctl.engines.onnx.translated import Rule, Scope, Translated, flag, input_of
from bnctl.graph import ops


def _average_pool(node: ir.Node, scope: Scope) -> Translated | None:
    """The weights of a window sum to one, unless zeros from outside are counted."""
    rank = scope.rank(node.inputs[0])
    outside = (
        any(node.attributes.get_ints("pads", ()))
        or node.attributes.get_string("auto_pad", "NOTSET") in {"SAME_UPPER", "SAME_LOWER"}
        or flag(node, "ceil_mode")
    )
    return None if rank is None else Translated(ops.Average(rank - 2, outside and flag(node, "count_include_pad")))


def _max_pool(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    if rank is None:
        return None
    return Translated(
        ops.MaxPool(rank - 2), outputs=tuple(v for v in node.outputs if v.name)
    )  # positions are the second


def _global(kind: Literal["mean", "max"]) -> Rule:
    def rule(node: ir.Node, scope: Scope) -> Translated | None:
        rank = scope.rank(node.inputs[0])
        return None if rank is None else Translated(ops.Reduce(kind, tuple(range(2, rank)), keepdims=True))

    return rule


def _reduction(kind: Literal["mean", "sum", "max", "min"]) -> Rule:
    """Axes are an attribute in early opsets and an input in later ones; without them, all are reduced."""

    def rule(node: ir.Node, scope: Scope) -> Translated | None:
        shape = scope.shape(node.inputs[0])
        given = "axes" in node.attributes or input_of(node, 1) is not None
        axes = scope.integers(node, 1, "axes") if given else ()
        if shape is None or axes is None:
            return None
        if not axes and flag(node, "noop_with_empty_axes"):
            return Translated(ops.Identity())
        over = tuple(a % len(shape) for a in axes) or tuple(range(len(shape)))
        sizes = [n for a in over if isinstance(n := shape[a], int)]
        count = math.prod(sizes) if len(sizes) == len(over) else None
        return Translated(ops.Reduce(kind, over, flag(node, "keepdims", default=True), count))

    return rule


def _resize(node: ir.Node, scope: Scope) -> Translated | None:
    """Interpolation over space, whose weights sum to one in every mode; a crop fills in a constant."""
    before, after = scope.shape(node.inputs[0]), scope.shape(node.outputs[0])
    if before is None or after is None or len(before) < 3:
        return None
    crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    channels_kept = isinstance(before[1], int) and before[1] == after[1]
    samples_kept = before[0] == after[0] or not isinstance(before[0], int)
    return Translated(ops.Average(len(before) - 2)) if channels_kept and samples_kept and not crop else None


def _grid_sample(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    zeros = node.attributes.get_string("padding_mode", "zeros") == "zeros"
    return None if rank is None else Translated(ops.Average(rank - 2, zeros))


RULES: dict[str, Rule] = {
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": _global("mean"),
    "GlobalMaxPool": _global("max"),
    "ReduceMean": _reduction("mean"),
    "ReduceSum": _reduction("sum"),
    "ReduceMax": _reduction("max"),
    "ReduceMin": _reduction("min"),
    "Resize": _resize,
    "Upsample": _resize,
    "GridSample": _grid_sample,
}
