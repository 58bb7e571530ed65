"""Translation of operators that only move elements: reshapes, permutations, concatenation, slices, repeats, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import onnx_ir as ir

from bnctl.engines.onnx.translated import Rule, Scope, Translated, axis_attribute, input_of
from bnctl.graph import ops
from bnctl.graph.affine import Shape


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


def _unsqueeze(node: ir.Node, scope: Scope) -> Translated | None:
    shape, axes = scope.shape(node.inputs[0]), scope.integers(node, 1, "axes")
    if shape is None or axes is None:
        return None
    return Translated(_without_ones((*shape,), {a % (len(shape) + len(axes)) for a in axes}).inverse)


def _squeeze(node: ir.Node, scope: Scope) -> Translated | None:
    """Without axes, the output tells how many ones are gone, where all sizes are known."""
    shape = scope.shape(node.inputs[0])
    axes = scope.integers(node, 1, "axes")
    if shape is None or axes is None:
        return Translated(ops.Reshape())
    gone = {a % len(shape) for a in axes}
    return Translated(_without_ones(tuple(n for a, n in enumerate(shape) if a not in gone), gone))


def _without_ones(rest: Shape, gone: set[int]) -> ops.Rearrange:
    """Drops axes of size one; ``rest`` are the sizes of the others."""
    sizes = iter(rest)
    split = tuple(() if a in gone else (next(sizes),) for a in range(len(rest) + len(gone)))
    return ops.Rearrange(split, tuple(range(len(rest))), (1,) * len(rest))


def _flatten(node: ir.Node, scope: Scope) -> Translated | None:
    shape = scope.shape(node.inputs[0])
    if shape is None:
        return None
    axis = axis_attribute(node, 1)
    first = axis if axis >= 0 else axis + len(shape)
    return Translated(ops.Rearrange(tuple((n,) for n in shape), tuple(range(len(shape))), (first, len(shape) - first)))


def _depth_to_space(node: ir.Node, scope: Scope) -> Translated | None:
    shape = scope.shape(node.inputs[0])
    depth_first = node.attributes.get_string("mode", "DCR") == "DCR"
    return None if shape is None else Translated(_pixels(shape, node, depth_first=depth_first))


def _space_to_depth(node: ir.Node, scope: Scope) -> Translated | None:
    """The way back from the depth-first DepthToSpace."""
    shape, block = scope.shape(node.inputs[0]), int(node.attributes.get_int("blocksize", 1))
    if shape is None or len(shape) != 4:
        return None
    n, c, *space = shape
    deep = (
        n,
        c * block**2 if isinstance(c, int) else None,
        *(s // block if isinstance(s, int) else None for s in space),
    )
    return Translated(_pixels(deep, node, depth_first=True).inverse)


def _pixels(shape: Shape, node: ir.Node, *, depth_first: bool) -> ops.Rearrange:
    return ops.Rearrange.depth_to_space(shape, int(node.attributes.get_int("blocksize", 1)), depth_first=depth_first)


def _transpose(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    if rank is None:
        return None
    return Translated(ops.Permute(tuple(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))))


def _concat(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.outputs[0])
    values = node.inputs
    parts = tuple(scope.constant(node, i) if v in scope.constants else None for i, v in enumerate(values))
    unread = any(part is None and v in scope.constants for part, v in zip(parts, values, strict=True))
    if rank is None or unread or any(v is None for v in values):
        return None
    floats = tuple(None if part is None else np.asarray(part, np.float64) for part in parts)
    data = tuple(v for v in values if v is not None and v not in scope.constants)
    return Translated(ops.Concat(axis_attribute(node, 0) % rank, floats), reads=data)


def _split(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    if rank is None:
        return None
    axis = axis_attribute(node, 0) % rank
    sizes = [None if shape is None else shape[axis] for shape in map(scope.shape, node.outputs)]
    known = [n for n in sizes if isinstance(n, int)]
    outputs = tuple(node.outputs)
    if len(known) != len(outputs):
        return Translated(ops.Select(tuple({axis: None} for _ in outputs)), outputs=outputs)
    return Translated(ops.Select.split(axis, known), outputs=outputs)


def _slice(node: ir.Node, scope: Scope) -> Translated | None:
    shape = scope.shape(node.inputs[0])
    starts, ends = scope.integers(node, 1, "starts"), scope.integers(node, 2, "ends")
    if shape is None or starts is None or ends is None:
        return None
    axes = scope.integers(node, 3, "axes") if _given(node, 3, "axes") else tuple(range(len(starts)))
    steps = scope.integers(node, 4, "steps") if _given(node, 4, "steps") else (1,) * len(starts)
    if axes is None or steps is None:
        return None
    part = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = shape[axis]
        part[axis % len(shape)] = tuple(range(size)[start:end:step]) if isinstance(size, int) else None
    return Translated(ops.Select((part,)))


def _given(node: ir.Node, index: int, name: str) -> bool:
    return name in node.attributes or input_of(node, index) is not None


def gather(node: ir.Node, scope: Scope) -> Translated | None:
    """Elements of a value at constant places along one axis, which one number drops."""
    shape, index = scope.shape(node.inputs[0]), scope.constant(node, 1)
    if shape is None or index is None or index.ndim > 1:
        return None
    axis = axis_attribute(node, 0) % len(shape)
    size = shape[axis]
    positions = tuple(int(i) % size for i in index.reshape(-1)) if isinstance(size, int) else None
    return Translated(ops.Select(({axis: positions},), dropped=(axis,) if index.ndim == 0 else ()))


def _expand(node: ir.Node, scope: Scope) -> Translated | None:
    """Axes of size one become longer."""
    old, new = scope.shape(node.inputs[0]), scope.shape(node.outputs[0])
    if old is None or new is None or len(old) != len(new):
        return None
    part: dict[int, ops.Positions] = {}
    for axis, (m, n) in enumerate(zip(old, new, strict=True)):
        if m != n or m is None:
            part[axis] = (0,) * n if m == 1 and isinstance(n, int) else None
    return Translated(ops.Select((part,)))


def _tile(node: ir.Node, scope: Scope) -> Translated | None:
    shape, times = scope.shape(node.inputs[0]), scope.integers(node, 1, "repeats")
    if shape is None or times is None:
        return None
    return Translated(
        ops.Select(
            (
                {
                    a: tuple(range(n)) * k if isinstance(n, int) else None
                    for a, (n, k) in enumerate(zip(shape, times, strict=True))
                    if k != 1
                },
            )
        )
    )


_PAD_MODES: dict[str, Literal["reflect", "edge", "wrap"]] = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def _pad(node: ir.Node, scope: Scope) -> Translated | None:
    """Pads before opset 11 are attributes; from opset 18 on, they may be those of chosen axes."""
    shape, given = scope.shape(node.inputs[0]), scope.integers(node, 1, "pads")
    if shape is None or given is None:
        return None
    axes = scope.integers(node, 3, "axes") if _given(node, 3, "axes") else tuple(range(len(shape)))
    if axes is None or len(given) != 2 * len(axes):
        return None
    pads = [(0, 0)] * len(shape)
    for i, axis in enumerate(axes):
        pads[axis] = (given[i], given[i + len(axes)])
    mode = node.attributes.get_string("mode", "constant")
    if all(n <= 0 for n in given):
        return Translated(ops.Select((_positions(shape, pads, lambda n, p: tuple(range(n)[-p[0] : n + p[1]])),)))
    if any(n < 0 for n in given):
        return None
    if mode == "constant":
        return Translated(ops.ConstantPad(tuple(pads), _pad_value(node, scope)))
    if mode not in _PAD_MODES:
        return None
    return Translated(
        ops.Select((_positions(shape, pads, lambda n, p: tuple(np.pad(np.arange(n), p, _PAD_MODES[mode]).tolist())),))
    )


def _positions(
    shape: Shape, pads: list[tuple[int, int]], taken: Callable[[int, tuple[int, int]], tuple[int, ...]]
) -> dict[int, ops.Positions]:
    sizes = {axis: (n, pair) for axis, (n, pair) in enumerate(zip(shape, pads, strict=True)) if any(pair)}
    return {axis: taken(n, pair) if isinstance(n, int) else None for axis, (n, pair) in sizes.items()}


def _pad_value(node: ir.Node, scope: Scope) -> float | None:
    if input_of(node, 2) is None:
        return float(node.attributes.get_float("value", 0.0))
    value = scope.constant(node, 2)
    return None if value is None else float(value.reshape(-1)[0])


RULES: dict[str, Rule] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Shape": _shape,
    "Size": _shape,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
}
