"""What one run cannot tell: numbers, paths and memory that other inputs change. The layer is left, with its reason; nothing else is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnctl
from bnctl.errors import DataError, EquivalenceError, ModelError
from nets_traps import error, outputs, randomise


class Code(nn.Module):
    """Layers for any code."""

    def __init__(self, code: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.p, self.q = (nn.Conv2d(4, 4, 1) for _ in range(2))
        self.bn, self.bn1 = nn.BatchNorm2d(4), nn.BatchNorm1d(4)
        self.head, self.last = nn.Linear(4, 3), nn.Linear(4, 4)
        self.code = code

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def functional(s: Any, x: Tensor) -> Tensor:
    """A functional BatchNorm in the code of the model."""
    return F.batch_norm(x, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias)


def hooked(s: Any, x: Tensor) -> Tensor:
    return functional(s, s.c(x)).relu()


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "pool of the whole width": (lambda s, x: s.head(F.avg_pool2d(functional(s, s.c(x)).relu(), x.size(3)).flatten(1)), "BN109"),
    "padding to a multiple": (lambda s, x: s.bn(F.pad(s.c(x), (0, -x.shape[-1] % 4, 0, -x.shape[-1] % 4))), "BN116"),
    "same padding ahead": (lambda s, x: s.p(F.pad(s.bn(x.sigmoid()), (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))), "BN103"),
    "a term for odd sizes": (lambda s, x: s.bn(s.c(x) + x.shape[-1] % 2), "BN116"),
    "a factor for odd sizes": (lambda s, x: functional(s, s.c(x)) * (1 + x.shape[-1] % 2), "BN109"),
    "another path for odd sizes": (lambda s, x: functional(s, s.c(x)).relu() if x.shape[-1] % 2 else functional(s, s.c(x)), "BN109"),
    "another path for large sizes": (lambda s, x: functional(s, s.c(x)).relu() if x.shape[-1] > 11 else functional(s, s.c(x)), "BN109"),
    "another path for one sample": (lambda s, x: functional(s, s.c(x)).relu() if len(x) == 1 else functional(s, s.c(x)), "BN109"),
    "a padding from the size": (lambda s, x: functional(s, F.conv2d(x, s.c.weight, padding=x.shape[-1] % 2 + 1)), "BN109"),
    "a slope from the size": (lambda s, x: F.leaky_relu(functional(s, s.c(x)), 1 / x.shape[-1]), "BN109"),
    "a value read by tolist": (lambda s, x: s.bn(s.c(x) + x.flatten().tolist()[0]), "BN116"),
    "a view behind a transpose": (lambda s, x: s.bn1(s.last(x.flatten(2).transpose(1, 2)).transpose(1, 2)).view(len(x), -1), "BN123"),
    "a view behind a crop": (lambda s, x: s.bn(s.c(x)[:, :, 1:-1, 1:-1]).relu_().view(len(x), 4, -1), "BN123"),
    "in place behind expand": (lambda s, x: s.bn(s.c(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, 8, 8)).relu_(), "BN123"),
    "in another method": (lambda s, x: s.norm(s.c(x)).relu(), "BN109"),
}  # fmt: skip


def checked(model: nn.Module, **options: bool) -> Any:
    """Fold with and without bnctl's own check, and compare on sizes of all kinds."""
    x = torch.randn(2, 4, 8, 8)
    result = bnctl.fold(model, x, verify=False, **options)
    bnctl.fold(model, x, **options)
    compared = 0
    for shape in ((2, 4, 8, 8), (1, 4, 8, 8), (3, 4, 12, 12), (1, 4, 9, 9), (1, 4, 7, 10)):
        other = torch.randn(*shape)
        try:
            reference = outputs(model, other, torch.float64)
        except RuntimeError:  # made for one size
            continue
        assert error([t.detach() for t in reference], [t.detach() for t in outputs(result.model, other)]) < 1e-5
        compared += 1
    assert compared > 1
    return result


@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_left(name: str) -> None:
    code, reason = CASES[name]
    result = checked(randomise(Code(code)))
    assert [s.code for s in result.report.sites] == [reason]


