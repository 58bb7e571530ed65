"""Any chain of common operators computes the same after folding."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_onnx_checks import FREE, Net, fold, relative_error, run

C, SIDE = 4, 4
"""As many channels as rows and columns, so that no confusion of axes shows in a shape."""

KINDS = (
    *("conv", "padded", "transposed", "matmul", "bn", "bn", "bn", "mul", "bias", "relu"),
    *("transpose", "reshape", "concat", "add", "sub", "pool", "max", "split", "branch"),
)


def grow(net: Net, x: str, kind: str) -> str:
    """One more step; every step keeps the shape (N, 4, 4, 4)."""
    match kind:
        case "conv":
            return net.conv(x, C, C, 1, groups=int(net.rng.choice([1, 2, 4])), bias=bool(net.rng.integers(2)))
        case "padded":
            return net.conv(x, C, C, 3, pads=[1, 1, 1, 1])
        case "transposed":
            return net.add(
                "ConvTranspose", x, net.normal(C, C // 2, 3, 3) / 3, net.normal(C), group=2, pads=[1, 1, 1, 1]
            )
        case "bn":
            return net.bn(x, C)
        case "relu":
            return net.add("Relu", x)
        case "transpose":
            return net.add("Transpose", x, perm=[0, *(int(i) for i in net.rng.permutation([1, 2, 3]))])
        case "reshape":
            target = [[0, 8, 2, 4], [0, 2, 2, 4, 4], [0, 4, 16], [0, 64]][int(net.rng.integers(4))]
            return net.add("Reshape", net.add("Reshape", x, np.array(target)), np.array([0, C, SIDE, SIDE]))
        case "concat":
            return net.add("Concat", net.conv(x, C, 2, 1), net.conv(x, C, 2, 1), axis=1)
        case "add" | "sub":
            return net.add(kind.title(), net.conv(x, C, C, 1), net.conv(x, C, C, 1))
        case "pool":
            return net.add("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        case "max":
            return net.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        case "mul" | "bias":
            shape = [(4, 1, 1), (4,), (1, 4, 1), (1, 4, 1, 1), ()][int(net.rng.integers(5))]
            constant = net.normal(*shape) if shape else np.float64(-0.5)
            return net.add("Mul" if kind == "mul" else "Add", x, constant)
        case "matmul":
            return net.add("Add", net.add("MatMul", x, net.normal(SIDE, SIDE) / 2), net.normal(SIDE))
        case "split":
            first = net.add("Split", x, np.array([1, 3]), axis=1, outputs=2)
            return net.add("Concat", f"{first}_1", first, axis=1)
        case _:
            return net.add("Add", x, net.add("Relu", net.bn(net.conv(x, C, C, 1), C)))


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=9), seed=st.integers(0, 2**16))
def test_folding_preserves_any_chain(kinds: list[str], seed: int) -> None:
    net = Net(FREE, C, SIDE, SIDE, seed=seed)
    v = "x"
    for kind in kinds:
        v = grow(net, v, kind)
    model = net.model(net.add("Identity", v, out="y"))
    folded, _ = fold(model)
    onnx.checker.check_model(ir.to_proto(folded), full_check=True)
    for batch in (1, 2):
        x = np.random.default_rng(seed).normal(0, 1, (batch, C, SIDE, SIDE)).astype(net.dtype)
        before, after = run(model, {"x": x}), run(folded, {"x": x})
        for name in before.keys() & after.keys():
            assert relative_error(before[name], after[name]) < 1e-3, name
