"""What the recorder relies on: below autograd, composite operators are seen whole, and tensors that a model keeps can still be trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnctl.engines.torch.record import record


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.linear(x).flatten(0, 1)
        return self.bn(self.kept)


def test_composite_operators_are_seen_whole() -> None:
    trace = record(Keeping().eval(), (torch.randn(2, 3, 4),))
    assert [call.op for call in trace.ops] == [
        "aten.linear.default",
        "aten.flatten.using_ints",
        "aten.batch_norm.default",
    ]


def test_kept_tensors_are_no_inference_tensors() -> None:
    model = Keeping().eval()
    record(model, (torch.randn(2, 3, 4),))
    assert not model.kept.is_inference()
    with torch.inference_mode():
        model(torch.randn(2, 3, 4))
    assert model.kept.is_inference(), "the control: inference mode would leave one"