def test_the_same_code_without_the_trick_is_folded() -> None:
    """Negative control: it is the trick that keeps the layer."""
    for code in (
        lambda s, x: functional(s, s.c(x)).relu(),
        lambda s, x: s.bn(F.pad(s.c(x), (1, 1, 1, 1), "reflect")),
        lambda s, x: F.leaky_relu(functional(s, s.c(x)), 0.3),
        lambda s, x: s.bn(s.c(x)[:, :, 1:-1, 1:-1]).relu_().reshape(len(x), 4, -1),
    ):
        result = checked(randomise(Code(code)))
        assert [s.action for s in result.report.sites] == ["folded"]


@pytest.mark.parametrize("where", ["child", "entry"])
def test_hooks_that_change_something_are_not_done_twice(where: str) -> None:
    model = randomise(Code(hooked))
    if where == "child":
        model.c.register_forward_hook(lambda module, args, output: output.relu() - output.sigmoid())
    else:
        model.register_forward_pre_hook(lambda module, args: (args[0].sigmoid(),))
    assert [s.code for s in checked(model).report.sites] == ["BN109"]


def test_merging_what_two_merges_would_empty() -> None:
    def crossed(s: Any, x: Tensor) -> Tensor:
        z = x.relu()
        return (s.c(x) + s.d(z)) + (s.p(x) + s.q(z))  # type: ignore[no-any-return]

    result = checked(randomise(Code(crossed)), merge_branches=True)
    assert {s.name for s in result.report.sites} == {"p", "q"}
    checked(randomise(Code(lambda s, x: (lambda z: (s.c(x) + s.d(z)) + (s.p(x) + z))(x.relu()))), merge_branches=True)


@pytest.mark.parametrize("bias", [False, True])
def test_a_computed_weight_in_a_module_of_its_own(bias: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.g = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.ones(1) * 2)
            self.b = nn.Parameter(torch.randn(4)) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w * self.g, self.b)

    model = Code(lambda s, x: s.bn(s.c(x)).relu())
    model.c = Scaled()
    assert [s.action for s in checked(randomise(model)).report.sites] == ["folded"]
    shown = Code(lambda s, x: (s.bn(s.c(x)).relu(), s.c.g))
    shown.c = Scaled()
    assert [s.code for s in checked(randomise(shown)).report.sites] == ["BN108"]


def test_arguments_that_say_what_would_be_taken_anyway() -> None:
    class Optional(Code):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            y = functional(self, self.c(x))
            return y if mask is None else y * mask

    x = torch.randn(2, 4, 8, 8)
    model = bnctl.fold(randomise(Optional(hooked)), x).model
    torch.testing.assert_close(model(x, None), model(x, mask=None))
    with pytest.raises(TypeError, match="folded for calls with 1 tensor"):
        model(x, torch.ones(1))


# ---- inputs of other kinds than images in float


