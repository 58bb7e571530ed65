"""The rules of the fold algebra on torch models: what an affine passes, in both directions, and what it must not pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnctl
from bnctl.graph.affine import AffineMap
from nets_traps import Net, _fast, error, outputs, randomise  # noqa: F401

Forward = Callable[..., Any]
X = (4, 6, 6)
"""Sizes of a sample; the batch is 2 in the capture, and 1 and 3 in the comparison."""


def fold_of(model: nn.Module, shape: tuple[int, ...] = X) -> dict[str, str | None]:
    """Fold, compare with the original in float64 on other batch sizes, and say what became of each site."""
    randomise(model).double()
    batches = [torch.randn(n, *shape, dtype=torch.float64) for n in (2, 1, 3)]
    references = [outputs(model, x) for x in batches]
    result = bnctl.fold(model, batches[0], verify=False)
    for reference, x in zip(references, batches, strict=True):
        assert error(reference, outputs(result.model, x)) < 1e-10
    return {s.name: s.code for s in result.report.sites}


def bn(channels: int, rank: int = 4) -> nn.Module:
    return {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank](channels)


class Positive(nn.Module):
    """A factor per channel, all of them positive."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(features, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


PASS_BACK: dict[str, tuple[Forward, int, int]] = {
    # name: (operator on (N, 8, 6, 6), channels and rank behind it)
    "chunk": (lambda x: x.chunk(2, 1)[0], 4, 4),
    "chunk_of_which_both_live": (lambda x: torch.cat([*x.chunk(2, 1)], 1), 8, 4),
    "tensor_split": (lambda x: x.tensor_split(3, 1)[1], 3, 4),
    "tensor_split_at": (lambda x: x.tensor_split((1, 2), dim=1)[2], 6, 4),
    "hsplit": (lambda x: x.hsplit(2)[1], 4, 4),
    "split_with_sizes": (lambda x: x.split([3, 5], 1)[1], 5, 4),
    "unbind": (lambda x: x.reshape(-1, 2, 4, 6, 6).unbind(1)[1], 4, 4),
    "select": (lambda x: x.reshape(-1, 2, 4, 6, 6)[:, 1], 4, 4),
    "select_negative": (lambda x: x[:, :, -1], 8, 3),
    "narrow": (lambda x: x.narrow(1, 2, 4), 4, 4),
    "slice": (lambda x: x[:, 1:-2], 5, 4),
    "every_second": (lambda x: x[:, ::2], 4, 4),
    "two_axes": (lambda x: x[:, 2:, 1:, ::2], 6, 4),
    "flip": (lambda x: x.flip(1), 8, 4),
    "roll": (lambda x: x.roll((1, 2), (1, 3)), 8, 4),
    "reflect": (lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"), 8, 4),
    "replicate": (lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate"), 8, 4),
    "circular": (lambda x: F.pad(x, (1, 2, 3, 1), mode="circular"), 8, 4),
    "crop": (lambda x: F.pad(x, (-1, 0, 0, -2)), 8, 4),
    "channel_crop": (lambda x: F.pad(x, (0, 0, 0, 0, -1, -2)), 5, 4),
    "expand": (lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 5), 8, 4),
    "repeat_over_space": (lambda x: x.repeat(1, 1, 2, 1), 8, 4),
    "tile": (lambda x: x.tile(2), 8, 4),
    "interleave_over_space": (lambda x: x.repeat_interleave(2, 2), 8, 4),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), 8, 4),
    "channel_shuffle_by_hand": (lambda x: x.reshape(-1, 4, 2, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6), 8, 4),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), 2, 4),
    "unshuffle_and_shuffle": (lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), 8, 4),
    "movedims": (lambda x: x.movedim((1, 2), (3, 1)).movedim((3, 1), (1, 2)), 8, 4),
    "mean_of_all": (lambda x: x.mean(dim=(-1, 2)), 8, 2),
    "nearest_exact": (lambda x: F.interpolate(x, size=9, mode="nearest-exact"), 8, 4),
    "bicubic": (lambda x: F.interpolate(x, size=9, mode="bicubic"), 8, 4),
    "antialias": (lambda x: F.interpolate(x, size=3, mode="bilinear", antialias=True), 8, 4),
    "area": (lambda x: F.interpolate(x, size=4, mode="area"), 8, 4),
    "trilinear": (lambda x: F.interpolate(x[:, :, None], scale_factor=2, mode="trilinear"), 8, 5),
    "ceil_average": (lambda x: F.avg_pool2d(x, 4, 3, 1, ceil_mode=True, count_include_pad=False), 8, 4),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, 2), 8, 4),
    "python_sum": (lambda x: sum(x.split(2, 1)), 2, 4),
    "stack_and_unbind": (lambda x: torch.stack([*x.unbind(1)], 1), 8, 4),
    "stack": (lambda x: torch.stack([x[:, :4], x[:, 4:]], 2).flatten(2, 3), 4, 4),
    "hstack": (lambda x: torch.hstack([x[:, 4:], x[:, :4]]), 8, 4),
}


