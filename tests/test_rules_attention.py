"""A norm behind attention moves to the values: the weights of a row sum to one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import bnctl
from nets_traps import Net
from test_torch_traps import folded, image

Conv, BN = nn.Conv2d, nn.BatchNorm2d
HEADS, WIDTH = 2, 4


def heads(x: Tensor) -> Tensor:
    """(N, heads * c, H, W) to (N * heads, H * W, c)."""
    return x.reshape(-1, WIDTH // HEADS, x.shape[2] * x.shape[3]).transpose(1, 2)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(1, 2) * 0.5).softmax(-1), 0.1, training=False) @ v


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), 2), v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def unnormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2)).sigmoid() @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2)).softmax(1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril(-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend(attention: Any) -> Any:
    """As BoTNet: queries, keys and values from one convolution, a norm behind."""

    def run(s: Any, x: Tensor) -> Tensor:
        q, k, v = map(heads, s.qkv(x).split(WIDTH, 1))
        y = attention(q, k, v).transpose(1, 2).reshape(-1, WIDTH, *x.shape[2:])
        return s.bn(y).relu()  # type: ignore[no-any-return]

    return run


@pytest.mark.parametrize(
    ("attention", "code"),
    [
        (explicit, "folded"),
        (batched, "folded"),
        (fused, "folded"),
        (unnormalised, "BN103"),
        (over_queries, "BN103"),
        (masked, "BN116"),
    ],
)
def test_a_norm_behind_attention(attention: Any, code: str) -> None:
    net = Net(attend(attention), qkv=Conv(3, 3 * WIDTH, 1, bias=False), bn=BN(WIDTH))
    folded(net, image(), {"bn": code}, image(1), image(3, 3, 6))


def test_a_scale_needs_no_softmax() -> None:
    net = Net(lambda s, x: (q := s.q(x)) @ s.k(x).transpose(1, 2) @ s.v(x) * s.gain + q.mean(), gain=nn.Parameter(torch.rand(4)),
              q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4))  # fmt: skip
    (site,) = bnctl.fold(net, torch.randn(2, 5, 4)).report.sites
    folded(net, torch.randn(2, 5, 4), {site.name: "folded"}, torch.randn(1, 3, 4))


def test_a_norm_over_the_rows_is_left() -> None:
    net = Net(lambda s, x: s.bn((s.q(x) @ s.k(x).transpose(1, 2)).softmax(-1) @ s.v(x)), bn=nn.BatchNorm1d(4),
              q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4))  # fmt: skip
    folded(net, torch.randn(2, 4, 4), {"bn": "BN110"}, torch.randn(3, 4, 4))


@pytest.mark.parametrize(
    ("opset", "axis", "last"),
    [
        (17, -1, "MatMul"),
        (17, None, "MatMul"),
        (17, 1, "Add"),
        (11, 2, "MatMul"),
        (11, 1, "Add"),
        (11, None, "Add"),
    ],
)
def test_onnx(opset: int, axis: int | None, last: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "wq": rng.normal(size=(4, 4)),
        "wv": rng.normal(size=(4, 4)),
        "s": rng.normal(size=4),
        "t": rng.normal(size=4),
    }
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"]),
        helper.make_node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "xt"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["weights"], **attributes),
        helper.make_node("MatMul", ["x", "wv"], ["v"]),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"]),
        helper.make_node("Mul", ["mixed", "s"], ["scaled"]),
        helper.make_node("Add", ["scaled", "t"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 4])],
            [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    result = bnctl.fold(model)
    onnx.checker.check_model(result.model, full_check=True)
    kinds = [n.op_type for n in result.model.graph.node]
    assert "Mul" not in kinds, "a scale needs no softmax"
    assert kinds[-1] == last
    assert result.report.verification["passed"]