class Padded(nn.Module):
    """Pads to a multiple of 4 what a convolution with stride 4 takes; the example needs no padding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(50, 1)
        self.a, self.bn, self.b = nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "tokens":
            x = self.table(x)[..., 0]
        if self.kind == "bytes":
            x = x.flatten(1).float() / 255
        y = self.bn(self.a(x[:, None]).relu())
        return self.b(F.pad(y, (0, -y.shape[-1] % 4)))


@pytest.mark.parametrize(
    ("kind", "x"),
    [
        ("waves", torch.randn(2, 16)),
        ("tokens", torch.arange(32).reshape(2, 16)),
        ("bytes", torch.arange(32, dtype=torch.uint8).reshape(2, 1, 16)),
    ],
)
def test_a_padding_of_nothing_is_no_identity(kind: str, x: Tensor) -> None:
    model = Padded(kind)
    randomise(model)
    site = bnctl.fold(model, x).report.to_dict()["sites"][0]
    assert (site["action"], site["code"]) == ("left", "BN103")


class Steered(nn.Module):
    """What it does hangs on a second input."""

    def __init__(self, code: Callable[[Any, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.c, self.bn, self.code = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), code
        randomise(self)

    def forward(self, x: Tensor, k: Any) -> Tensor:
        return self.code(self, x, k)


IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("code", [lambda s, x, k: s.bn(s.c(x) * k), lambda s, x, k: s.bn(s.c(x) + k)])
@pytest.mark.parametrize("k", [0.5, 2, 0.0])
def test_a_number_that_the_model_is_given_is_no_constant(code: Any, k: float) -> None:
    site = bnctl.fold(Steered(code), (IMAGES, k)).report.to_dict()["sites"][0]
    assert (site["action"], site["code"]) == ("left", "BN116")


@pytest.mark.parametrize(
    ("code", "k"),
    [
        (lambda s, x, k: s.bn(torch.roll(s.c(x), k, 1)), 1),
        (lambda s, x, k: s.bn(torch.roll(s.c(x), int(k), 1)), torch.tensor(1)),
        (lambda s, x, k: s.bn(s.c(x)) if k else s.c(x).relu(), True),
        (lambda s, x, k: s.bn(s.c(x)) if k else s.c(x).relu(), torch.tensor(True)),
        (lambda s, x, k: s.bn(s.c(x)) if k == 0 else s.c(x).relu(), 0),
    ],
)
def test_a_fold_that_holds_for_one_choice_only_is_refused(code: Any, k: Any) -> None:
    with pytest.raises(EquivalenceError, match=r"differs on inputs varied from the given ones.*fold of bn") as caught:
        bnctl.fold(Steered(code), (IMAGES, k))
    assert "--skip 'bn'" in str(caught.value.hint)
    result = bnctl.fold(Steered(lambda s, x, k: s.bn(s.c(x))), (IMAGES, k))  # the choice does not matter
    assert result.report.to_dict()["sites"][0]["action"] == "folded"


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.max().item(),
        lambda x: x.numpy().max(),
        lambda x: max(x.flatten().tolist()),
        lambda x: np.asarray(x).max(),
    ],
)
def test_a_path_that_hangs_on_values_is_told_of(read: Callable[[Tensor], float]) -> None:
    model = Steered(lambda s, x, k: s.bn(s.c(x)) if read(x) < 1000 else s.c(x))
    assert any("reads values of tensors" in note for note in bnctl.fold(model, (IMAGES, None)).report.notes)
    assert "numpy" not in vars(Tensor)


def test_a_value_that_python_reads_stays() -> None:
    """By itself the convolution's output could change; but it is read."""
    seen: list[float] = []
    model = Steered(lambda s, x, k: (seen.append(float(np.sum(y.numpy()))), s.bn(y))[1] if (y := s.c(x)) is not None else x)  # fmt: skip
    site = bnctl.fold(model, (IMAGES, None)).report.to_dict()["sites"][0]
    assert (site["action"], site["code"]) == ("left", "BN101")


def test_what_comes_from_outside_of_torch_is_no_input_of_the_model() -> None:
    model = Steered(lambda s, x, k: s.bn(torch.from_numpy(s.c(x).numpy() * 2)))
    site = bnctl.fold(model, (IMAGES, None)).report.to_dict()["sites"][0]
    assert site["code"] == "BN104"
    assert "comes from code that is no operator" in site["reason"]


# ---- what a review broke


class Depending(nn.Module):
    """The second input is as long as the first after a convolution: neither can grow alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.d = nn.BatchNorm1d(3), nn.Conv1d(3, 3, 3)
        randomise(self)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        y = self.d(F.pad(self.bn(x), (0, -x.shape[-1] % 4)))
        return y.sum(-1, keepdim=True) + before + x[..., 2:]


class Last(nn.Module):
    """Takes many inputs, and pads the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.d = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)
        randomise(self)

    def forward(self, *images: Tensor) -> Tensor:
        x = images[-1]
        y = self.d(F.pad(self.bn(x), (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4)))
        return y + sum(image.mean() for image in images)


@pytest.mark.parametrize(
    ("model", "shapes", "others"),
    [
        (Depending(), [(2, 3, 20), (2, 3, 18)], [(2, 3, 25), (2, 3, 23)]),
        (
            Last(),
            [(2, 3, 21, 22), (2, 3, 23, 25), (2, 3, 26, 27), (2, 3, 16, 12)],
            [(2, 3, 9, 9)] * 3 + [(2, 3, 19, 17)],
        ),
    ],
)
def test_sizes_that_hang_together_and_many_sizes(model: nn.Module, shapes: Any, others: Any) -> None:
    result = bnctl.fold(model, tuple(torch.randn(shape) for shape in shapes))
    given = tuple(torch.randn(shape) for shape in others)
    assert error([model(*given).detach()], [result.model(*given).detach()]) < 1e-5