@pytest.mark.parametrize("name", PASS_BACK)
def test_backwards(name: str) -> None:
    op, channels, rank = PASS_BACK[name]
    model = Net(lambda s, x: s.bn(op(s.conv(x))).relu(), conv=nn.Conv2d(4, 8, 1), bn=bn(channels, rank))
    assert fold_of(model) == {"bn": None}


PASS_AHEAD: dict[str, tuple[Forward, int]] = {
    # name: (operator on (N, 4, 6, 6), channels behind it)
    "split": (lambda x: x.split([1, 3], 1)[1], 3),
    "flip": (lambda x: x.flip(1), 4),
    "every_second": (lambda x: x[:, ::2], 2),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 8),
    "interleave": (lambda x: x.repeat_interleave(2, 1), 8),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 4),
    "crop": (lambda x: F.pad(x, (-1, -1)), 4),
    "unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 16),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), 4),
    "bicubic": (lambda x: F.interpolate(x, size=9, mode="bicubic"), 4),
    "concat": (lambda x: torch.cat([x, x.new_ones(x.shape[0], 2, 6, 6)], 1), 6),
    "channel_pad": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), 7),
    "stack": (lambda x: torch.stack([x, x.new_ones(x.shape)], 1).flatten(1, 2), 8),
}


@pytest.mark.parametrize("name", PASS_AHEAD)
def test_ahead(name: str) -> None:
    op, channels = PASS_AHEAD[name]
    assert fold_of(Net(lambda s, x: s.conv(op(s.bn(x.relu()))), bn=bn(4), conv=nn.Conv2d(channels, 5, 3))) == {
        "bn": None
    }


STAY: dict[str, tuple[Forward, int, int, str]] = {
    "pixel_unshuffle_varies_over_space": (lambda x: F.pixel_unshuffle(x, 2), 32, 4, "BN110"),
    "repeated_channels": (lambda x: x.repeat(1, 2, 1, 1), 16, 4, "BN110"),
    "elements_taken_twice": (lambda x: x[:, :5] + x[:, 3:], 5, 4, "BN101"),
    "zero_padding": (lambda x: F.pad(x, (1, 1)), 8, 4, "BN114"),
    "counted_padding": (lambda x: F.avg_pool2d(x, 3, 1, 1), 8, 4, "BN114"),
    "other_divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), 8, 4, "BN114"),
    "sum_over_space": (lambda x: x.sum((2, 3)), 8, 2, "BN116"),
    "maximum": (lambda x: x.amax((2, 3)), 8, 2, "BN113"),
    "minimum": (lambda x: x.min(-1)[0], 8, 3, "BN113"),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), 8, 4, "BN103"),
    "grid_outside": (
        lambda x: F.grid_sample(x, x.mean(1, keepdim=True).expand(-1, 2, -1, -1).movedim(1, -1), align_corners=False),
        8,
        4,
        "BN114",
    ),
    "broadcast_branch": (lambda x: x[:, :1] + x[:, 1:], 7, 4, "BN110"),
    "gate": (lambda x: x[:, :4] * x[:, 4:], 4, 4, "BN103"),
    "tensor_index_of_python": (lambda x: x[:, torch.tensor([1, 0])], 2, 4, "BN116"),
    "cat_with_zeros": (lambda x: torch.cat([x, x.new_zeros(x.shape)], 1), 16, 4, "BN116"),
    "half_of_a_view_that_is_written": (lambda x: torch.add(_written(x), 0), 8, 4, "BN117"),
}


