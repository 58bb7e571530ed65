"""What one run on one example cannot show: numbers that Python computed from the input, and paths that the example did not take."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnctl
from bnctl.commands.equivalence import check_copy, check_equivalence
from bnctl.data.batches import Batch
from bnctl.errors import EquivalenceError, ModelError
from bnctl.models.model import Model
from bnctl.runtime.torch import TorchRunner
from bnctl.verification import compare_runners
from nets_traps import randomise


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.between = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), between
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.between(self.conv(x), x))


class Branching(nn.Module):
    def __init__(self, other: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), other
        self.bn.running_mean.normal_()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.other(x) else self.bn(y)


@pytest.mark.parametrize(
    "between",
    [
        lambda y, x: y * x.shape[-1] ** -0.5,
        lambda y, x: y + x.shape[-1] / 4,
        lambda y, x: y / math.log(x.shape[-1] + 1),
        lambda y, x: y / (1 + float(x.abs().max())),
    ],
)
def test_numbers_from_the_input_are_not_constants(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Net(between)
    result = bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert [site.code for site in result.report.sites] == ["BN116"]
    x = 3 * torch.randn(1, 3, 20, 12)
    assert torch.allclose(result.model(x), model(x))


@pytest.mark.parametrize("other", [lambda x: x.shape[-1] > 16, lambda x: bool(x.mean() > 1)])
def test_a_path_that_the_example_did_not_take_is_refused(other: Callable[[Tensor], bool]) -> None:
    with pytest.raises(EquivalenceError):
        bnctl.fold(Branching(other), torch.randn(2, 3, 8, 8))


def test_reading_values_is_said() -> None:
    result = bnctl.fold(Branching(lambda x: bool(x.mean() > 1e9)), torch.randn(2, 3, 8, 8))
    assert any("reads values" in note for note in result.report.notes)


def test_the_given_model_is_left_alone_and_so_is_the_result() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(lambda y, x: y)
            self.register_buffer("calls", torch.zeros(1))
            self.n = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.n += 1
            return super().forward(x)

    model = Counting()
    result = bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert (model.n, float(model.calls)) == (0, 0.0)
    assert (result.model.n, float(result.model.calls)) == (0, 0.0)


def test_the_sum_of_a_value_with_itself() -> None:
    result = bnctl.fold(Net(lambda y, x: y + y), torch.randn(2, 3, 8, 8))
    assert [site.code for site in result.report.sites] == ["BN101"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_does_not_stop_the_rest() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.jit.trace(nn.ReLU(), torch.zeros(1))).eval()
    assert bnctl.fold(model, torch.randn(2, 3, 8, 8)).report.summary["folded"] == 1


def test_agreement_that_drowns_in_rounding_is_no_proof() -> None:
    class Chaos(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e9 * x)

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    assert not bnctl.verify(Chaos(), Nothing(), [torch.randn(6, 4)]).passed


class Scaled(nn.Module):
    """A convolution, a gain, a norm."""

    def __init__(self, gain: float, before: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.conv, self.bn = before, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.gain = nn.Parameter(torch.full((4, 1, 1), gain))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x if self.before is None else self.before(x)) * self.gain)  # type: ignore[no-any-return]


def test_a_layer_that_is_meant_to_change_is_no_evidence() -> None:
    """The outputs are all zero, and so are the folded weights; the layers before them show that nothing else is."""
    model = Scaled(0.0, nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    result = bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert [site.action for site in result.report.sites] == ["folded", "folded"]
    assert "the layers before them agree" in str(result.report.verification and result.report.verification["note"])


def test_what_cannot_be_verified_is_not_called_wrong() -> None:
    with pytest.raises(EquivalenceError, match="cannot be verified: every output of the baseline is zero") as caught:
        bnctl.fold(Scaled(0.0), torch.randn(2, 3, 8, 8))
    assert "does it" not in str(caught.value)
    result = bnctl.fold(Scaled(0.5), torch.randn(2, 3, 8, 8))
    assert result.report.summary["left"] == 0


def test_a_layer_that_is_meant_to_stay_is_evidence() -> None:
    """Negative control: outputs of zero hide a fault, and the layers before them show it."""
    right = TorchRunner(Scaled(0.0, nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())))
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong._module.get_parameter("before.0.weight").mul_(1.01)
    found = compare_runners(right, wrong, [Batch(args=(torch.randn(2, 3, 8, 8),))], altered={"conv"})
    assert not found.passed
    assert found.first_difference is not None and found.first_difference.name.startswith("before")


class Hidden(nn.Module):
    """The factor of one layer is taken back by the next."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.last, self.factor = nn.Linear(4, 4), nn.Linear(4, 2), factor
        torch.manual_seed(0)
        nn.init.normal_(self.first.weight)
        nn.init.normal_(self.last.weight)
        with torch.no_grad():
            self.first.weight.mul_(factor)
            self.first.bias.zero_()
            self.last.bias.zero_()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)) / self.factor  # type: ignore[no-any-return]


