"""The fold traps, on torch modules: what is folded, what is left and why, and the function before and after."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnctl
from bnctl.errors import ModelError, OverflowInFoldError
from bnctl.models.importing import import_module
from nets_traps import (
    WRONG,
    BNChildAct,
    BNReLU,
    FrozenBN,
    LayerScale,
    Net,
    StdConv,
    _fast,  # noqa: F401
    error,
    naive_fold,
    outputs,
    randomise,
)

Conv, BN, BN1, Lin = nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.Linear


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def image(batch: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))


def sites(result: Any) -> dict[str, str]:
    """Per site "folded", or the code of the reason."""
    return {s.name: s.code or s.action for s in result.report.sites}


def folded(model: nn.Module, x: Any, expected: dict[str, str], *others: Any, random: bool = True) -> nn.Module:
    """Fold, and hold the outcome against the float64 model on several inputs; the model itself must not change."""
    if random:
        randomise(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    rng = torch.get_rng_state()
    references = [outputs(model, inputs, torch.float64) for inputs in (x, *others)]
    result = bnctl.fold(model, x)
    assert sites(result) == expected
    for inputs, reference in zip((x, *others), references, strict=True):
        assert error(reference, outputs(result.model, inputs)) < 2e-5
        assert error(reference, outputs(result.model, inputs, torch.float64)) < 5e-6
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), rng)
    return result.model


def naive_error(model: nn.Module, x: Any) -> float:
    """How wrong the naive fold is."""
    randomise(model)
    return error(outputs(model, x, torch.float64), outputs(naive_fold(model), x))


def assert_trap(model: nn.Module, x: Any, expected: dict[str, str], *others: Any) -> nn.Module:
    """The naive fold gets it wrong and the comparison says so; bnctl gets it right."""
    assert naive_error(model, x) > WRONG
    return folded(model, x, expected, *others)


# 1 to 5: who reads what


def test_trap_01_conv_called_twice_one_call_followed_by_bn() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)) + s.c(x + 1), c=Conv(3, 4, 3), bn=BN(4))
    assert_trap(net, image(), {"bn": "BN106"}, image(1), image(5))


def test_trap_02_same_pair_called_twice() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)) * torch.sigmoid(s.bn(s.c(x + 1))), c=Conv(3, 4, 3), bn=BN(4))
    model = folded(net, image(), {"bn": "folded"}, image(1), image(5))
    assert isinstance(model.bn, nn.Identity)


def test_trap_02_fused_twice_is_caught() -> None:
    net = randomise(Net(lambda s, x: s.bn(s.c(x)) + s.bn(s.c(x + 1)), c=Conv(3, 4, 3), bn=BN(4)))
    twice = naive_fold(net)
    twice.c.weight.data *= 1.5  # as a second fusion would
    assert error(outputs(net, image(), torch.float64), outputs(twice, image())) > WRONG


def test_trap_02_pair_chained_on_itself() -> None:
    net = Net(lambda s, x: s.bn(s.c(s.bn(s.c(x)).relu())), c=Conv(4, 4, 3, padding=1), bn=BN(4))
    folded(net, image(channels=4), {"bn": "folded"}, image(1, 4), image(5, 4))


def test_trap_02_one_conv_feeding_two_bns() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        return s.bn1(y).relu() + s.bn2(y).sigmoid()

    assert_trap(
        Net(run, c=Conv(3, 4, 3), bn1=BN(4), bn2=BN(4)), image(), {"bn1": "BN101", "bn2": "BN101"}, image(1), image(5)
    )


def test_trap_02_one_bn_behind_two_convs() -> None:
    net = Net(lambda s, x: s.bn(s.a(x)).relu() + s.bn(s.b(x)).relu(), a=Conv(3, 4, 3), b=Conv(3, 4, 3), bn=BN(4))
    assert_trap(net, image(), {"bn": "folded"}, image(1), image(5))


def test_trap_03_two_convs_with_one_weight() -> None:
    net = Net(lambda s, x: s.bn(s.a(x)).relu() + s.b(x), a=Conv(3, 4, 3), bn=BN(4), b=Conv(3, 4, 3))
    net.b.weight = net.a.weight
    wrong = naive_fold(randomise(net))
    wrong.b.weight = wrong.a.weight
    assert error(outputs(net, image(), torch.float64), outputs(wrong, image())) > WRONG
    model = folded(net, image(), {"bn": "folded"}, image(1), image(5))
    assert model.b.weight is not model.a.weight
    assert torch.equal(model.b.weight, net.b.weight)


def test_trap_03_the_other_holder_is_not_called() -> None:
    net = Net(lambda s, x: s.bn(s.a(x)) if len(x) < 9 else s.b(x), a=Conv(3, 4, 3), bn=BN(4), b=Conv(3, 4, 3))
    net.b.weight, net.b.bias = net.a.weight, net.a.bias
    folded(net, image(), {"bn": "folded"}, image(1), image(9))


def test_trap_03_parameters_over_one_storage() -> None:
    net = Net(lambda s, x: s.bn(s.a(x)).relu() + s.b(x), a=Conv(3, 4, 3), bn=BN(4), b=Conv(3, 4, 3))
    net.b.weight = nn.Parameter(net.a.weight.data)
    folded(net, image(), {"bn": "folded"}, image(1), image(5))


def test_trap_03_both_holders_fold() -> None:
    net = Net(lambda s, x: s.bn1(s.a(x)).relu() + s.bn2(s.b(x)), a=Conv(3, 4, 3), bn1=BN(4), b=Conv(3, 4, 3), bn2=BN(4))
    net.b.weight = net.a.weight
    folded(net, image(), {"bn1": "folded", "bn2": "folded"}, image(1), image(5))


def test_trap_03_weight_also_read_by_a_function() -> None:
    net = Net(lambda s, x: s.bn(s.a(x)).relu() * s.a.weight.abs().sum(), a=Conv(3, 4, 3), bn=BN(4))
    assert_trap(net, image(), {"bn": "BN106"}, image(1), image(5))


def test_trap_04_conv_output_has_another_reader() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        return s.bn(y).relu() + y

    assert_trap(Net(run, c=Conv(3, 4, 3), bn=BN(4)), image(), {"bn": "BN101"}, image(1), image(5))


def test_trap_04_conv_output_is_an_output() -> None:
    def run(s: Any, x: Tensor) -> Any:
        y = s.c(x)
        return {"features": [y], "head": s.bn(y).relu()}

    assert_trap(Net(run, c=Conv(3, 4, 3), bn=BN(4)), image(), {"bn": "BN102"}, image(1), image(5))


def test_trap_05_conv_relu_bn() -> None:
    net = Net(lambda s, x: s.bn(s.c(x).relu()), c=Conv(3, 4, 3), bn=BN(4))
    assert_trap(net, image(), {"bn": "BN103"}, image(1), image(5))


def test_trap_05_definition_order_is_not_call_order() -> None:
    net = Net(lambda s, x: s.c(s.bn(x).relu()), c=Conv(4, 4, 3), bn=BN(4))
    assert_trap(net, image(channels=4), {"bn": "BN104"}, image(1, 4), image(5, 4))


# 6, 7: layouts and axes


@pytest.mark.parametrize(
    "conv",
    [
        nn.ConvTranspose2d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, bias=False),
        nn.ConvTranspose2d(4, 8, 3, groups=2),
        nn.ConvTranspose2d(4, 4, 2, groups=4, dilation=2),
        Conv(4, 8, 3, groups=2, bias=False),
        Conv(4, 4, 3, groups=4, padding=1),
        Conv(4, 12, 3, groups=4, padding=1, padding_mode="circular"),
        Conv(4, 6, 3, stride=2, padding="valid", dilation=2),
    ],
)
def test_trap_06_layouts(conv: Any) -> None:
    net = Net(lambda s, x: s.bn(s.c(x)).relu(), c=conv, bn=BN(conv.out_channels))
    folded(net, image(channels=4), {"bn": "folded"}, image(1, 4), image(5, 4))


def test_trap_06_wrong_axis_of_a_square_conv_transpose_is_caught() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)), c=nn.ConvTranspose2d(4, 4, 3), bn=BN(4))
    assert naive_error(net, image(channels=4)) > WRONG


@pytest.mark.parametrize(("kind", "rank"), [(1, 3), (3, 5)])
def test_trap_06_other_ranks(kind: int, rank: int) -> None:
    conv, norm = getattr(nn, f"Conv{kind}d"), getattr(nn, f"BatchNorm{kind}d")
    net = Net(lambda s, x: s.bn(s.c(x)).relu(), c=conv(4, 6, 3, groups=2), bn=norm(6))
    xs = [torch.randn(n, 4, *[5] * (rank - 2)) for n in (2, 1, 5)]
    folded(net, xs[0], {"bn": "folded"}, *xs[1:])


def test_trap_07_linear_and_bn_on_different_axes_of_equal_size() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)).relu(), c=Lin(5, 4), bn=BN1(4))
    xs = [torch.randn(n, 4, 5) for n in (2, 1, 7)]
    assert_trap(net, xs[0], {"bn": "BN110"}, *xs[1:])


def test_trap_07_transposed_to_the_same_axis() -> None:
    net = Net(lambda s, x: s.bn(s.c(x).transpose(1, 2)).relu(), c=Lin(5, 4), bn=BN1(4))
    xs = [torch.randn(n, 4, 5) for n in (2, 1, 7)]
    folded(net, xs[0], {"bn": "folded"}, *xs[1:])


# 9: forwards, and padding


def test_trap_09_bn_before_a_padded_1x1_conv() -> None:
    model = randomise(Net(lambda s, x: s.c(s.bn(x)), bn=BN(4), c=Conv(4, 4, 1, padding=1)))
    result = bnctl.fold(model, image(channels=4))
    assert sites(result) == {"bn": "BN104"}
    assert "BN114" in result.report.sites[0].reason
    unpadded = randomise(Net(lambda s, x: s.c(s.bn(x)), bn=BN(4), c=Conv(4, 4, 1)))
    wrong = bnctl.fold(unpadded, image(channels=4)).model  # absorbed as if there were no padding
    wrong.c.padding = (1, 1)
    model.load_state_dict(unpadded.state_dict())
    assert error(outputs(model, image(channels=4), torch.float64), outputs(wrong, image(channels=4))) > WRONG


@pytest.mark.parametrize(
    ("name", "conv"),
    [
        ("plain", Conv(4, 6, 3)),
        ("grouped", Conv(4, 6, 3, groups=2, bias=False)),
        ("depthwise", Conv(4, 8, 3, groups=4)),
        ("reflect", Conv(4, 6, 3, padding=1, padding_mode="reflect")),
        ("valid", Conv(4, 6, 3, padding="valid")),
    ],
)
def test_forward_into_conv(name: str, conv: Any) -> None:
    net = Net(lambda s, x: s.c(s.bn(x)), bn=BN(4), c=conv)
    folded(net, image(channels=4), {"bn": "folded"}, image(1, 4), image(5, 4))


@pytest.mark.parametrize("conv", [Conv(4, 4, 3, padding=1), Conv(4, 4, 3, padding="same"), nn.ConvTranspose2d(4, 4, 3)])
def test_forward_into_zeros_is_refused(conv: Any) -> None:
    net = Net(lambda s, x: s.c(s.bn(x)), bn=BN(4), c=conv)
    result = bnctl.fold(randomise(net), image(channels=4))
    assert sites(result) == {"bn": "BN104"}
    assert "(BN114)" in result.report.sites[0].reason


def test_forward_through_constant_padding_is_refused() -> None:
    net = Net(lambda s, x: s.c(F.pad(s.bn(x), (1, 1, 1, 1))), bn=BN(4), c=Conv(4, 4, 3))
    result = bnctl.fold(randomise(net), image(channels=4))
    assert "(BN114)" in result.report.sites[0].reason


def test_forward_into_linear_and_through_flatten() -> None:
    flat = Net(lambda s, x: s.c(s.bn(x.relu()).flatten(1)), bn=BN(4), c=Lin(4 * 64, 5))
    folded(flat, image(channels=4), {"bn": "folded"}, image(1, 4), image(5, 4))
    plain = Net(lambda s, x: s.c(s.bn(x)), bn=BN1(6), c=Lin(6, 5, bias=False))
    folded(plain, torch.randn(4, 6), {"bn": "folded"}, torch.randn(1, 6), torch.randn(7, 6))


def test_forward_into_all_readers_or_none() -> None:
    def both(s: Any, x: Tensor) -> Tensor:
        y = s.bn(x.relu())
        return s.a(y) * torch.sigmoid(s.b(F.avg_pool2d(y, 1)))

    folded(
        Net(both, bn=BN(4), a=Conv(4, 4, 3), b=Conv(4, 4, 3)),
        image(channels=4),
        {"bn": "folded"},
        image(1, 4),
        image(5, 4),
    )

    def one(s: Any, x: Tensor) -> Tensor:
        y = s.bn(x.relu())
        return s.a(y) * y.mean()

    folded(Net(one, bn=BN(4), a=Conv(4, 4, 3)), image(channels=4), {"bn": "BN103"}, image(1, 4))


# 10 to 15: parameters


def test_trap_10_dead_channels_and_tiny_variance() -> None:
    net = randomise(Net(lambda s, x: s.bn(s.c(x)).relu(), c=Conv(3, 4, 3), bn=BN(4)))
    net.bn.weight.data = torch.tensor([0.0, -1.0, 1.0, 0.0])
    net.bn.running_var.copy_(torch.tensor([1.0, 1e-12, 0.0, 0.0]))
    folded(net, image(), {"bn": "folded"}, image(1), image(5), random=False)


def test_trap_10_variance_that_is_not_positive() -> None:
    net = randomise(Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BN(4)))
    net.bn.running_var[1] = -1
    assert sites(bnctl.fold(net, image())) == {"bn": "BN115"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_trap_11_without_affine_or_bias(bias: bool, affine: bool) -> None:
    net = Net(lambda s, x: s.bn(s.c(x)).relu(), c=Conv(3, 4, 3, bias=bias), bn=BN(4, affine=affine))
    model = folded(net, image(), {"bn": "folded"}, image(1), image(5))
    assert set(model.state_dict()) == {"c.weight", "c.bias"}


def test_trap_11_bias_without_bn_is_caught() -> None:
    net = randomise(Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3, bias=False), bn=BN(4)))
    model = bnctl.fold(net, image()).model
    model.c.bias = None
    assert error(outputs(net, image(), torch.float64), outputs(model, image())) > WRONG


def test_trap_12_batch_statistics_are_refused() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BN(4, track_running_stats=False))
    assert sites(bnctl.fold(randomise(net), image())) == {"bn": "BN105"}


def test_trap_12_bn_left_in_train_mode() -> None:
    net = randomise(Net(lambda s, x: s.b2(s.c2(s.b1(s.c(x)))), c=Conv(3, 4, 3), b1=BN(4), c2=Conv(4, 4, 1), b2=BN(4)))
    net.b1.train()
    state = copy.deepcopy(net.state_dict())
    result = bnctl.fold(net, image())
    assert sites(result) == {"b1": "BN105", "b2": "folded"}
    for model in (net, result.model):
        assert model.b1.training
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items() if k.startswith("b1"))


def test_trap_12_model_in_training_mode_is_captured_in_eval_mode() -> None:
    net = randomise(Net(lambda s, x: s.d(s.bn(s.c(x))), c=Conv(3, 4, 3), bn=BN(4), d=nn.Dropout(0.5)))
    reference = outputs(net, image(), torch.float64)
    net.train()
    state = copy.deepcopy(net.state_dict())
    result = bnctl.fold(net, image())
    assert sites(result) == {"bn": "folded"}
    assert all(m.training for m in net.modules())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert error(reference, outputs(result.model.eval(), image())) < 2e-5


def test_trap_13_activation_as_a_child_is_kept() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BNChildAct(4))
    model = assert_trap(net, image(), {"bn": "folded"}, image(1), image(5))
    assert "bn.act.weight" in model.state_dict()


def test_trap_13_activation_in_code_is_kept() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BNReLU(4))
    assert_trap(net, image(), {"bn": "folded"}, image(1), image(5))


def test_trap_13_timm_batchnorm_act() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    layers = import_module("timm.layers")
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=layers.BatchNormAct2d(4))
    assert_trap(net, image(), {"bn": "folded"}, image(1), image(5))


def test_trap_13_frozen_bn() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)).relu(), c=Conv(3, 4, 3, bias=False), bn=FrozenBN(4))
    folded(net, image(), {"bn": "folded"}, image(1), image(5))


def test_trap_13_frozen_bn_that_promotes_the_dtype_stays() -> None:
    net = Net(lambda s, x: s.l(s.bn(s.c(x)).mean((2, 3))), c=Conv(3, 4, 3), bn=FrozenBN(4), l=Lin(4, 2))
    net.c.to(torch.bfloat16)
    result = bnctl.fold(net.eval(), image().bfloat16())
    assert isinstance(result.model.bn, FrozenBN)
    assert outputs(result.model, image().bfloat16())[0].equal(outputs(net, image().bfloat16())[0])


def test_trap_13_sync_bn() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=nn.SyncBatchNorm(4))
    folded(net, image(), {"bn": "folded"}, image(1), image(5))


def test_trap_13_lazy_bn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=nn.LazyBatchNorm2d())
    with pytest.raises(ModelError, match="not initialised"):
        bnctl.fold(net, image())
    net(image())
    folded(net, image(), {"bn": "folded"}, image(1), image(5))


def test_trap_13_instance_norm() -> None:
    tracked = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    folded(Net(lambda s, x: s.n(s.c(x)), c=Conv(3, 4, 3), n=tracked), image(), {"n": "folded"}, image(1), image(5))
    plain = randomise(Net(lambda s, x: s.n(s.c(x)), c=Conv(3, 4, 3), n=nn.InstanceNorm2d(4)))
    assert set(sites(bnctl.fold(plain, image())).values()) <= {"BN105"}


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_trap_14_eps(eps: float) -> None:
    net = Net(lambda s, x: s.bn(s.c(x)).relu(), c=Conv(3, 4, 3), bn=BN(4, eps))
    folded(net, image(), {"bn": "folded"}, image(1), image(5))
    wrong = copy.deepcopy(net)
    wrong.bn.eps = 1e-5
    assert eps < 0.1 or error(outputs(net, image(), torch.float64), outputs(wrong, image())) > WRONG


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_trap_15_half_precision_weights_with_float_bn(dtype: torch.dtype, bias: bool) -> None:
    net = randomise(Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3, bias=bias), bn=BN(4)))
    net.c.to(dtype).requires_grad_(False)
    x = image().to(dtype)
    reference = outputs(net, x, torch.float64)
    result = bnctl.fold(net, x)
    assert sites(result) == {"bn": "folded"}
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in result.model.parameters())
    assert error(reference, outputs(result.model, x, torch.float64)) < 40 * torch.finfo(dtype).eps


def test_trap_15_bfloat16_model() -> None:
    net = randomise(Net(lambda s, x: s.bn(s.c(x)).relu(), c=Conv(3, 4, 3, bias=False), bn=BN(4))).to(torch.bfloat16)
    net.c.weight.requires_grad_(False)
    model = bnctl.fold(net, image().bfloat16()).model
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}


def test_trap_15_overflow_is_refused() -> None:
    net = randomise(Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BN(4)))
    net.c.to(torch.float16)
    net.bn.weight.data.fill_(1e7)
    with pytest.raises(OverflowInFoldError, match=r"c: .*BN115"):
        bnctl.fold(net, image().half())


# 16: hooks and computed weights


def test_trap_16_hook_that_changes_the_output() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BN(4))
    net.c.register_forward_hook(lambda module, args, output: output * 2)
    assert_trap(net, image(), {"bn": "BN107"}, image(1), image(5))


def test_trap_16_hook_that_observes_or_stores() -> None:
    kept: list[Tensor] = []
    for hook in (lambda m, a, o: kept.append(o), lambda m, a, o: print(end="") if o.isnan().any() else None):
        net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BN(4))
        net.c.register_forward_hook(hook)
        folded(net, image(), {"bn": "BN107"})


def test_trap_16_hook_on_the_norm() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BN(4))
    net.bn.register_forward_hook(lambda module, args, output: output * 2)
    folded(net, image(), {"bn": "BN107"}, image(1))


def test_trap_16_pre_hooks_see_inputs_only() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BN(4))
    net.c.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    folded(net, image(), {"bn": "folded"}, image(1))
    net = Net(lambda s, x: s.bn(s.c(x)), c=Conv(3, 4, 3), bn=BN(4))
    net.bn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    folded(net, image(), {"bn": "BN107"}, image(1))


def test_trap_16_hook_behind_the_pair_does_not_matter() -> None:
    net = Net(lambda s, x: s.r(s.bn(s.c(x))), c=Conv(3, 4, 3), bn=BN(4), r=nn.ReLU())
    net.r.register_forward_hook(lambda module, args, output: output * 2)
    folded(net, image(), {"bn": "folded"}, image(1))


def test_trap_16_feature_kept_in_an_attribute() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        s.feature = s.c(x)
        return s.bn(s.feature)

    net = Net(run, c=Conv(3, 4, 3), bn=BN(4))
    model = folded(net, image(), {"bn": "BN107"}, image(1))
    assert "feature" not in vars(model)


@pytest.mark.parametrize("which", ["weight_norm", "spectral_norm", "spectral_norm_old", "std"])
def test_trap_16_computed_weights(which: str) -> None:
    wrap = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "spectral_norm_old": nn.utils.spectral_norm,
        "std": lambda conv: StdConv(3, 4, 3),
    }[which]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = wrap(Conv(3, 4, 3))
    net = Net(lambda s, x: s.bn(s.c(x)), c=conv, bn=BN(4))
    model = folded(net, image(), {"bn": "folded"}, image(1))
    assert type(model.c) is Conv
    assert set(model.c.state_dict()) == {"weight", "bias"}
    assert not model.c._forward_pre_hooks


def test_computed_weight_behind_a_hook_of_the_user_is_left() -> None:
    conv = nn.utils.parametrizations.weight_norm(Conv(3, 4, 3))
    conv.register_forward_hook(lambda module, args, output: output.clone())
    net = Net(lambda s, x: s.bn(s.c(x)), c=conv, bn=BN(4))
    folded(net, image(), {"bn": "BN107"}, image(1))


def test_parameter_behind_a_computed_weight_that_others_read_is_left() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)) * s.c.weight.sum(), c=StdConv(3, 4, 3), bn=BN(4))
    folded(net, image(), {"bn": "BN108"}, image(1))


def test_computed_weight_of_a_layer_that_is_called_twice() -> None:
    once = Net(lambda s, x: s.bn(s.c(s.bn(s.c(x)))), c=StdConv(3, 3, 3), bn=BN(3))
    folded(once, image(), {"bn": "folded"}, image(1))
    other = Net(lambda s, x: s.c(s.bn(s.c(x))), c=StdConv(3, 3, 3, padding=1), bn=BN(3))
    folded(other, image(), {"bn": "BN106"}, image(1))


def test_a_computed_buffer_is_copied_although_torch_refuses() -> None:
    net = randomise(Net(lambda s, x: s.b(s.c(x)) + s.w.mean(), c=Conv(3, 4, 3), b=BN(4)))
    net.register_buffer("w", net.c.weight * 2)
    as_float32(net, {"b": "folded"})


def test_a_scripted_layer_inside_is_run_as_it_is() -> None:
    net = randomise(nn.Sequential(Conv(3, 4, 3), BN(4), nn.ReLU(), Conv(4, 4, 1), BN(4)).eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net[4] = torch.jit.script(net[4])
    as_float32(net, {"1": "folded", "4": "folded"})


def as_float32(model: nn.Module, expected: dict[str, str]) -> None:
    """Fold a model that does not like to become float64."""
    with torch.no_grad():
        result = bnctl.fold(model, image())
        assert sites(result) == expected
        for inputs in (image(), image(1)):
            assert error([model(inputs)], [result.model(inputs)]) < 2e-5


def test_weight_normed_model_is_copied_although_torch_refuses() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = nn.utils.weight_norm(Conv(3, 4, 3))
    net = randomise(Net(lambda s, x: s.b2(s.d(s.b1(s.c(x)).relu())), c=conv, b1=BN(4), d=Conv(4, 4, 3), b2=BN(4)))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    x = image()
    with torch.no_grad():
        reference = net.double()(x.double())
        net.float()
        result = bnctl.fold(net, x)
        assert sites(result) == {"b1": "folded", "b2": "folded"}
        assert error([reference], [result.model(x).double()]) < 2e-5


# 20: control flow and structure


def test_trap_20_data_dependent_control_flow() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.bn(s.c(x))
        return s.d(y) if bool((x.sum() > 0).item()) else y

    net = Net(run, c=Conv(3, 4, 3), bn=BN(4), d=Conv(4, 4, 1))
    folded(net, image().abs(), {"bn": "folded"}, -image().abs(), image(1).abs())


def test_trap_20_branch_that_reads_the_conv_output() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        return s.bn(y) * y.mean() if bool(y.sum() > -1e9) else s.bn(y)

    folded(Net(run, c=Conv(3, 4, 3), bn=BN(4)), image(), {"bn": "BN101"}, image(1))


@dataclass
class Sample:
    image: Tensor
    scale: float = 2.0


@pytest.mark.parametrize(
    ("inputs", "forward"),
    [
        ({"image": image()}, lambda s, image: {"out": s.bn(s.c(image))}),
        ((image(), {"mask": image()}), lambda s, x, extra: (s.bn(s.c(x)), [extra["mask"]])),
        ((Sample(image()),), lambda s, sample: Sample(s.bn(s.c(sample.image)) * sample.scale)),
        (([image(), image(3)],), lambda s, xs: [s.bn(s.c(x)) for x in xs]),
    ],
    ids=["keywords", "tuple", "dataclass", "list"],
)
def test_trap_20_structures(inputs: Any, forward: Any) -> None:
    net = randomise(Net(forward, c=Conv(3, 4, 3), bn=BN(4)))
    reference = outputs(net, inputs)
    result = bnctl.fold(net, inputs)
    assert sites(result) == {"bn": "folded"}
    assert error(reference, outputs(result.model, inputs)) < 2e-5


# Views, aliases and in-place operators


def test_write_through_a_view() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        v = y[:, :2]
        v.mul_(2)
        return s.bn(y)

    assert_trap(Net(run, c=Conv(3, 4, 3), bn=BN(4)), image(), {"bn": "BN117"}, image(1), image(5))


def test_in_place_activation_behind_the_pair() -> None:
    net = Net(lambda s, x: s.bn(s.c(x)).relu_(), c=Conv(3, 4, 3), bn=BN(4))
    folded(net, image(), {"bn": "folded"}, image(1), image(5))


def test_in_place_activation_between() -> None:
    net = Net(lambda s, x: s.bn(s.c(x).relu_()), c=Conv(3, 4, 3), bn=BN(4))
    assert_trap(net, image(), {"bn": "BN103"}, image(1), image(5))


def test_forward_fold_must_not_let_a_later_write_reach_the_input_of_the_norm() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x).relu()
        z = s.bn(y)
        z *= 0.5
        return s.b(z) + s.c(y)

    net = Net(run, a=Conv(3, 4, 3), bn=BN(4), b=Conv(4, 4, 1), c=Conv(4, 4, 1))
    folded(net, image(), {"bn": "BN101"}, image(1), image(5))


@pytest.mark.parametrize("norm", ["bn", "ones"])
@pytest.mark.parametrize(
    "write",
    [lambda a: a.neg_(), lambda a: a[:, :2].neg_(), lambda a: a.transpose(1, 2).neg_()],
    ids=["directly", "through a slice", "through a transpose"],
)
def test_forward_fold_must_not_let_another_reader_write_into_what_the_norm_reads(write: Any, norm: str) -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        a = s.c0(x).sigmoid()
        y = s.bn(a) if norm == "bn" else a * s.ones
        write(a)
        return s.c1(y) + s.c2(a)

    layers = {"c0": Conv(3, 4, 1), "c1": Conv(4, 4, 1), "c2": Conv(4, 4, 1), "bn": BN(4)}
    net = Net(run, **layers, ones=nn.Parameter(torch.ones(4, 1, 1)))
    folded(net, image(), {"bn": "BN101"} if norm == "bn" else {}, image(1))


def test_in_place_dropout_in_eval_mode_writes_nothing() -> None:
    net = Net(lambda s, x: s.c(s.d(s.bn(x.relu()))), bn=BN1(6), d=nn.Dropout(inplace=True), c=Lin(6, 4))
    folded(net, torch.randn(3, 6), {"bn": "folded"}, torch.randn(1, 6))


# Modules


def test_module_reached_by_two_paths() -> None:
    conv, norm = Conv(3, 4, 3, bias=False), BN(4)
    net = Net(lambda s, x: s.bn(s.c(x)), c=conv, bn=norm, again=nn.ModuleList([conv, norm]))
    model = folded(net, image(), {"bn": "folded"}, image(1))
    assert isinstance(model.again[1], nn.Identity)
    assert model.again[0] is model.c


def test_modules_in_a_plain_list_are_left() -> None:
    net = randomise(Net(lambda s, x: s.blocks[1](s.blocks[0](x)) + s.one, one=nn.Parameter(torch.ones(1))))
    object.__setattr__(net, "blocks", [Conv(3, 4, 3), randomise(BN(4))])
    result = bnctl.fold(net, image())
    assert set(sites(result).values()) <= {"BN109"}
    assert error(outputs(net, image()), outputs(result.model, image())) == 0


def test_norm_that_returns_a_tuple() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * self.norm,)

    net = Net(lambda s, x: s.p(s.bn(s.c(x)))[0], c=Conv(3, 4, 3), bn=BN(4), p=Pair())
    folded(net, image(), {"bn": "folded", "p#0": "folded"}, image(1))


def test_norm_called_by_keyword_is_left() -> None:
    net = Net(lambda s, x: s.bn(input=s.c(x)), c=Conv(3, 4, 3), bn=BN(4))
    folded(net, image(), {"bn": "BN109"}, image(1))


def test_layer_that_is_affine_in_one_call_only() -> None:
    class Sometimes(LayerScale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma if x.shape[-1] == 4 and x.ndim == 2 else (x * self.gamma).softmax(-1)

    net = Net(lambda s, x: s.ls(s.c(x)) + s.ls(s.c(x)[:, None])[:, 0], c=Lin(3, 4), ls=Sometimes(4))
    folded(net, torch.randn(3, 3), {}, torch.randn(1, 3))


def test_layer_scale_is_folded_too() -> None:
    net = Net(lambda s, x: x + s.ls(s.c(x)), c=Lin(4, 4), ls=LayerScale(4))
    folded(net, torch.randn(2, 5, 4), {"ls": "folded"}, torch.randn(1, 3, 4))


def test_capture_leaves_no_trace_in_the_result() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        s.calls += 1
        s.seen += 1
        return s.bn(s.c(x))

    net = Net(run, c=Conv(3, 4, 3), bn=BN(4))
    net.calls = 0
    net.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    model = bnctl.fold(randomise(net), image(), verify=False).model
    assert (model.calls, int(model.seen)) == (0, 0)


# Pass-through


def test_concat_of_two_branches() -> None:
    net = Net(lambda s, x: s.bn(torch.cat([s.a(x), s.b(x)], 1)), a=Conv(3, 4, 3), b=Conv(3, 2, 3), bn=BN(6))
    assert_trap_into(net, ("a", "b"))


def assert_trap_into(net: nn.Module, into: tuple[str, ...]) -> None:
    folded(net, image(), {"bn": "folded"}, image(1), image(5))
    site = bnctl.fold(net, image()).report.sites[0]
    assert set(site.into) == set(into)


def test_add_of_two_branches() -> None:
    assert_trap_into(
        Net(lambda s, x: s.bn(s.a(x) + s.b(x)), a=Conv(3, 4, 3), b=Conv(3, 4, 3, bias=False), bn=BN(4)), ("a", "b")
    )
    assert_trap_into(Net(lambda s, x: s.bn(s.a(x) - s.b(x)), a=Conv(3, 4, 3), b=Conv(3, 4, 3), bn=BN(4)), ("a", "b"))


def test_add_with_an_input_is_left() -> None:
    net = Net(lambda s, x: s.bn(s.a(x) + x), a=Conv(4, 4, 3, padding=1), bn=BN(4))
    assert_trap(net, image(channels=4), {"bn": "BN101"}, image(1, 4))


def test_split_forward() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        one, two = s.bn(x.relu()).split([1, 3], 1)
        return s.a(one) + s.b(two)

    folded(Net(run, bn=BN(4), a=Conv(1, 4, 3), b=Conv(3, 4, 3)), image(channels=4), {"bn": "folded"}, image(1, 4))


def test_permute_and_flatten_as_in_levit() -> None:
    net = Net(lambda s, x: s.bn(s.c(x).flatten(0, 1)).reshape(x.shape[0], -1, 6), c=Lin(5, 6), bn=BN1(6))
    xs = [torch.randn(n, 4, 5) for n in (2, 1, 7)]
    folded(net, xs[0], {"bn": "folded"}, *xs[1:])
    assert naive_error(net, xs[0]) < 1e-5  # here the pair is a pair


def test_permute_pair() -> None:
    net = Net(lambda s, x: s.bn(s.c(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).relu(), c=Lin(3, 4), bn=BN(4))
    folded(net, image(), {"bn": "folded"}, image(1), image(5))


def test_average_pool_dropout_and_reflection_pass() -> None:
    net = Net(
        lambda s, x: s.bn(F.pad(s.d(F.avg_pool2d(s.c(x), 2)), (1, 1, 1, 1), "reflect")),
        c=Conv(3, 4, 3),
        d=nn.Dropout(),
        bn=BN(4),
    )
    folded(net, image(), {"bn": "folded"}, image(1), image(5))


def test_average_pool_with_counted_padding_is_left() -> None:
    net = Net(lambda s, x: s.bn(F.avg_pool2d(s.c(x), 3, 1, 1)), c=Conv(3, 4, 3), bn=BN(4))
    assert_trap(net, image(), {"bn": "BN114"}, image(1))


@pytest.mark.parametrize("returns_indices", [False, True])
def test_max_pool(returns_indices: bool) -> None:
    def run(s: Any, x: Tensor) -> Any:
        y = F.max_pool2d(s.c(x), 2, return_indices=returns_indices)
        return (s.bn(y[0]).relu(), F.max_unpool2d(y[0].detach() * 0 + 1, y[1], 2)) if returns_indices else s.bn(y)

    net = randomise(Net(run, c=Conv(3, 4, 3), bn=BN(4)))
    assert sites(bnctl.fold(net, image())) == {"bn": "BN101" if returns_indices else "BN113"}
    net.bn.weight.data.abs_()
    folded(net, image(), {"bn": "BN101" if returns_indices else "folded"}, image(1), random=False)


def test_max_pool_whose_indices_are_used_and_a_dead_channel() -> None:
    def run(s: Any, x: Tensor) -> Any:
        y, indices = F.max_pool2d(s.c(x), 2, return_indices=True)
        return s.bn(y), indices.double()

    net = randomise(Net(run, c=Conv(3, 4, 3), bn=BN(4)))
    net.bn.weight.data = torch.tensor([0.0, 1.0, 1.0, 1.0])
    folded(net, image(), {"bn": "BN119"}, random=False)
    net.bn.weight.data += 0.5
    folded(net, image(), {"bn": "folded"}, random=False)
