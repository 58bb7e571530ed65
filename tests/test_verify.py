"""Comparisons: what must pass, and above all what must not."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from torch import nn

from bnctl.data.batches import Batch
from bnctl.data.resize import other_batch_sizes, other_choices, other_integers, other_shapes, other_values
from bnctl.errors import ModelError, UsageError
from bnctl.numerics.compare import compare, count_flips, rms, tolerance
from bnctl.runtime.torch import TorchRunner
from bnctl.runtime.trace import Trace
from bnctl.verification import compare_runners

NAN, INF = math.nan, math.inf


def array(*values: float, dtype: str = "float32") -> NDArray[Any]:
    return np.array(values, dtype)


class TestCompare:
    def test_the_scale_is_the_root_mean_square(self):
        found = compare(array(3, -4, 0, 0), array(3, -4, 0, 0.5))
        assert (found.max_abs, found.max_rel) == pytest.approx((0.5, 0.2))

    def test_cancellation_is_no_error_and_an_outlier_hides_none(self):
        assert compare(array(1e-9, 1, -1), array(-1e-9, 1, -1)).within(1e-6)
        spiky = np.ones(1000, np.float32)
        spiky[0] = 1e4
        assert not compare(spiky, spiky * np.where(np.arange(1000) == 5, 2, 1).astype(np.float32)).within(1e-3)

    @pytest.mark.parametrize(
        ("a", "b", "mismatch"),
        [
            (array(1, 2), array(1, 2, 3), "shape"),
            (array(1, 2), array(1, 2, dtype="float16"), "type float32 became float16"),
            (array(1, 2, dtype="int64"), array(1, 2), "type"),
            (array(1, NAN), array(1, 2), "NaN"),
            (array(1, 2), array(1, NAN), "NaN"),
            (array(1, INF), array(1, 2), "infinite"),
            (array(1, INF), array(1, -INF), "infinite"),
            (np.array(["a"]), np.array(["b"]), "values of type"),
        ],
    )
    def test_what_cannot_be_compared_is_infinitely_wrong(self, a, b, mismatch):
        found = compare(a, b)
        assert mismatch in str(found.mismatch)
        assert found.max_abs == found.max_rel == INF
        assert not found.within(INF)

    def test_equal_specials_are_equal(self):
        assert compare(array(1, NAN, INF, -INF), array(1, NAN, INF, -INF)).within(0)
        assert compare(np.array(["a"]), np.array(["a"])).within(0)
        assert compare(array(), array()).within(0)

    def test_zero_against_something_is_wrong(self):
        assert not compare(array(0, 0), array(0, 1e-3)).within(1)

    @pytest.mark.parametrize("values", [(), (0, 0), (NAN, NAN), (INF, 0)])
    def test_nothing_finite_but_zero_is_not_informative(self, values):
        assert not compare(array(*values), array(*values)).informative
        assert compare(array(*values, 1), array(*values, 1)).informative

    # Not near the ends of float64's range, where the values themselves lose digits.
    @given(
        npst.arrays(np.float64, npst.array_shapes(), elements=st.floats(1e-100, 1e150) | st.floats(-1e150, -1e-100)),
        st.floats(1e-3, 1e3),
    )
    def test_the_relative_error_does_not_depend_on_the_unit(self, a, unit):
        b = a + rms(a) * 0.01
        assert compare(a * unit, b * unit).max_rel == pytest.approx(compare(a, b).max_rel, rel=1e-6)

    def test_equal_values_below_the_normal_range_are_no_distance_apart(self):
        tiny = np.full(3, 1e-320 + 1e-320j)
        assert compare(tiny, tiny.copy()).max_rel == 0.0

    def test_huge_values_do_not_overflow(self):
        big = np.array([1e308, -1e308])
        assert rms(big) == pytest.approx(1e308)
        assert compare(big, -big).max_rel == INF

    def test_tolerance_follows_the_type(self):
        values = [tolerance(dtype) for dtype in ("float64", "float32", "float16", "torch.bfloat16")]
        assert values == pytest.approx([1.5e-13, 7.9e-5, 2.0e-2, 1.6e-1], rel=0.05)
        assert tolerance("float32", 400) == pytest.approx(2 * tolerance("float32", 100))
        assert tolerance("int64") == 0


class TestFlips:
    def test_near_ties_are_told_apart(self):
        a = np.array([[1, 0, 0], [0, 5, 0], [2.0, 1.999999, 0]], np.float32)
        b = np.array([[1, 0, 0], [0, 0, 5], [1.999999, 2.0, 0]], np.float32)
        found = count_flips(a, b, 1e-4)
        assert found is not None
        assert (found.rows, found.flipped, found.near_ties) == (3, 2, 1)

    @pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4, 4)])
    def test_other_shapes_are_not_logits(self, shape):
        assert count_flips(np.ones(shape), np.ones(shape), 0) is None
        assert count_flips(np.ones((3, 4)), np.ones((3, 5)), 0) is None
        assert count_flips(np.ones((3, 4), int), np.ones((3, 4), int), 0) is None


def first_of_each(ways):
    return [others[0] for others in ways]


class Fixed:
    """A runner that returns what it is told, per batch; the batch's first argument is its number."""

    kind = "torch"
    precision = "float32"

    def __init__(self, *outputs: dict[str, NDArray[Any]] | Exception, kind: str = "torch") -> None:
        self.outputs = outputs
        self.kind = kind

    def perturbed(self, step: float) -> None:
        return None

    def snapshot(self):
        return lambda: None

    def in_float64(self) -> None:
        return None

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        found = self.outputs[int(batch.args[0][0])]
        if isinstance(found, Exception):
            raise found
        return found

    def observe(self, batch: Batch, layers: Collection[str]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        return self.run(batch), {}

    def trace(self, batch: Batch) -> Trace:
        values = self.run(batch)
        return Trace(values, dict.fromkeys(values, ()), tuple(values))


def batches(count: int) -> Iterator[Batch]:
    for number in range(count):
        yield Batch(args=(np.full(2, number),), kwargs={}, labels=None)


def verdict(a: Any, b: Any, **options: Any) -> Any:
    return compare_runners(Fixed(*a), Fixed(*b), batches(len(a)), **options)


GOOD = {"out": array(1, 2, 3)}


class TestCompareRunners:
    def test_equal_models_pass(self):
        found = verdict([GOOD, GOOD], [GOOD, GOOD])
        assert found.passed
        assert found.reason is None
        assert found.samples == 4
        assert found.tolerance == tolerance("float32")
        document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert document["max_abs_error"] == document["max_rel_error"] == 0
        assert document["passed"] is True

    def test_rounding_passes_and_a_later_batch_can_still_fail(self):
        near = {"out": GOOD["out"] * np.float32(1 + 1e-6)}
        far = {"out": GOOD["out"] * np.float32(1.01)}
        assert verdict([GOOD, GOOD], [near, near]).passed
        found = verdict([GOOD, GOOD], [near, far])
        assert not found.passed
        assert found.max_rel_error == pytest.approx(0.03 / rms(GOOD["out"]), rel=1e-3)
        assert found.first_difference.name == "out"

    @pytest.mark.parametrize("tolerance", [1e-9, 1e-1])
    def test_the_tolerance_can_be_given(self, tolerance):
        near = {"out": GOOD["out"] * np.float32(1 + 1e-4)}
        assert verdict([GOOD], [near], tolerance=tolerance).passed == (tolerance > 1e-4)

    @pytest.mark.parametrize("tolerance", [math.inf, math.nan, -1.0])
    def test_a_tolerance_that_tells_nothing_apart_is_refused(self, tolerance):
        with pytest.raises(UsageError, match="tells nothing apart"):
            verdict([GOOD], [{"out": array(7, 8, 9)}], tolerance=tolerance)

    def test_no_samples_do_not_pass(self):
        found = verdict([], [])
        assert not found.passed
        assert "no samples" in found.reason
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["max_abs_error"] is None

    @pytest.mark.parametrize("value", [0, NAN, INF])
    def test_agreement_on_nothing_does_not_pass(self, value):
        same = {"out": array(value, value)}
        found = verdict([same], [same])
        assert not found.passed
        assert "proves nothing" in found.reason
        # One informative batch is enough.
        assert verdict([same, GOOD], [same, GOOD]).passed

    def test_outputs_are_matched_by_name_then_by_position(self):
        a = {"x": array(1), "y": array(2)}
        assert verdict([a], [{"y": array(2), "x": array(1)}]).passed
        assert verdict([a], [{"p": array(1), "q": array(2)}]).passed
        assert not verdict([a], [{"p": array(2), "q": array(1)}]).passed

    def test_a_missing_output_fails(self):
        found = verdict([{"x": array(1), "y": array(2)}], [{"x": array(1)}])
        assert not found.passed
        assert "1 outputs, the baseline 2" in found.reason

    def test_integers_must_be_equal(self):
        a, b = {"ids": array(1, 100000, dtype="int64")}, {"ids": array(1, 100001, dtype="int64")}
        assert verdict([a], [a]).passed
        assert not verdict([a], [b]).passed

    def test_mismatches_are_json(self):
        found = verdict([GOOD], [{"out": array(1, NAN, 3)}])
        assert not found.passed
        assert "NaN" in found.reason
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["max_rel_error"] is None

    def test_a_candidate_that_raises_fails_and_a_baseline_that_raises_is_an_error(self):
        found = verdict([GOOD], [ModelError("reshape")])
        assert not found.passed
        assert "reshape" in found.reason
        with pytest.raises(ModelError, match="reshape"):
            verdict([ModelError("reshape")], [GOOD])

    def test_kinds_without_common_layers_say_so(self):
        bad = {"out": array(3, 2, 1)}
        found = compare_runners(Fixed(GOOD), Fixed(bad, kind="onnx"), batches(1))
        assert found.first_difference is None
        assert "no common layer names" in str(found.note)
        assert verdict([GOOD], [bad], locate=False).note is None

    def test_flips_are_counted_over_batches(self):
        a = {"out": np.array([[1, 0], [0, 1]], np.float32)}
        b = {"out": np.array([[0, 1], [0, 1]], np.float32)}
        found = verdict([a, a], [a, b])
        assert found.to_dict()["label_flips"] == 1
        assert verdict([GOOD], [GOOD]).to_dict()["label_flips"] is None


class Net(nn.Module):
    def __init__(self, flatten: int = -1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8 * 4 * 4, 5)
        self.flatten = flatten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.reshape(self.flatten, 8 * 4 * 4))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.bn1.running_mean.uniform_(-1, 1)
    net.bn1.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture
def images() -> Batch:
    pixels = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    return Batch(args=(pixels,), kwargs={}, labels=np.arange(4))


def folded(net: Net) -> Net:
    result = copy.deepcopy(net)
    result.conv1 = nn.utils.fusion.fuse_conv_bn_eval(net.conv1, net.bn1)
    result.bn1 = nn.Identity()
    return result


class TestRealModels:
    def verify(self, net: Net, candidate: Net, batch: Batch) -> Any:
        return compare_runners(TorchRunner(net), TorchRunner(candidate), [batch])

    def test_a_fold_passes(self, net, images):
        found = self.verify(net, folded(net), images)
        assert found.passed
        assert found.max_rel_error < tolerance("float32") / 10

    def test_negative_control_perturbed(self, net, images):
        wrong = folded(net)
        with torch.no_grad():
            wrong.conv2.weight[3] *= 1.001
        found = self.verify(net, wrong, images)
        assert not found.passed
        # conv1 differs, too, but that is the fold.
        assert found.first_difference.name == "conv2"

    def test_negative_control_all_zero(self, net, images):
        wrong = copy.deepcopy(net)
        for parameter in wrong.fc.parameters():
            nn.init.zeros_(parameter)
        assert not self.verify(net, wrong, images).passed

    def test_negative_control_permuted_channels(self, net, images):
        wrong = copy.deepcopy(net)
        with torch.no_grad():
            wrong.conv1.weight.copy_(wrong.conv1.weight.flip(0))
        found = self.verify(net, wrong, images)
        assert not found.passed
        assert found.first_difference.name == "conv1"

    def test_negative_control_wrong_eps(self, net, images):
        wrong = folded(net)
        net.bn1.eps = 1e-3
        assert not self.verify(net, wrong, images).passed

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_types_have_room_for_rounding_but_not_for_faults(self, net, images, dtype):
        half = copy.deepcopy(net).to(dtype)
        assert self.verify(half, folded(net).to(dtype), images).passed
        wrong = folded(net).to(dtype)
        with torch.no_grad():
            wrong.conv1.weight.copy_(wrong.conv1.weight.flip(0))
        assert not self.verify(half, wrong, images).passed

    def test_a_baked_batch_size_is_found(self, net, images):
        baked = copy.deepcopy(net)
        baked.flatten = 4
        assert self.verify(net, baked, images).passed
        for other in other_batch_sizes(images):
            TorchRunner(net).run(other)
            with pytest.raises(ModelError):
                TorchRunner(baked).run(other)
            assert not self.verify(net, baked, other).passed

    def test_sizes_that_the_baseline_does_not_take_do_not_count(self, net, images):
        baked = copy.deepcopy(net)
        baked.flatten = 4
        others = [[other] for other in other_batch_sizes(images)]
        same = compare_runners(TorchRunner(baked), TorchRunner(baked), [images], where_taken=others)
        assert same.passed and same.samples == images.size
        assert not compare_runners(TorchRunner(net), TorchRunner(baked), [images], where_taken=others).passed