def _written(x: Tensor) -> Tensor:
    x[:, :4].relu_()
    return x


@pytest.mark.parametrize("name", STAY)
def test_it_stays(name: str) -> None:
    op, channels, rank, code = STAY[name]
    found = fold_of(Net(lambda s, x: s.bn(op(s.conv(x))).relu(), conv=nn.Conv2d(4, 8, 1), bn=bn(channels, rank)))
    assert found == {"bn": code}


def test_slices_that_do_not_overlap_fold_each_into_its_channels() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        return torch.cat([s.a(y[:, :3]).relu(), s.b(y[:, 3:5]).sigmoid(), y[:, 5:]], 1)

    assert fold_of(Net(forward, conv=nn.Conv2d(4, 8, 3), a=bn(3), b=bn(2))) == {"a": None, "b": None}


def test_parts_of_one_split_fold_each_into_its_channels_and_share_a_layer() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        a, b, c = s.conv(x).split([3, 3, 2], 1)
        return torch.cat([s.bn(a).relu(), s.bn(b).sigmoid(), c.tanh()], 1)

    assert fold_of(Net(forward, conv=nn.Conv2d(4, 8, 3), bn=bn(3))) == {"bn": None}


def test_overlapping_slices_stay() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        return torch.cat([s.a(y[:, :5]), y[:, 4:]], 1)

    assert fold_of(Net(forward, conv=nn.Conv2d(4, 8, 3), a=bn(5))) == {"a": "BN101"}


def test_both_halves_of_one_value_in_a_sum() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        return s.bn(y[:, :4] - y[:, 4:]).relu()

    assert fold_of(Net(forward, conv=nn.Conv2d(4, 8, 3), bn=bn(4))) == {"bn": None}


def test_an_in_place_activation_behind_a_slice() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        a, b = s.conv(x).chunk(2, 1)
        return torch.cat([s.bn(a).relu_(), b], 1)

    assert fold_of(Net(forward, conv=nn.Conv2d(4, 8, 3), bn=bn(4))) == {"bn": None}


def ones_first(features: int, ones: int) -> nn.Module:
    """A factor per channel that changes nothing in the first ones."""
    scale = Positive(features)
    scale.scale[:ones] = 1  # type: ignore[index]
    return scale