@dataclass
class Config:
    scale: float


@pytest.mark.parametrize(
    ("code", "given"),
    [
        (lambda s, x, *k: s.bn(s.c(x) * k[6]) + sum(k), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 2.0)),
        (lambda s, x, k: s.bn(s.c(x) * k.scale), (Config(2.0),)),
        (lambda s, x, k: s.bn(s.c(x) * k.real), (2 + 1j,)),
        (lambda s, x, k: s.bn(s.c(x) * (k // 2)), (3,)),
        (lambda s, x, k: s.bn(s.c(x) * max(k, 4)), (3,)),
        (lambda s, x, k: s.bn(s.c(x) * min(k, 1.0)), (2.0,)),
        (lambda s, x, k: s.bn(s.c(x) * int(k)), (np.int64(2),)),
    ],
)
def test_numbers_in_any_form_and_number(code: Any, given: tuple[Any, ...]) -> None:
    class Given(Steered):
        def forward(self, x: Tensor, *k: Any) -> Tensor:  # type: ignore[override]
            return self.code(self, x, *k)

    site = bnctl.fold(Given(code), (IMAGES, *given)).report.to_dict()["sites"][0]
    assert (site["action"], site["code"]) == ("left", "BN116")


def test_an_empty_input_in_front_is_named() -> None:
    model = Steered(lambda s, x, k: s.bn(s.c(k)))
    for empty in ([], torch.zeros(0, 4)):
        with pytest.raises(DataError, match="counted by the first input that has a length"):
            bnctl.fold(model, (empty, IMAGES))
    assert bnctl.fold(Steered(lambda s, x, k: s.bn(s.c(x))), (IMAGES, [])).report.summary["folded"] == 1


def test_the_check_draws_no_random_numbers_of_the_process() -> None:
    model = Steered(lambda s, x, k: F.dropout(s.bn(s.c(x)), 0.5, k))
    state = torch.get_rng_state()
    bnctl.fold(model, (IMAGES, False))
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_that_are_written_through_views() -> None:
    for write in (lambda w: w[0].mul_(0.9), lambda w: w.data.mul_(0.9)):
        model = Steered(lambda s, x, k, write=write: (write(s.c.weight), s.bn(s.c(x)))[1])
        before = model.c.weight.clone()
        with pytest.raises(ModelError, match=r"writes into its parameter c\.weight"):
            bnctl.fold(model, (IMAGES, None))
        assert torch.equal(model.c.weight, before)


def test_tables_that_shorten_their_rows_are_no_counters() -> None:
    table, bn = nn.Embedding(7, 4, max_norm=1.0), nn.BatchNorm1d(4)
    net = Steered(lambda s, t, k: bn(table(t).transpose(1, 2)))
    net.table, net.norm = table, bn
    assert bnctl.fold(net, (torch.arange(14).reshape(2, 7) % 7, None)).report.summary["found"] == 1


LONG: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "a grid that grows": (lambda s, x: F.adaptive_avg_pool2d(functional(s, s.c(x)), max(4, x.shape[-1] // 32)), 128),
    "a grid that shrinks": (lambda s, x: F.adaptive_avg_pool2d(functional(s, s.c(x)), min(4, x.shape[-1] // 32)), 128),
    "a scale that grows": (lambda s, x: s.d(s.bn(s.c(x)) * max(1.0, math.log(x.shape[-1]) / math.log(128))), 128),
    "no shorter than that": (lambda s, x: F.adaptive_avg_pool2d(functional(s, F.conv2d(s.c(x), s.d.weight, dilation=50)), x.shape[-1] // 4), 128),
    "no longer than that": (lambda s, x: F.adaptive_avg_pool2d(functional(s, s.c(x)) + torch.zeros(140)[: x.shape[-1]], x.shape[-1] // 32), 140),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_long_axes_vary_in_both_directions(name: str) -> None:
    code, size = LONG[name]
    model = randomise(Code(code))
    folded = bnctl.fold(model, torch.randn(1, 4, size, size)).model
    for other in (size - 36, size, size + 40, size + 130):
        x = torch.randn(2, 4, other, other)
        with torch.no_grad():
            try:
                expected = model(x)
            except RuntimeError:
                assert "than that" in name
                assert other != size
                continue
            assert error([expected], [folded(x)]) < 1e-4