def test_layers_are_looked_at_with_the_first_batch_of_one_sample() -> None:
    right, wrong = TorchRunner(Hidden(1.0)), TorchRunner(Hidden(2.0))
    two, one = (Batch(args=(torch.randn(size, 4),)) for size in (2, 1))
    assert compare_runners(right, wrong, [two], where_taken=[[one]]).passed
    assert compare_runners(right, wrong, [two], layers=["first"]).passed
    found = compare_runners(right, wrong, [two], where_taken=[[one]], layers=["first"])
    assert found.reason is not None and found.reason.startswith("layer first differs")
    assert compare_runners(right, right, [two], where_taken=[[one]], layers=["first"]).layers == 1


def test_layers_are_looked_at_even_where_other_values_are_out_of_range() -> None:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    model = nn.Sequential(*layers).eval()
    model.register_forward_pre_hook(lambda module, args: (torch.asin(args[0]),))
    result = bnctl.fold(model, torch.rand(2, 3, 8, 8) * 0.2 + 0.7)
    assert result.report.verification is not None
    assert result.report.verification["samples"] == 2 and result.report.verification["layers"] == 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_other_sizes_and_values_are_tried(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    model = Net(lambda y, x: y)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    x = torch.randn(size, 3, 8, 8)
    check_equivalence(Model("torch", model, "m"), Model("torch", model, "m"), Batch(args=(x,)))
    other = [given for given in seen if given.shape[1:] == x.shape[1:] and len(given) != size]
    assert {len(given) for given in other} == {2 if size == 1 else 1}
    assert len({round(float(given.sum()), 4) for given in other}) == 2
    assert any(given.shape[2] != x.shape[2] for given in seen)


class Packed(nn.Module):
    """A packed LSTM of one sample does not look at the size of its input, and reads what lies behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear, self.bn = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        last: Tensor = self.lstm(packed)[1][0][-1]
        return self.bn(self.linear(last))  # type: ignore[no-any-return]


def test_sizes_that_the_baseline_only_seems_to_take_are_no_fault() -> None:
    model = randomise(Packed())
    for _ in range(3):
        result = bnctl.fold(model, (torch.randn(8, 6, 4), torch.tensor([6, 5, 4, 3, 2, 1, 6, 6])))
        assert [site.action for site in result.report.sites] == ["folded"]


def test_a_fault_on_other_sizes_still_shows_where_there_is_no_float64() -> None:
    class Sized(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor, self.linear = factor, nn.Linear(4, 4)
            nn.init.eye_(self.linear.weight)

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return self.linear(x) * (self.factor if x.shape[1] != 5 else 1.0)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    baseline = Sized(1.0)
    candidate = copy.deepcopy(baseline)
    candidate.factor = 2.0
    one, other = Batch((torch.randn(2, 5, 4),)), Batch((torch.randn(2, 6, 4),))
    runners = TorchRunner(baseline), TorchRunner(candidate)
    assert compare_runners(*runners, [one]).passed
    assert not compare_runners(*runners, [one], where_taken=[[other]]).passed


def as_model(native: nn.Module) -> Model:
    return Model("torch", native.eval(), "the model")


@pytest.mark.parametrize("function", [torch.log, torch.asin])
def test_another_batch_size_is_tried_where_other_values_are_too_much(function: Callable[[Tensor], Tensor]) -> None:
    class Shaped(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.rows = nn.Linear(8, 4), rows

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(function(x)).reshape(self.rows, 4)  # type: ignore[no-any-return]

    example = Batch((torch.rand(2, 8) * 0.2 + 0.7,))
    assert check_equivalence(as_model(Shaped(-1)), as_model(Shaped(-1)), example).varied
    assert not check_equivalence(as_model(Shaped(-1)), as_model(Shaped(2)), example).passed


def test_a_complaint_of_types_in_float64_drops_no_fault() -> None:
    class Grid(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.factor = nn.Conv2d(3, 3, 1), factor
            self.register_buffer("grid", self.made(8))

        def made(self, size: int) -> Tensor:
            axis = torch.linspace(-1, 1, size)
            return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None]

        def forward(self, x: Tensor) -> Tensor:
            known = x.shape[-1] == 8 == x.shape[-2]
            if not known and x.shape[-1] != x.shape[-2]:
                raise ValueError("no square")
            grid = self.grid if known else self.made(x.shape[-1])
            y = F.grid_sample(self.conv(x), grid.expand(len(x), -1, -1, -1), align_corners=True)
            return y if known else y * self.factor

    example = Batch((torch.randn(2, 3, 8, 8),))
    assert check_equivalence(as_model(Grid(1.0)), as_model(Grid(1.0)), example).passed
    assert not check_equivalence(as_model(Grid(1.0)), as_model(Grid(2.0)), example).passed


class Fields(dict):  # type: ignore[type-arg]
    """As the inputs of language models often come: items are attributes, too."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def test_inputs_of_a_mapping_class_of_the_users_are_varied_as_such() -> None:
    class Reads(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.factor = nn.Linear(4, 4), factor

        def forward(self, fields: Fields) -> Tensor:
            y: Tensor = self.linear(fields.x)
            return y * self.factor if len(y) == 1 else y

    example = Batch((Fields(x=torch.randn(2, 4)),))
    assert check_equivalence(as_model(Reads(1.0)), as_model(Reads(1.0)), example).varied
    assert not check_equivalence(as_model(Reads(1.0)), as_model(Reads(2.0)), example).passed


def test_complex_inputs_are_varied_in_value() -> None:
    class Wave(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.factor = nn.Linear(8, 4), factor

        def forward(self, z: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.view_as_real(z).flatten(1))
            return y * (self.factor if float(z.real.mean()) > 1 else 1.0)

    example = Batch((torch.randn(2, 4, dtype=torch.complex64),))
    assert not check_equivalence(as_model(Wave(1.0)), as_model(Wave(2.0)), example).passed


def test_tensors_in_objects_of_other_classes_are_compared() -> None:
    class Distribution(nn.Module):
        def __init__(self, more: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.more = nn.Linear(4, 4), more

        def forward(self, x: Tensor) -> tuple[Tensor, torch.distributions.Normal]:
            y = self.linear(x)
            return y, torch.distributions.Normal(y + self.more, 1.0)

    example = Batch((torch.randn(2, 4),))
    assert check_equivalence(as_model(Distribution(0.0)), as_model(Distribution(0.0)), example).passed
    assert not check_equivalence(as_model(Distribution(0.0)), as_model(Distribution(5.0)), example).passed


def test_a_random_model_is_not_said_to_be_lost_in_a_copy() -> None:
    class Lost(nn.Module):
        def __init__(self, random: bool) -> None:
            super().__init__()
            self.linear, self.random, self.factor = nn.Linear(4, 4), random, 2.0

        def __deepcopy__(self, memo: object) -> nn.Module:
            twin = Lost(self.random)
            twin.load_state_dict(self.state_dict())
            twin.factor = 1.0
            return twin

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.factor + (torch.randn(4) if self.random else 0)  # type: ignore[no-any-return]

    example = Batch((torch.randn(2, 4),))
    with pytest.raises(ModelError, match="computes something else"):
        check_copy(as_model(Lost(random=False)), example, "cpu")
    check_copy(as_model(Lost(random=True)), example, "cpu")