def test_an_in_place_write_is_minded_where_the_affine_changes_nothing() -> None:
    """Taken out, the layer would hand over memory that others read, and the write would reach them."""

    def ahead(s: Any, x: Tensor) -> Tensor:
        y = x.sigmoid()
        first, second = s.scale(y).chunk(2, 1)
        return s.conv(torch.cat([first.neg_(), second], 1)) + y

    assert fold_of(Net(ahead, scale=ones_first(4, 2), conv=nn.Conv2d(4, 4, 1))) == {}

    def back(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        return torch.cat([s.scale(y[:, :3]).neg_(), y[:, :2]], 1)

    assert fold_of(Net(back, scale=ones_first(3, 2), conv=nn.Conv2d(4, 4, 1))) == {}


def test_a_part_that_the_affine_leaves_alone_needs_no_absorber() -> None:
    def ahead(s: Any, x: Tensor) -> Tensor:
        first, second = torch.cat([x.sigmoid(), s.bn(x.relu())], 1).chunk(2, 1)
        return first.tanh() + s.conv(second)

    assert fold_of(Net(ahead, bn=bn(4), conv=nn.Conv2d(4, 4, 1))) == {"bn": None}

    def back(s: Any, x: Tensor) -> Tensor:
        return s.bn(torch.cat([s.conv(x), x.relu()], 1)[:, :4]).tanh()

    assert fold_of(Net(back, bn=bn(4), conv=nn.Conv2d(4, 4, 1))) == {"bn": None}


# Sums: who takes the shift


class NoBias(nn.Module):
    """A product with a parameter, behind which no bias can be put."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1) @ self.weight).movedim(-1, 1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_branch_that_has_room_takes_the_shift(first: bool, sign: int) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        one, two = (s.plain, s.conv) if first else (s.conv, s.plain)
        return s.bn(one(x) + two(x) if sign == 1 else one(x) - two(x)).relu()

    assert fold_of(Net(forward, plain=NoBias(), conv=nn.Conv2d(4, 4, 1), bn=bn(4))) == {"bn": None}


def test_no_branch_has_room() -> None:
    model = Net(lambda s, x: s.bn(s.a(x) + s.b(x)), a=NoBias(), b=NoBias(), bn=bn(4))
    assert fold_of(model) == {"bn": "BN118"}


def test_a_branch_that_is_broadcast_over_space() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn(s.gate(x.mean((2, 3), keepdim=True)) + s.conv(x)).relu()

    assert fold_of(Net(forward, gate=nn.Conv2d(4, 4, 1), conv=nn.Conv2d(4, 4, 3, padding=1), bn=bn(4))) == {"bn": None}


def test_nested_sums() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn((s.a(x) + s.b(x)) - (s.c(x) + s.d(x))).relu()

    assert fold_of(Net(forward, a=NoBias(), b=NoBias(), c=NoBias(), d=nn.Conv2d(4, 4, 1), bn=bn(4))) == {"bn": None}


class Shift(nn.Module):
    """A bias per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def test_a_shift_needs_one_branch_only() -> None:
    model = Net(lambda s, x: s.shift(x.relu() + s.conv(x)).relu(), conv=nn.Conv2d(4, 4, 1), shift=Shift())
    assert fold_of(model) == {"shift": None}


def test_a_shift_passes_a_sum_ahead() -> None:
    model = Net(lambda s, x: s.conv(x.sigmoid() - s.shift(x.relu())), conv=nn.Conv2d(4, 4, 1), shift=Shift())
    assert fold_of(model) == {"shift": None}


def test_a_scale_does_not_pass_a_sum_ahead() -> None:
    model = Net(lambda s, x: s.conv(x.sigmoid() + s.bn(x.relu())), conv=nn.Conv2d(4, 4, 1), bn=bn(4))
    assert fold_of(model) == {"bn": "BN103"}


# Products, reductions, windows and padding: where only scales pass


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.sum((2, 3), keepdim=True),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: x.amax((2, 3), keepdim=True),
        lambda x: x.min(2, keepdim=True).values,
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.adaptive_max_pool2d(x, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ahead", [True, False])
def test_positive_scales_without_shift(op: Forward, ahead: bool) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.conv(op(s.scale(x.sigmoid()))) if ahead else s.scale(op(s.conv(x))).relu()

    assert fold_of(Net(forward, scale=Positive(4), conv=nn.Conv2d(4, 4, 1))) == {"scale": None}


@pytest.mark.parametrize("first", [True, False])
def test_a_gate_takes_no_scale_and_the_value_does(first: bool) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        gate, value = s.squeeze(x.mean((2, 3), keepdim=True)).sigmoid(), s.conv(x)
        return s.bn(gate * value if first else value * gate).relu()

    layers = {"squeeze": nn.Conv2d(4, 4, 1), "conv": nn.Conv2d(4, 4, 1), "bn": Positive(4)}
    assert fold_of(Net(forward, **layers)) == {"bn": None}


def test_a_scale_passes_a_gate_ahead() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.conv(s.bn(x.relu()) * x.mean((1, 2, 3), keepdim=True))

    assert fold_of(Net(forward, conv=nn.Conv2d(4, 4, 1), bn=Positive(4))) == {"bn": None}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_of_convolutions(mode: str) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    assert fold_of(Net(lambda s, x: s.after(s.conv(s.before(x.relu()))), before=bn(4), conv=conv, after=bn(4))) == {
        "before": None,
        "after": None,
    }


@pytest.mark.parametrize("mode", ["border", "reflection"])
def test_grid_sample_that_stays_inside(mode: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        grid = s.where(x).movedim(1, -1)
        return s.bn(F.grid_sample(s.conv(x), grid, padding_mode=mode, align_corners=True)).relu()

    assert fold_of(Net(forward, where=nn.Conv2d(4, 2, 1), conv=nn.Conv2d(4, 4, 1), bn=bn(4))) == {"bn": None}


def test_what_steers_an_operator_is_no_data() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return F.grid_sample(x, s.bn(x[:, :2].relu()).movedim(1, -1), padding_mode="border", align_corners=True)

    assert fold_of(Net(forward, bn=bn(2))) == {"bn": "BN103"}


def test_constant_parts_of_a_concat() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.token.expand(x.shape[0], 2, 6, 6), x], 1)

    ahead = Net(lambda s, x: s.conv(s.cat(s.bn(x.relu()))), bn=bn(4), cat=Token(), conv=nn.Conv2d(6, 4, 3))
    assert fold_of(ahead) == {"bn": None}
    back = Net(lambda s, x: s.bn(s.cat(s.conv(x))).relu(), bn=bn(6), cat=Token(), conv=nn.Conv2d(4, 4, 1))
    assert fold_of(back) == {"bn": "BN114"}


def test_an_index_that_is_a_buffer() -> None:
    class Reorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.tensor([3, 0, -2]))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.order] + x.index_select(1, torch.remainder(self.order, 4))

    back = Net(lambda s, x: s.bn(s.pick(s.conv(x))).relu(), conv=nn.Conv2d(4, 4, 1), pick=Reorder(), bn=bn(3))
    assert fold_of(back) == {"bn": "BN101"}
    ahead = Net(
        lambda s, x: s.conv(s.pick.order.new_zeros(()) + s.bn(x.relu())[:, s.pick.order]),
        pick=Reorder(),
        bn=bn(4),
        conv=nn.Conv2d(3, 4, 1),
    )
    assert fold_of(ahead)["bn"] is None


