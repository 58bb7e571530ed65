"""Affines in code that also does other things: spliced out of the module's program, or left where one run cannot tell enough."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnctl
from bnctl.engines.torch.program import Program, Replay
from nets_traps import FunctionalBN, Net, error, outputs, randomise
from test_torch_traps import folded, image

Conv, BN = nn.Conv2d, nn.BatchNorm2d


class Holder(nn.Module):
    """Parameters of a BatchNorm, without code."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, features))
        self.bias = nn.Parameter(torch.linspace(1, -1, features))
        self.register_buffer("running_mean", torch.linspace(-1, 1, features))
        self.register_buffer("running_var", torch.linspace(0.5, 2, features))


def norm(holder: Any, x: Tensor) -> Tensor:
    """What the code of others does with them."""
    return F.batch_norm(x, holder.running_mean, holder.running_var, holder.weight, holder.bias)


class Block(nn.Module):
    """Two convolutions, a functional BatchNorm behind each, an activation as a child, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = Conv(4, 4, 3, padding=1, bias=False), Conv(4, 4, 3, padding=1)
        self.n1, self.n2 = Holder(4), Holder(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(norm(self.n1, self.c1(x)))
        return torch.relu(x + norm(self.n2, self.c2(y)))


def steps(model: nn.Module) -> list[str]:
    """What a replayed module still does."""
    assert isinstance(model.forward, Replay)
    return [step.name for step in model.forward.program.steps]


def test_functional_norms_of_a_block() -> None:
    net = Net(lambda s, x: s.block(s.block(x)), block=Block())
    model = folded(net, image(channels=4), {"block.n1": "folded", "block.n2": "folded"}, image(1, 4), image(3, 4, 6))
    assert steps(model.block) == ["c1", "act", "c2", "aten.add.Tensor", "aten.relu.default"]
    assert isinstance(model.block, Block)


def test_functional_norm_behind_a_functional_conv_without_bias() -> None:
    model = folded(Net(lambda s, x: s.f(x), f=FunctionalBN()), image(), {"f": "folded"}, image(1))
    assert steps(model.f) == ["aten.conv2d.default", "aten.relu.default"]
    assert {"f.weight", "f.bias_0"} <= set(model.state_dict())


def test_in_the_code_of_the_model_itself() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = Conv(3, 4, 3), Holder(4)

        def forward(self, image: Tensor, *, unused: Tensor | None = None) -> Any:
            y = norm(self.n, self.c(image))
            return {"logits": y, "pair": (y.mean((2, 3)), image)}

    model = folded(Whole(), image(), {"n": "folded"}, image(1))
    x = image()
    torch.testing.assert_close(model(image=x)["logits"], model(x)["logits"])
    with pytest.raises(TypeError, match="folded for calls with 1 tensor"):
        model(x, unused=x)


@pytest.mark.parametrize(
    "code",
    [
        lambda s, x: norm(s.n, s.c(x)) * (1 / math.sqrt(x.shape[-1])),
        lambda s, x: norm(s.n, s.c(x)).reshape(x.shape[0], -1),
        lambda s, x: norm(s.n, s.c(x)) + torch.zeros(1),
        lambda s, x: norm(s.n, s.c(x)) + torch.rand(1),
        lambda s, x: norm(s.n, s.c(x))[:, :, : x.shape[-1] // 2],
        lambda s, x: [norm(s.n, s.c(x)), x.shape[-1]],
    ],
    ids=[
        "number from a shape",
        "reshape by a shape",
        "tensor from nowhere",
        "random",
        "slice by a shape",
        "a number returned",
    ],
)
def test_code_that_one_run_cannot_tell_is_left(code: Any) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = Conv(3, 4, 3), Holder(4)

        def forward(self, x: Tensor) -> Any:
            return code(self, x)

    net = randomise(Net(lambda s, x: s.inner(x)[0], inner=Inner()))
    result = bnctl.fold(net, image(), verify=False)
    assert [(s.action, s.code) for s in result.report.sites] == [("left", "BN109")]


def test_a_module_that_does_different_things_in_different_calls_is_left() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = Conv(3, 3, 3, padding=1), Holder(3)

        def forward(self, x: Tensor) -> Tensor:
            y = norm(self.n, self.c(x))
            return y.relu() if x.shape[-1] > 8 else y

    net = Net(lambda s, x: s.f(s.f(F.pad(x, (1, 1)))[..., 1:-1]), f=Fickle())
    folded(net, image(), {"f.n": "BN109"}, image(1))


def test_a_feature_kept_on_the_way_is_still_kept() -> None:
    class Keeps(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = norm(self.n1, self.c1(x))
            return self.kept.relu()

    folded(Net(lambda s, x: s.block(x), block=Keeps()), image(channels=4), {"block.n1": "BN109"}, image(1, 4))


def test_a_replayed_model_is_copied_pickled_and_exported_like_any_other() -> None:
    x = image(channels=4)
    model = bnctl.fold(randomise(Block()), x).model
    reference = outputs(model, x)
    twin = copy.deepcopy(model)
    assert twin.forward.owner is twin
    with torch.no_grad():
        twin.c1.weight.mul_(2)
    assert error(reference, outputs(model, x)) == 0
    assert error(reference, outputs(twin, x)) > 0.01
    assert error(reference, outputs(pickle.loads(pickle.dumps(model)), x)) == 0
    exported = torch.export.export(model, (x,)).module()
    assert error(reference, [exported(x).detach()]) < 1e-6


def test_program_as_json() -> None:
    net = randomise(Net(lambda s, x: s.block(x), block=Block()))
    program = bnctl.fold(net, image(channels=4)).model.block.forward.program
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
    data = program.to_json()
    data["steps"][0] = {"op": "aten.from_file.default", "args": ["x"], "kwargs": {}, "outputs": [5]}
    with pytest.raises(ValueError, match="not an operator that bnctl replays"):
        Program.from_json(data)


def test_replay_follows_the_parameters_of_its_module() -> None:
    model = bnctl.fold(randomise(Net(lambda s, x: s.f(x), f=FunctionalBN())), image()).model
    double = outputs(copy.deepcopy(model).double(), image().double())
    assert error(outputs(model, image()), double) < 1e-5
    state = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(not t.any() for t in outputs(model, image()))


def test_what_a_hook_inside_a_child_keeps_it_will_keep_again() -> None:
    """The child's output outlives the pass, and yet the code around it keeps nothing; a tensor that the code keeps itself is another matter."""
    kept: list[Tensor] = []
    net = Net(lambda s, x: norm(s.n, s.conv(s.inner(x))).relu(), inner=nn.Sequential(Conv(3, 4, 1), nn.ReLU()))
    net.conv, net.n = Conv(4, 4, 1), Holder(4)
    net.inner[1].register_forward_hook(lambda module, args, output: kept.append(output))
    model = folded(net, image(), {"n": "folded"})
    assert len(kept) > 1 and isinstance(model.forward, Replay)

    def keeping(s: Any, x: Tensor) -> Tensor:
        s.seen = s.conv(x)
        return norm(s.n, s.other(s.seen)).relu()

    net = Net(keeping, conv=Conv(3, 4, 1), other=Conv(4, 4, 1), n=Holder(4))
    assert [site.code for site in bnctl.fold(net.eval(), image()).report.sites] == ["BN109"]
