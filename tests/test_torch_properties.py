"""Random small networks: folding keeps the function, what the algebra says can go is gone, and insert then fold is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnctl
from bnctl.graph.affine import AffineMap
from nets_traps import _fast, error, outputs, randomise  # noqa: F401

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
CHANNELS = 4
"""Every layer keeps four channels, so that every wrong axis goes unnoticed unless it is noticed by the numbers."""

PLAIN = ["conv", "grouped", "depthwise", "same", "circular", "pointwise", "transposed", "bn", "bn", "relu", "silu"]
MORE = [
    "max_pool",
    "avg_pool",
    "dropout",
    "scale",
    "double_permute",
    "channels_last",
    "concat",
    "add",
    "reuse",
    "inplace",
    "product",
    "einsum",
    "group_norm",
    "layer_norm",
]


def padded(x: Tensor, pads: tuple[int, int], mode: str) -> Tensor:
    """Pads on all spatial axes, and as much cut off elsewhere."""
    space = x.ndim - 2
    return F.pad(F.pad(x, pads * space, mode=mode), (-pads[1], -pads[0]) * space)


FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll((1, 3), (1, -1)),
    "shuffle": lambda x: torch.channel_shuffle(x, 2),
    "reorder": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "stack": lambda x: torch.stack([*x.unbind(1)][::-1], 1),
    "split": lambda x: torch.hstack(x.tensor_split((1, 3), 1)),
    "reflect": lambda x: padded(x, (1, 2), "reflect"),
    "replicate": lambda x: padded(x, (2, 1), "replicate"),
    "wrap": lambda x: padded(x, (1, 1), "circular"),
    "mean_and_expand": lambda x: x.mean(-1, keepdim=True).expand_as(x),
    "tile": lambda x: x.repeat(*[1] * (x.ndim - 1), 2)[..., 2:6],
    "resize": lambda x: F.interpolate(
        F.interpolate(x, scale_factor=2, mode="nearest-exact"), size=x.shape[2:], mode="nearest"
    ),
    "adaptive": lambda x: F.interpolate(x, size=x.shape[2:], mode="area"),
    "through_depth": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
}
"""Every affine per channel passes these back to the convolution before them, and ahead to the one behind them."""

HARD: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: F.pad(x, (2, 0))[..., 1:-1],
    "counted": lambda x: (F.avg_pool2d if x.ndim == 4 else F.avg_pool1d)(x, 3, 1, 1),
    "gate": lambda x: x * x.mean(-1, keepdim=True).sigmoid(),
    "amax": lambda x: x.amax(-1, keepdim=True) + torch.zeros_like(x),
    "sum": lambda x: x.sum(-1, keepdim=True).expand_as(x) / 4,
    "overlap": lambda x: torch.cat([x[:, :3], x[:, 2:3]], 1),
    "twice": lambda x: x[:, :2].repeat(1, 2, *[1] * (x.ndim - 2)),
    "python_sum": lambda x: sum([x, x.relu(), x]),  # type: ignore[arg-type, return-value]
}
"""Nothing passes these in general, and what passes must be exact."""

BRANCHES = ["parts", "slices", "halves", "difference", "broadcast", "joined"]


def layer(kind: str, rank: int, bias: bool) -> nn.Module:
    conv: Any = {3: nn.Conv1d, 4: nn.Conv2d}[rank]
    c = CHANNELS
    makers = {
        "conv": lambda: conv(c, c, 3, padding=1, bias=bias),
        "grouped": lambda: conv(c, c, 3, padding=1, groups=2, bias=bias),
        "depthwise": lambda: conv(c, c, 1, groups=c, bias=bias),
        "same": lambda: conv(c, c, 3, padding="same", bias=bias),
        "circular": lambda: conv(c, c, 3, padding=1, padding_mode="circular", bias=bias),
        "pointwise": lambda: conv(c, c, 1, bias=bias),
        "transposed": lambda: {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d}[rank](c, c, 3, padding=1, bias=bias),
        "bn": lambda: {3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[rank](c, eps=1e-3, affine=bias),
        "linear": lambda: nn.Linear(c, c, bias=bias),
        "group_norm": lambda: nn.GroupNorm(2, c, affine=bias),
        "layer_norm": lambda: nn.LayerNorm(c, bias=bias),
    }
    return makers[kind]() if kind in makers else nn.Identity()


def norm(rank: int, channels: int) -> nn.Module:
    return {3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[rank](channels)


class Block(nn.Module):
    """One drawn step; steps with branches hold blocks."""

    def __init__(self, kind: str, rank: int, bias: bool, inner: list[Any]) -> None:
        super().__init__()
        self.kind, self.rank = kind, rank
        with_conv = {"concat", "add", "reuse", *BRANCHES}
        own = "linear" if kind == "channels_last" else "pointwise" if kind in with_conv else kind
        self.op = layer(own, rank, bias)
        self.bn = (
            layer("bn", rank, True) if kind in {"reuse", "concat", "add", "difference", "broadcast"} else nn.Identity()
        )
        self.other = layer("pointwise" if kind == "difference" else "none", rank, not bias)
        self.one, self.two = (norm(rank, 2) if kind in BRANCHES else nn.Identity() for _ in range(2))
        self.inner = nn.Sequential(*(Block(k, rank, b, []) for k, b in inner))
        if kind in {"product", "einsum"}:
            self.matrix = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in FREE | HARD:
            return (FREE | HARD)[self.kind](x)
        match self.kind:
            case "parts":
                first, second = self.op(x).chunk(2, 1)
                return torch.cat([self.one(first).relu_(), self.two(second)], 1)
            case "slices":
                y = self.op(x)
                return torch.cat([self.one(y[:, 1:3]), self.two(y[:, [0, 3]]), y[:, :0]], 1)
            case "halves":
                y = self.op(x)
                return torch.cat([self.one(y[:, :2] - y[:, 2:]), x[:, :2]], 1)
            case "joined":
                return torch.cat([self.one(x[:, :2].relu()), x[:, 2:].sigmoid()], 1)
            case "difference":
                return self.bn(self.op(self.inner(x)) - self.other(x))  # type: ignore[no-any-return]
            case "broadcast":
                return self.bn(self.op(x.mean(-1, keepdim=True)) + self.inner(x))  # type: ignore[no-any-return]
            case "relu":
                return x.relu()
            case "silu":
                return F.silu(x)
            case "max_pool":
                return {3: F.max_pool1d, 4: F.max_pool2d}[self.rank](x, 3, 1, 1)
            case "avg_pool":
                return {3: F.avg_pool1d, 4: F.avg_pool2d}[self.rank](x, 3, 1, 1, count_include_pad=False)
            case "dropout":
                return F.dropout(x, 0.5, self.training)
            case "scale":
                return -2 * x + 1
            case "inplace":
                y = x.clone()
                y[:, 1:3].mul_(0.5)
                return y.add_(0.1)
            case "double_permute":
                return x.transpose(1, -1).contiguous().transpose(1, -1)
            case "product":  # over the channels, or over the axis behind them
                return (x.movedim(1, -1) @ self.matrix).movedim(-1, 1) if self.rank == 3 else self.matrix @ x
            case "einsum":
                return torch.einsum(
                    "bcl,cd->bdl" if self.rank == 3 else "dc,bchw->bdhw",
                    *([x, self.matrix] if self.rank == 3 else [self.matrix, x]),
                )
            case "layer_norm":
                return self.op(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
            case "channels_last":
                return self.op(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
            case "concat":
                half = torch.cat([self.op(x)[:, :2], self.inner(x)[:, 2:]], 1)
                return self.bn(half)  # type: ignore[no-any-return]
            case "add":
                return self.bn(self.op(x) + self.inner(x))  # type: ignore[no-any-return]
            case "reuse":
                return self.bn(self.op(self.bn(self.op(x))))  # type: ignore[no-any-return]
            case _:
                return self.op(x)  # type: ignore[no-any-return]


class Head(nn.Module):
    """Flatten or mean, BatchNorm, linear."""

    def __init__(self, rank: int, flat: bool) -> None:
        super().__init__()
        features = CHANNELS * (4 ** (rank - 2) if flat else 1)
        self.flat, self.bn, self.fc = flat, nn.BatchNorm1d(features), nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x.flatten(1) if self.flat else x.flatten(2).mean(-1)))  # type: ignore[no-any-return]


@st.composite
def networks(
    draw: Any, kinds: list[str] = PLAIN + MORE + [*FREE, *HARD] + 3 * BRANCHES
) -> tuple[nn.Module, Tensor, Tensor]:
    """A random network in float64 with random statistics, and two batches of different size."""
    rank, bias = draw(st.sampled_from([3, 4])), st.booleans()
    steps = draw(st.lists(st.tuples(st.sampled_from(kinds), bias), min_size=2, max_size=7))
    inner = [draw(st.lists(st.tuples(st.sampled_from([*PLAIN, *FREE]), bias), max_size=2)) for _ in steps]
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    blocks = [Block(kind, rank, flag, below) for (kind, flag), below in zip(steps, inner, strict=True)]
    model = randomise(nn.Sequential(*blocks, Head(rank, draw(st.booleans()))), seed).double()
    return model, *(torch.randn(n, CHANNELS, *[4] * (rank - 2), dtype=torch.float64) for n in (2, 5))  # type: ignore[return-value]


def assert_kept(model: nn.Module, *batches: Tensor, **options: bool) -> None:
    """The folded model computes in float64 what the original does, on both batches, and the original is as it was."""
    before = [outputs(model, x) for x in batches]
    folded = bnctl.fold(model, batches[0], verify=False, **options).model
    for reference, x in zip(before, batches, strict=True):
        assert error(reference, outputs(folded, x)) < 1e-9
        assert error(reference, outputs(model, x)) == 0


@settings(SETTINGS, max_examples=50)
@given(networks())
def test_fold_keeps_the_function(drawn: tuple[nn.Module, Tensor, Tensor]) -> None:
    assert_kept(*drawn)


@settings(SETTINGS, max_examples=30)
@given(networks())
def test_every_option_keeps_the_function(drawn: tuple[nn.Module, Tensor, Tensor]) -> None:
    assert_kept(*drawn, merge_branches=True, pad_exact=True)


@SETTINGS
@given(
    st.lists(st.sampled_from([*FREE]), min_size=1, max_size=5),
    st.sampled_from([3, 4]),
    st.booleans(),
    st.integers(0, 99),
)
def test_what_the_algebra_can_move_is_gone(kinds: list[str], rank: int, ahead: bool, seed: int) -> None:
    torch.manual_seed(seed)
    between = [Block(kind, rank, True, []) for kind in kinds]
    conv, bn = layer("pointwise", rank, True), layer("bn", rank, True)
    steps = [nn.ReLU(), bn, *between, conv, nn.ReLU()] if ahead else [conv, *between, bn, nn.ReLU()]
    model = randomise(nn.Sequential(*steps), seed).double()
    batches = [torch.randn(n, CHANNELS, *[4] * (rank - 2), dtype=torch.float64) for n in (2, 5)]
    assert_kept(model, *batches)
    result = bnctl.fold(model, batches[0], verify=False)
    assert [s.action for s in result.report.sites] == ["folded"]


def unsorted(right: Any) -> Any:
    return lambda m, axis, at, size: right(m, axis, sorted(at), size)


def unpermuted(right: Any) -> Any:
    return lambda m, split, axes, merged: right(m, split, tuple(range(len(axes))), merged)


@pytest.mark.parametrize(
    ("method", "wrong", "kind"),
    [
        ("put", unsorted, "flip"),
        ("rearranged", unpermuted, "shuffle"),
        ("linear", lambda right: property(lambda m: m), "difference"),
        ("fixes", lambda right: lambda m, value: True, "zeros"),
    ],
)
def test_a_wrong_rule_is_caught(method: str, wrong: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same property fails where one rule of the algebra is wrong."""
    monkeypatch.setattr(AffineMap, method, wrong(getattr(AffineMap, method)))

    @settings(SETTINGS, max_examples=60, phases=[Phase.generate], report_multiple_bugs=False)
    @given(networks(["pointwise", "bn", kind, kind]))
    def property_of_networks(drawn: tuple[nn.Module, Tensor, Tensor]) -> None:
        assert_kept(*drawn)

    with pytest.raises(AssertionError):
        property_of_networks()