class TestOtherBatchSizes:
    @pytest.mark.parametrize(("size", "sizes"), [(4, [1, 3]), (2, [1, 3]), (1, [3]), (3, [1])])
    def test_sizes(self, size, sizes):
        x = np.arange(size * 2).reshape(size, 2)
        given = Batch(args=(x, {"y": [x, 7]}), kwargs={"z": torch.tensor(x), "w": np.ones(9)}, labels=np.arange(size))
        for other, expected in zip(other_batch_sizes(given), sizes, strict=True):
            assert other.size == expected
            inner = other.args[1]["y"]
            assert inner[0].shape == (expected, 2)
            assert inner[1] == 7
            assert other.kwargs["z"].shape == (expected, 2)
            assert other.kwargs["w"].shape == (9,)
            np.testing.assert_array_equal(other.labels, np.arange(expected) % size)

    def test_a_list_with_one_entry_per_sample(self):
        images = [np.ones((3, 5)), np.ones((3, 6)), np.ones((3, 7)), np.ones((3, 8))]
        given = Batch(args=(images,), kwargs={}, labels=None)
        assert [len(other.args[0]) for other in other_batch_sizes(given)] == [1, 3]


class Point(NamedTuple):
    x: Any
    y: int


class TestVariations:
    def test_choices_are_made_otherwise_one_at_a_time(self):
        batch = Batch((np.arange(6).reshape(2, 3), True, 0.0, "mode", None), {"n": 3, "mask": np.zeros((2, 3), bool)})
        found = [ways[0] for ways in other_choices(batch)]
        changed = [
            [
                a is not b
                for a, b in zip((*o.args, *o.kwargs.values()), (*batch.args, *batch.kwargs.values()), strict=True)
            ]
            for o in found
        ]
        assert [row.index(True) for row in changed] == [0, 1, 2, 5, 6]
        assert all(sum(row) == 1 for row in changed)
        assert found[0].args[0].tolist() == [[2, 1, 0], [5, 4, 3]]
        assert (found[1].args[1], found[2].args[2], found[3].kwargs["n"]) == (False, 1.0, 2)
        assert found[4].kwargs["mask"].all()
        assert len(other_choices(batch, arrays=False)) == 3

    @pytest.mark.parametrize("make", [np.array, torch.tensor])
    def test_integers_stay_in_range(self, make):
        for before, expected in (([5, 5], [4, 4]), ([0, 0], [1, 1]), (7, 6), ([1, 2], [2, 1])):
            assert other_choices(Batch((make(before),)))[0][0].args[0].tolist() == expected

    def test_axes_of_one_size_grow_together(self):
        batch = Batch(
            (np.zeros((2, 7, 4), np.float32),), {"mask": np.zeros((2, 7), bool), "table": torch.zeros(3, 5, 5)}
        )
        shapes = [[tuple(v.shape) for v in (*o.args, *o.kwargs.values())] for o in first_of_each(other_shapes(batch))]
        assert shapes[:2] == [[(2, 7, 36), (2, 7), (3, 5, 37)], [(2, 7, 5), (2, 7), (3, 5, 6)]]
        assert shapes[2:4] == [[(2, 39, 4), (2, 39), (3, 5, 5)], [(2, 8, 4), (2, 8), (3, 5, 5)]]
        assert shapes[-2:] == [[(2, 7, 4), (2, 7), (3, 37, 37)], [(2, 7, 4), (2, 7), (3, 6, 8)]]
        images = Batch((np.zeros((2, 3, 8, 8), np.float32),))
        assert len(other_shapes(images)) == 4  # height and width are also all axes behind the channels

    def test_axes_change_in_either_direction(self):
        images = Batch((np.arange(2 * 3 * 224 * 127).reshape(2, 3, 224, 127),))
        ways = [[o.args[0].shape[2:] for o in others] for others in other_shapes(images)]
        assert ways[:2] == [[(256, 159), (192, 127)], [(193, 130), (225, 124)]]
        assert [(224, 159)] in ways
        assert [(193, 127), (225, 127)] in ways
        shorter = other_shapes(images)[0][1].args[0]
        assert np.array_equal(shorter, images.args[0][:, :, :192])
        longer = other_shapes(images)[0][0].args[0]
        assert np.array_equal(longer[:, :, 224:, :127], images.args[0][:, :, :32])

    def test_more_sizes_than_are_varied_in_turn_are_varied_together(self):
        batch = Batch(tuple(np.zeros((2, n), np.float32) for n in range(11, 20)))
        shapes = [tuple(v.shape[1] for v in o.args) for o in first_of_each(other_shapes(batch))]
        assert (*range(11, 17), 49, 50, 51) in shapes

    def test_dataclasses_and_named_tuples_are_looked_into(self):
        @dataclass
        class Config:
            scale: float

        batch = Batch((Point(np.ones(2, np.float32), 3), Config(2.0)))
        changed = [way.args for ways in other_choices(batch) for way in ways]
        assert [args[0].y for args in changed] == [2, 9, 3, 3]
        assert [args[1].scale for args in changed] == [2.0, 2.0, 0.6, 7.0]
        assert next(other_values(batch)).args[0].x.tolist() == pytest.approx([-1.7, -1.7])

    @pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.float32])
    def test_a_single_number_in_an_array_stays_in_one(self, dtype):
        batch = Batch((np.array(1, dtype),))
        ways = [*other_values(batch), *(way for ways in other_choices(batch) for way in ways)]
        assert all(isinstance(way.args[0], np.ndarray) and way.args[0].dtype == dtype for way in ways)
        assert any(way.args[0] != 1 for way in ways)

    @pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fn])
    def test_types_with_which_torch_can_do_little(self, dtype):
        batch = Batch((torch.zeros(2, 3).to(dtype),))
        for ways in (other_values, other_choices, other_integers, other_shapes):
            list(ways(batch))

    @pytest.mark.parametrize("make", [np.array, torch.tensor])
    def test_indices_are_drawn_from_ranges_from_wide_to_narrow(self, make):
        batch = Batch((make([[0, 1, 1, 0, 0], [1, 0, 1, 1, 0]]), make([2, 3])), {"x": make([[0.5]])})
        largest = [int(other.args[0].max()) for other in other_integers(batch)]
        assert largest == sorted(largest, reverse=True)
        assert largest[0] > 1000 and largest[-1] == 2
        for other in other_integers(batch):
            assert other.args[0].dtype == batch.args[0].dtype and other.args[0].min() >= 0
            assert other.args[1].tolist() == [2, 3]  # may be sizes
        images = Batch((np.zeros((2, 4, 4, 3), np.uint8),))
        assert 128 < other_integers(images)[0].args[0].max() < 256
        assert other_integers(Batch((np.zeros((2, 9), np.float32), np.arange(9), np.ones((2, 4), np.int64)))) == []

    def test_a_single_integer_counts_as_a_number(self):
        for one in (np.array(1), np.array([1]), torch.tensor(1)):
            assert [int(way.args[0].max()) for way in other_choices(Batch((one,)))[0]] == [0, 5]

    def test_what_is_not_dense_numbers_stays(self):
        batch = Batch((torch.eye(3).to_sparse(), np.array(["a", "b"]), torch.zeros(2, 3, dtype=torch.bfloat16)))
        assert other_choices(batch) == []
        for other in (*other_values(batch), *first_of_each(other_shapes(batch))):
            assert other.args[0] is batch.args[0]
            assert other.args[1] is batch.args[1]
        assert list(other_values(batch))[1].args[2].dtype == torch.bfloat16