def test_the_comparison_catches_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: channels that come back in the wrong order, and a shift that is taken twice."""
    model = Net(lambda s, x: s.bn(s.conv(x).flip(1)).relu(), conv=nn.Conv2d(4, 4, 1), bn=bn(4))
    right = AffineMap.put
    with monkeypatch.context() as patch:
        patch.setattr(AffineMap, "put", lambda m, axis, positions, size: right(m, axis, range(size), size))
        with pytest.raises(AssertionError):
            fold_of(model)
    both = Net(lambda s, x: s.bn(s.a(x) + s.b(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), bn=bn(4))
    with monkeypatch.context() as patch:
        patch.setattr(AffineMap, "linear", property(lambda m: m))
        with pytest.raises(AssertionError):
            fold_of(both)


@pytest.mark.parametrize("norm_of_all", [True, False])
def test_a_value_of_which_an_output_is_a_part(norm_of_all: bool) -> None:
    """The parts are views: what they are parts of lives as long as they do, and nobody has kept it."""

    def run(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = s.conv(x)
        first, second = y.chunk(2, 1)
        return s.bn(y if norm_of_all else first).relu(), second

    net = Net(run, conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8 if norm_of_all else 4))
    (site,) = bnctl.fold(net.eval(), torch.randn(2, 3, 8, 8)).report.sites
    assert (site.name, site.code) == ("bn", "BN102")
    assert "is a view of it" in str(site.reason)


@pytest.mark.parametrize("padding", [None, 0])
def test_an_embedding_takes_scale_and_shift_into_its_rows(padding: int | None) -> None:
    table = nn.Embedding(7, 4, padding_idx=padding)
    net = Net(lambda s, t: s.bn(s.table(t).transpose(1, 2)), table=table, bn=nn.BatchNorm1d(4))
    randomise(net)
    tokens = torch.arange(14).reshape(2, 7) % 7
    result = bnctl.fold(net, tokens)
    assert [(s.name, s.into) for s in result.report.sites] == [("bn", ("table",))]
    assert error(outputs(net, tokens), outputs(result.model, tokens)) < 1e-5
    other = Net(lambda s, t: (s.bn(s.table(t).transpose(1, 2)), s.table.weight.sum()), table=table, bn=net.bn)
    assert [s.code for s in bnctl.fold(other.eval(), tokens).report.sites] == ["BN106"]


class InstanceOrBatch(nn.Module):
    """A norm that takes its statistics from the input, and a BatchNorm behind it."""

    def __init__(self, norm: nn.Module, *, last: bool = False) -> None:
        super().__init__()
        self.norm, self.last, self.bn = norm, last, nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.exp()
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1) if self.last else self.norm(x)
        return self.bn(x).relu()


@pytest.mark.parametrize(
    ("norm", "last"),
    [
        (lambda: nn.GroupNorm(2, 4), False),
        (lambda: nn.InstanceNorm2d(4, affine=True), False),
        (lambda: nn.LayerNorm(4), True),
    ],
)
def test_a_norm_that_stays_takes_a_batch_norm_in(norm: Callable[[], nn.Module], last: bool) -> None:
    model = InstanceOrBatch(norm(), last=last)
    assert fold_of(model, (4, 5, 6))["bn"] is None


@pytest.mark.parametrize(
    ("norm", "last"),
    [
        (lambda: nn.GroupNorm(2, 4, affine=False), False),
        (lambda: nn.LayerNorm(4, bias=False), True),
        (lambda: nn.LayerNorm((5, 6, 4)), True),
        (lambda: nn.LayerNorm((5, 6)), False),
    ],
)
def test_a_norm_without_a_place_for_scale_and_shift_takes_nothing_in(norm: Callable[[], nn.Module], last: bool) -> None:
    model = InstanceOrBatch(norm(), last=last)
    assert fold_of(model, (4, 5, 6))["bn"] == "BN103"


@pytest.mark.parametrize("larger", [torch.maximum, torch.minimum, torch.max, torch.min])
@pytest.mark.parametrize("positive", [True, False])
def test_the_larger_of_two_takes_positive_scales(larger: Forward, positive: bool) -> None:
    norm = bn(4)
    model = Net(lambda s, x: s.n(larger(s.a(x), s.b(x))), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3), n=norm)
    randomise(model)
    with torch.no_grad():
        norm.weight.copy_(norm.weight.abs() if positive else -1 - norm.weight.abs())
    model.double()
    batches = [torch.randn(n, *X, dtype=torch.float64) for n in (2, 1)]
    result = bnctl.fold(model, batches[0], verify=False)
    assert [s.code for s in result.report.sites] == [None if positive else "BN113"]
    for x in batches:
        assert error(outputs(model, x), outputs(result.model, x)) < 1e-10


def test_the_larger_of_a_value_and_a_constant_stays() -> None:
    floor = nn.Parameter(torch.zeros(4, 1, 1))
    model = Net(lambda s, x: s.n(torch.maximum(s.a(x), s.floor)), a=nn.Conv2d(4, 4, 3), n=bn(4), floor=floor)
    assert fold_of(model) == {"n": "BN116"}
