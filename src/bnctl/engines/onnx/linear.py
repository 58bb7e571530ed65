"""Translation of linear operators: Conv, ConvTranspose, Gemm, MatMul, Einsum, Gather."""

from __future__ import annotations

import onnx_ir as ir

from bnctl.engines.onnx.movement import gather
from bnctl.engines.onnx.translated import Place, Rule, Scope, Translated, axis_attribute, flag, input_of
from bnctl.graph import ops
from bnctl.graph.einsum import contraction
from bnctl.graph.ops import WeightLayout
from bnctl.graph.window import Window


def _conv(node: ir.Node, scope: Scope) -> Translated | None:
    shape = _weight_shape(node, 1, scope)
    if shape is None or len(shape) < 3:
        return None
    transposed = node.op_type == "ConvTranspose"
    layout = WeightLayout(int(node.attributes.get_int("group", 1)), out_first=not transposed)
    window = None if transposed else _window(node, len(shape) - 2)
    op = ops.Conv(layout, spatial=len(shape) - 2, transposed=transposed, padded=_padded(node, shape[2:]), window=window)
    return Translated(op, Place(node, 1), Place(node, 2))


def _window(node: ir.Node, spatial: int) -> Window | None:
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode not in {"NOTSET", "VALID"}:
        return None
    ones = (1,) * spatial
    pads = tuple(node.attributes.get_ints("pads", ()) if mode == "NOTSET" else ()) or (0,) * (2 * spatial)
    stride, dilation = (tuple(node.attributes.get_ints(name, ones)) for name in ("strides", "dilations"))
    return Window(stride, dilation, pads[:spatial], pads[spatial:])


def _padded(node: ir.Node, kernel: tuple[int, ...]) -> bool:
    """Whether zeros are put around the input; ``pads`` counts only where ``auto_pad`` is NOTSET, and a kernel of size one needs no zeros to stay the same."""
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return any(node.attributes.get_ints("pads", ()))
    return mode != "VALID" and any(size > 1 for size in kernel)


def _gemm(node: ir.Node, scope: Scope) -> Translated | None:
    """``alpha * A' B' + beta * C``; C is missing, or broadcasts against the output."""
    weight, bias = Place(node, 1), Place(node, 2)
    shape = _weight_shape(node, 1, scope)
    beta = float(node.attributes.get_float("beta", 1.0))
    if shape is None or len(shape) != 2 or flag(node, "transA") or (bias.value is not None and beta == 0):
        return None
    layout = WeightLayout(out_first=flag(node, "transB"))
    # beta means nothing while C is missing; it is set to 1 when the place is filled.
    op = ops.Linear(layout, float(node.attributes.get_float("alpha", 1.0)), 1.0 if bias.value is None else beta)
    return Translated(op, weight, bias)


def _matmul(node: ir.Node, scope: Scope) -> Translated | None:
    """A product with a stored matrix, on its right or on its left."""
    stored = [_is_stored(v, scope) for v in node.inputs]
    if not any(stored):
        return Translated(ops.MatMul()) if len(stored) == 2 else None
    if stored[1]:
        return _product(node, 1, ops.Linear(WeightLayout(out_first=False)), scope)
    rank = scope.rank(node.inputs[1])
    return None if rank is None else _product(node, 0, ops.Linear(WeightLayout(), spatial=min(rank - 1, 1)), scope)


def _einsum(node: ir.Node, scope: Scope) -> Translated | None:
    """A value times a stored matrix (``bnc,cd->bnd``), the channels of which stay where they are."""
    stored = [i for i, v in enumerate(node.inputs) if _is_stored(v, scope)]
    if len(node.inputs) != 2 or len(stored) != 1:
        return None
    op = contraction(node.attributes.get_string("equation", ""), stored[0])
    return None if op is None else _product(node, stored[0], op, scope)


def _is_stored(value: ir.Value | None, scope: Scope) -> bool:
    """Whether a value is a parameter, be it one that nobody may change."""
    obstacle = scope.constants.obstacle(value) if value is not None else None
    return obstacle is None or obstacle.code != "BN108"


def _product(node: ir.Node, index: int, op: ops.Linear, scope: Scope) -> Translated | None:
    """A product with a stored matrix, at a place; an Add of a vector that is its only reader is the bias."""
    shape, data = _weight_shape(node, index, scope), node.inputs[1 - index]
    if shape is None or len(shape) != 2 or data is None or data in scope.constants:
        return None
    bias = _bias_behind(node, op.layout.channels(shape)[1], op.spatial, scope)
    last = None if bias is None else bias.node
    given = (data, node.inputs[index], None if bias is None else bias.value)
    reads = tuple(v for v in given if v is not None and v not in scope.constants)
    place = Place(node, None, op.spatial) if bias is None else bias
    return Translated(
        op, Place(node, index), place, outputs=tuple(last.outputs) if last is not None else (), last=last, reads=reads
    )


def _bias_behind(node: ir.Node, features: int, behind: int, scope: Scope) -> Place | None:
    """Where the bias of a product is added, with so many axes behind its channels."""
    product = node.outputs[0]
    uses = tuple(product.uses())
    rank = scope.rank(product)
    if len(uses) != 1 or product.is_graph_output() or rank is None:
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx] if len(add.inputs) == 2 else None
    if (
        add.domain != ""
        or add.op_type != "Add"
        or add.graph is not node.graph
        or other is None
        or other not in scope.constants
    ):
        return None
    shape = scope.constants.tensor_shape(other)
    if shape is None or len(shape) > rank:
        return None
    sizes = [n for axis, n in enumerate(reversed(shape)) if axis != behind]
    channels = shape[-1 - behind] if len(shape) > behind else 1
    is_vector = all(n == 1 for n in sizes) and channels in {1, features}
    return Place(add, 1 - uses[0].idx, behind) if is_vector else None


def _gather(node: ir.Node, scope: Scope) -> Translated | None:
    """Rows of a constant table, or a selection from a value."""
    table, indices = node.inputs[0], node.inputs[1]
    if table not in scope.constants:
        return gather(node, scope)
    shape = _weight_shape(node, 0, scope)
    if axis_attribute(node, 0) != 0 or shape is None or len(shape) != 2 or table is None or indices is None:
        return None
    if scope.constants.obstacle(table) is not None:
        return None
    return Translated(ops.Embedding(WeightLayout(out_first=False)), Place(node, 0))


def _weight_shape(node: ir.Node, index: int, scope: Scope) -> tuple[int, ...] | None:
    value = input_of(node, index)
    return None if value is None else scope.constants.tensor_shape(value)


RULES: dict[str, Rule] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Gather": _gather,
}