@SETTINGS
@given(networks())
def test_fold_again_finds_nothing_to_fold(drawn: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = drawn
    once = bnctl.fold(model, x, verify=False)
    again = bnctl.fold(once.model, x, verify=False)
    assert again.report.summary["folded"] == 0
    assert {s.name for s in again.report.sites} == {s.name for s in once.report.sites if s.action == "left"}


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(PLAIN[:7]), st.booleans()), min_size=1, max_size=4), st.integers(0, 99))
def test_conv_bn_of_one_reader_always_folds(kinds: list[tuple[str, bool]], seed: int) -> None:
    torch.manual_seed(seed)
    steps: list[nn.Module] = []
    for kind, bias in kinds:
        steps += [Block(kind, 4, bias, []), Block("bn", 4, bias, []), nn.ReLU()]
    model = randomise(nn.Sequential(*steps), seed).double()
    x = torch.randn(2, CHANNELS, 5, 5, dtype=torch.float64)
    result = bnctl.fold(model, x)
    assert result.report.summary == {"found": len(kinds), "folded": len(kinds), "left": 0}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())


@SETTINGS
@given(networks([k for k in PLAIN + MORE if k not in {"bn", "concat", "add", "reuse"}]))
def test_insert_then_fold_gives_the_original_back(drawn: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, *batches = drawn
    model[-1].bn = nn.Identity()
    inserted = bnctl.insert(model, batches)
    assert set(model.state_dict()) <= set(inserted.model.state_dict())
    names = {s.name for s in inserted.report.sites if s.action == "inserted"}
    back = bnctl.fold(inserted.model, batches[0], verify=False)
    assert {s.name for s in back.report.sites if s.action == "folded"} == {f"{n}.norm" for n in names}
    added = set(back.model.state_dict()) - set(model.state_dict())
    assert added <= {f"{n}.bias" for n in names}
    for name, value in back.model.state_dict().items():
        wanted = torch.zeros_like(value) if name in added else model.state_dict()[name]
        assert torch.allclose(value, wanted, atol=1e-9)
    for x in batches:
        assert error(outputs(model, x), outputs(inserted.model, x)) < 1e-9
        assert error(outputs(model, x), outputs(back.model, x)) < 1e-9


def test_the_comparison_catches_a_bias_that_is_off() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).double()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    folded = bnctl.fold(model, x).model
    folded[0].bias.data[0] += 1e-6
    assert error(outputs(model, x), outputs(folded, x)) > 1e-9
