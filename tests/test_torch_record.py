"""What the recorder relies on: below autograd, composite operators are seen whole, and tensors that a model keeps can still be trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnctl.engines.torch.living import LivingTensors, storage_of
from bnctl.engines.torch.record import ALIASED_WRITE, record


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


def test_a_tensor_that_moves_into_the_memory_of_another_is_its_alias() -> None:
    class Moving(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 2
            moved = torch.empty(0)
            moved.set_(y)
            y.mul_(3)
            return y, moved.sigmoid()

    trace = record(Moving(), (torch.randn(2, 3),))
    assert [call.op for call in trace.ops][-2:] == [ALIASED_WRITE, "aten.sigmoid.default"]
    assert trace.ops[-1].inputs == trace.ops[-2].outputs


def test_the_dead_are_forgotten_and_the_living_found() -> None:
    living, base = LivingTensors(), torch.zeros(4)
    view = base[1:]
    for number, tensor in enumerate((base, view, torch.zeros(2), base[:2])):
        living[tensor] = number
    del tensor  # the last of them
    assert dict(living.numbers()) == {id(base): 0, id(view): 1}
    assert [t is u for t, u in zip(living.over(storage_of(base)), (base, view), strict=True)] == [True, True]
    living[view] = 7
    assert living.get(view) == 7
    assert len(living.over(storage_of(base))) == 2


def test_a_tensor_that_only_torch_holds_stays_known() -> None:
    living = LivingTensors()
    parameter, tensor = nn.Parameter(torch.zeros(3)), torch.ones(3)
    living[tensor] = 5
    parameter.grad = tensor
    del tensor
    assert living.get(parameter.grad) == 5
    parameter.grad = None
    assert not list(living.numbers())
