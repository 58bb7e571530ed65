"""Recalibration: moving averages, old statistics mixed in, as much data as it takes, bad batches, autocast."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bnctl.data.batches import Batch, as_batches
from bnctl.engines.torch.recalibrate import recalibrate
from bnctl.errors import DataError, ModelError, UsageError
from bnctl.numerics.moments import Moments
from bnctl.recalibration.book import Book
from bnctl.recalibration.estimate import moving_average, with_prior
from bnctl.recalibration.method import NoSamplesError
from bnctl.recalibration.partial import Partial
from bnctl.recalibration.seen import Seen
from bnctl.recalibration.site import Site
from bnctl.recalibration.until import PILOT_SAMPLES, pilot, run_until
from bnctl.recalibration.workers import Alone


class Net(nn.Module):
    """Two norms with momenta of their own; dropout, which training would turn on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.drop(torch.relu(self.bn1(self.conv1(x))))))


def net(*, double: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Net()
        for norm in (made.bn1, made.bn2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked.fill_(3)
    return made.double() if double else made


def images(samples: int = 23, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(samples, 1, 1, 1, generator=generator)
    return torch.rand(samples, 3, 8, 8, generator=generator) + 2 * level


def split(x: torch.Tensor, size: int) -> list[Batch]:
    return [Batch((part,)) for part in x.split(size)]


# ---- ema


def test_ema_is_what_training_leaves() -> None:
    """torch's own training mode of the norms alone."""
    x = images().double()
    trained = copy.deepcopy(net()).eval()
    for norm in (trained.bn1, trained.bn2):
        norm.train()
    with torch.no_grad():
        for part in x.split(5):
            trained(part)
    found = recalibrate(net(), split(x, 5), method="ema")
    assert found.model.state_dict().keys() == trained.state_dict().keys()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert found.model.bn1.num_batches_tracked == 3 + 5
    # negative control: the other methods leave something else
    batch = recalibrate(net(), split(x, 5), method="batch").model
    assert not torch.allclose(batch.bn1.running_mean, trained.bn1.running_mean, rtol=1e-3)


def test_ema_of_instance_norm_is_what_training_leaves() -> None:
    x = images().double()
    trained = nn.InstanceNorm2d(3, track_running_stats=True).double().train()
    with torch.no_grad():
        for part in x.split(5):
            trained(part)
    found = recalibrate(nn.InstanceNorm2d(3, track_running_stats=True).double(), split(x, 5), method="ema").model
    torch.testing.assert_close(found.running_mean, trained.running_mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.running_var, trained.running_var, rtol=1e-10, atol=0)


def test_moving_average_by_hand() -> None:
    calls = [Moments(4, np.array([1.0]), np.array([6.0])), Moments(2, np.array([5.0]), np.array([1.0]))]
    mean, var = moving_average((np.array([0.0]), np.array([1.0])), calls, 0.5)
    assert (mean[0], var[0]) == ((0.5 + 5) / 2, (1.5 + 1) / 2)
    mean, _ = moving_average((np.array([9.0]), np.array([1.0])), calls, None, calls_before=1)
    assert mean[0] == pytest.approx((9 + 1 + 5) / 3)


# ---- prior


def test_the_prior_is_as_many_more_samples() -> None:
    """N samples that have the old statistics, and n others, pooled: their moments are those of the mixture."""
    generator = np.random.default_rng(0)
    old, new = generator.normal(3, 2, (600, 2)), generator.normal(-1, 0.5, (200, 2))
    mean, var = with_prior((old.mean(0), old.var(0)), Moments.of(new), 200, 600)
    np.testing.assert_allclose(mean, np.concatenate([old, new]).mean(0))
    np.testing.assert_allclose(var, np.concatenate([old, new]).var(0))
    # without the spread between the domains the variance would be too small by far
    assert (0.75 * old.var(0) + 0.25 * new.var(0) < 0.7 * var).all()


@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_later_layers_see_the_mixture(memory_bytes: int | None) -> None:
    """Layer by layer, by hand: each norm's input under the mixed statistics of the one before."""
    start, x = net(), images().double()
    found = recalibrate(start, split(x, 5), prior=10, memory_bytes=memory_bytes).model
    by_hand = copy.deepcopy(start).eval()
    with torch.no_grad():
        hidden = x
        for conv, norm in ((by_hand.conv1, by_hand.bn1), (by_hand.conv2, by_hand.bn2)):
            seen = conv(hidden)
            old = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
            mean, var = with_prior(old, Moments.of(seen.numpy()), 23, 10)
            norm.running_mean.copy_(torch.from_numpy(mean))
            norm.running_var.copy_(torch.from_numpy(var))
            hidden = torch.relu(norm(seen))
    torch.testing.assert_close(found.bn2.running_mean, by_hand.bn2.running_mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.bn2.running_var, by_hand.bn2.running_var, rtol=1e-10, atol=1e-12)


def test_a_large_prior_keeps_the_old_statistics() -> None:
    start = net()
    found = recalibrate(start, split(images().double(), 5), prior=1e15)
    torch.testing.assert_close(found.model.bn2.running_mean, start.bn2.running_mean)
    assert max(site.drift.max for site in found.sites) < 1e-10
    assert max(site.self_consistency for site in found.sites) > 0.1  # and that is not what inference sees


@pytest.mark.parametrize("how", [{"prior": -1.0}, {"prior": float("nan")}, {"prior": 1.0, "method": "ema"}])
def test_impossible_priors(how: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        recalibrate(net(), split(images().double(), 5), **how)


# ---- until


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    """The spread of the mean over many sets of 40 samples, whose pixels depend on each other."""
    generator = np.random.default_rng(1)

    def draw() -> np.ndarray:
        return generator.normal(0, 1, (40, 1, 1)) + generator.normal(0, 0.5, (40, 1, 9))

    means = [draw().mean() for _ in range(2000)]
    errors = []
    for _ in range(50):
        x = draw()
        (seen,) = Seen.of_groups(x.mean(2)[None], x.var(2)[None] * 9, 9)
        errors.append(seen.standard_error()[0] * np.sqrt(seen.values.variance()[0]))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    # as if pixels were independent, it would be a third of that
    assert np.sqrt(x.var() / x.size) < 0.5 * np.mean(errors)


def test_until_stops_when_the_data_are_enough() -> None:
    batches = split(images(1200), 8)
    found = recalibrate(net(double=False), batches, until=0.06)
    assert found.enough
    assert 64 < found.samples < 1200
    assert found.standard_error <= 0.06
    fewer = recalibrate(net(double=False), batches[:: 2 * len(batches) // (found.samples // 8)])
    assert fewer.standard_error > 0.06  # half of them would not have been enough
    same = recalibrate(net(double=False), batches[:: len(batches) // (found.samples // 8)])
    torch.testing.assert_close(same.model.state_dict(), found.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["exact", "batch", "ema"])
def test_until_says_when_the_data_are_too_few(method: Any) -> None:
    found = recalibrate(net(double=False), split(images(100), 8), until=1e-3, method=method)
    assert found.enough is False
    assert found.samples == 100


def test_until_spreads_what_it_takes_over_sorted_data() -> None:
    """The first batches are all of one kind: they would be enough for each other."""
    x = images(1200)
    x = x[x.mean((1, 2, 3)).argsort()]
    found = recalibrate(net(double=False), split(x, 8), until=0.1)
    whole = recalibrate(net(double=False), split(x, 8))
    assert found.samples < 1200
    front = recalibrate(net(double=False), split(x, 8)[: found.samples // 8])
    scale = whole.model.bn1.running_var.sqrt()
    assert ((found.model.bn1.running_mean - whole.model.bn1.running_mean).abs() / scale).max() < 0.2
    assert ((front.model.bn1.running_mean - whole.model.bn1.running_mean).abs() / scale).max() > 0.5


class Writing(Net):
    """Writes into its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("how", [{}, {"memory_bytes": 0}, {"method": "batch"}, {"method": "ema"}])
def test_a_model_that_writes_into_its_input(how: dict[str, Any]) -> None:
    batches = split(images().double(), 5)
    model = net()
    model.__class__ = Writing
    doubled = [Batch((2 * batch.args[0],)) for batch in batches]
    found, expected = recalibrate(model, batches, **how), recalibrate(net(), doubled, **how)
    torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.cat([batch.args[0] for batch in batches]), images().double())


@pytest.mark.parametrize("method", ["exact", "batch", "ema"])
def test_until_goes_on_where_all_that_it_took_was_bad(method: Any) -> None:
    x = images(600)
    batches = split(x, 8)
    for number in range(0, len(batches), 9):  # 75 // 8
        batches[number].args[0][0, 0, 0, 0] = torch.nan
    found = recalibrate(net(double=False), batches, until=0.08, on_bad_batch="skip", method=method)
    assert found.enough
    assert found.samples > 64


def test_run_until_is_not_led_astray() -> None:
    counts: list[int | None] = []

    def once(count: int | None) -> float:
        counts.append(count)
        if len(counts) < 3:
            raise NoSamplesError("none")
        return float("nan")

    found = run_until(0.1, 2, once, lambda error: error, lambda: len(counts) == 5)
    assert counts == [2, 4, 8, 128, 2048]  # no number is an error of any size
    assert not found[1]
    counts.clear()
    with pytest.raises(NoSamplesError):
        run_until(0.1, 2, once, lambda error: error, lambda: True)


@pytest.mark.parametrize("until", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_tolerances(until: float) -> None:
    with pytest.raises(UsageError, match="tolerance of the means"):
        recalibrate(net(), split(images().double(), 5), until=until)


# ---- bad batches


@pytest.mark.parametrize("how", [{}, {"memory_bytes": 0}, {"method": "batch"}, {"method": "ema"}])
def test_bad_batches_are_left_out_and_named(how: dict[str, Any]) -> None:
    x = images().double()
    bad = x.clone()
    bad[7] = float("nan")
    bad[20] = float("inf")
    found = recalibrate(net(), split(bad, 5), on_bad_batch="skip", **how)
    parts = split(x, 5)
    clean = recalibrate(net(), [parts[0], parts[2], parts[3]], **how)
    assert found.skipped == [1, 4]
    assert found.samples == 15
    torch.testing.assert_close(found.model.state_dict(), clean.model.state_dict(), rtol=0, atol=0)


def test_nothing_but_bad_batches() -> None:
    with pytest.raises(DataError):
        recalibrate(net(), split(torch.full((4, 3, 8, 8), float("nan")).double(), 2), on_bad_batch="skip")


# ---- other


def test_autocast_runs_operators_in_half_precision() -> None:
    batches = split(images(), 5)
    full = recalibrate(net(double=False), batches).model
    half = recalibrate(net(double=False), batches, autocast=torch.bfloat16).model
    assert half.bn2.running_mean.dtype == torch.float32
    torch.testing.assert_close(half.bn2.running_var, full.bn2.running_var, rtol=0.05, atol=0.01)
    assert not torch.equal(half.bn2.running_var, full.bn2.running_var)


@pytest.mark.parametrize("how", [{}, {"memory_bytes": 0}, {"method": "batch"}, {"method": "ema"}])
def test_threads_do_not_change_a_bit(how: dict[str, Any]) -> None:
    batches = split(images(61), 4)
    one = recalibrate(net(double=False), batches, threads=1, **how)
    for threads in (2, 5):
        many = recalibrate(net(double=False), batches, threads=threads, **how)
        torch.testing.assert_close(many.model.state_dict(), one.model.state_dict(), rtol=0, atol=0)
        assert many.sites == one.sites


class Stopping:
    """Batches of which the loader breaks off in one pass."""

    def __init__(self, batches: list[Batch], at: int) -> None:
        self.batches, self.at = batches, at

    def __iter__(self) -> Any:
        for index, batch in enumerate(self.batches):
            if index == self.at:
                self.at = -1
                raise KeyboardInterrupt
            yield batch


class Interrupting(Net):
    """The user interrupts in the middle of a forward pass, after the first norm."""

    left = 10**9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        Interrupting.left -= 1
        if Interrupting.left == 0:
            raise KeyboardInterrupt
        return self.bn2(y)


@pytest.mark.parametrize(
    "how",
    [
        *({}, {"memory_bytes": 0}, {"method": "batch"}, {"method": "ema"}, {"prior": 7.0}),
        {"prior": 700.0, "memory_bytes": 0},
    ],
)
def test_an_interrupted_run_is_resumed_to_the_same_bits(how: dict[str, Any], tmp_path: Path) -> None:
    batches = split(images(93), 4)
    model = net(double=False)
    model.__class__ = Interrupting
    whole = recalibrate(model, batches, threads=1, **how)
    partial = Partial(tmp_path / "out.partial", {"data": "these"}, every_s=0)
    Interrupting.left = 17
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches, threads=1, partial_file=partial, **how)
    state = partial.read()
    assert state is not None
    assert state.accounts  # it does not begin at the start
    resumed = recalibrate(model, batches, threads=1, partial_file=partial, resume=True, **how)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert resumed.sites == whole.sites
    assert resumed.samples == whole.samples == 93


def test_a_partial_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    kept = Partial(path, {"data": "a.npz", "method": "exact"}, every_s=0)
    recalibrate(net(), split(images().double(), 5), partial_file=kept)
    assert path.exists()
    with pytest.raises(UsageError, match=r"data was a\.npz and is b\.npz"):
        Partial(path, {"data": "b.npz", "method": "exact"}).read()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        Partial(path, {"data": "a.npz", "method": "exact"}).read()
    kept.remove()
    assert kept.read() is None


def test_a_book_does_not_depend_on_who_noted_what_when() -> None:
    """Notes in another order, shared by two workers: the same bits."""
    generator = np.random.default_rng(0)
    site = Site("bn", "bn.running_mean", "bn.running_var", 1e-5, 1e-7, (np.zeros(3), np.ones(3)))
    notes = [((batch, 1), Moments.of(generator.normal(batch, 1, (4, 3)))) for batch in range(9)]

    class Two(Alone):
        """All that the other worker noted comes along."""

        def __init__(self, other: dict[str, Any]) -> None:
            self.other = other

        def share(self, value: Any, combine: Any) -> Any:
            return combine([value, self.other])

    def entered(own: list[Any], other: list[Any]) -> Any:
        book, of_other = Book(), Book()
        for (when, moments), into in [*((n, book) for n in own), *((n, of_other) for n in other)]:
            into.note(site, when, Seen(moments, moments, moments))
        book.enter(Two(of_other._notes))
        return book.accounts["bn"]

    alone = entered(notes, [])
    for own, other in ((notes[::-1], []), (notes[::2], notes[1::2]), (notes[5:], notes[:5])):
        account = entered(own, other)
        assert np.array_equal(account.seen.values.m2, alone.seen.values.m2)
        assert np.array_equal(account.average[1], alone.average[1])
    # negative control: merged in another order, the last bits differ
    backwards = [((9 - batch, 1), moments) for (batch, _), moments in notes]
    assert not np.array_equal(entered(backwards, []).seen.values.m2, alone.seen.values.m2)


@pytest.mark.parametrize(("mean", "var"), [(np.nan, 1.0), (np.inf, 1.0), (0.0, -1.0), (0.0, np.nan)])
def test_broken_statistics_are_not_mixed_in(mean: float, var: float) -> None:
    target = Moments.of(np.random.default_rng(0).normal(size=(9, 1)))
    old = np.array([mean]), np.array([var])
    assert with_prior(old, target, 9, 0)[0] == target.mean
    with pytest.raises(ModelError, match=r"^bn1: its old statistics hold NaN, infinity or a negative variance"):
        with_prior(old, target, 9, 3, name="bn1")


@pytest.mark.parametrize("sizes", [[1, *[32] * 9], [31, 32, 32, *[32] * 7]])
def test_until_begins_with_as_many_samples_as_it_says(sizes: list[int]) -> None:
    """Whatever the size of the very first batch."""
    first = pilot(as_batches([np.zeros((n, 2), np.float32) for n in sizes]))
    assert PILOT_SAMPLES <= sum(sizes[:first]) <= PILOT_SAMPLES + 32


@pytest.mark.parametrize("value", [True, "0.1", 0, float("nan")])
def test_what_is_no_tolerance_or_prior(value: Any) -> None:
    with pytest.raises(UsageError, match="tolerance"):
        recalibrate(net(double=False), split(images(20), 8), until=value)
