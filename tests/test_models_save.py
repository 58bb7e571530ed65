"""What is written computes the same when it is read back: bundles are built a second time, exported graphs keep their dynamic axes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bnctl.data.batches import Batch
from bnctl.engines.torch.export import to_program
from bnctl.errors import ModelError, UsageError
from bnctl.models.bundle import load_bundle
from bnctl.models.open import open_model
from bnctl.models.save import _other_seed, save_model
from bnctl.runtime import open_runner
from bnctl.verification import compare_runners

HERE = Path(__file__).stem
SHAPE = "2x3x8x8"


class Net(nn.Module):
    """Fully convolutional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
        nn.init.uniform_(self.norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.norm(self.conv(x)).relu())) / x.shape[-1]  # type: ignore[no-any-return]

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Permuted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.order = torch.randperm(8)

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.order]


class Scaled(Net):
    """With a buffer outside of the state dict."""

    def __init__(self, registered: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(8, 1, 1) + 0.5, persistent=registered)

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Drawn(Net):
    def __init__(self, draw: str = "python") -> None:
        super().__init__()
        self.scale = {"python": random.random, "numpy": np.random.random}[draw]()

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Noisy(Net):
    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Fixed(Net):
    """The factory's own seed makes it the same on each call, and a buffer of its own kind stays in its dtype."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.register_buffer("scale", torch.rand(8, 1, 1) + 0.5, persistent=False)
        self.double()

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)


@pytest.mark.parametrize(
    "model",
    [("Permuted",), ("Scaled",), ("Drawn", "--model-arg", "draw=python"), ("Drawn", "--model-arg", "draw=numpy")],
    ids=lambda m: m[-1],
)
def test_a_factory_that_draws_what_the_state_dict_lacks_is_no_bundle(model, cli):
    words = ("fold", f"{HERE}:{model[0]}", *model[1:], "--input", SHAPE, "-o")
    ended = cli(*words, "out")
    assert ended.code == 2
    assert "does not build the same model twice" in ended.err
    assert ".pt2" in ended.err
    assert not Path("out").exists()
    assert cli(*words, "out.pt2").code == 0


@pytest.mark.parametrize("model", [("Net",), ("Scaled", "--model-arg", "registered=true"), ("Fixed",)])
def test_what_comes_back_the_same_is_written(model, cli):
    ended = cli("fold", f"{HERE}:{model[0]}", *model[1:], "--input", SHAPE, "-o", "out")
    assert ended.code == 0, ended.err
    again = cli("verify", "out", "out", "--input", SHAPE, "--data", "random:4")
    assert again.code == 0, again.err


def test_a_model_that_differs_from_itself_is_not_blamed_on_its_factory():
    save_model(open_model(f"{HERE}:Noisy"), "out", example=Batch((torch.randn(2, 3, 8, 8),)))
    assert Path("out").is_dir()


def test_the_check_leaves_the_model_and_the_generators_alone():
    model = open_model(f"{HERE}:Fixed")
    before = [t.clone() for t in model.native.state_dict().values()]
    modes = [m.training for m in model.native.modules()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    save_model(model, "out", example=Batch((torch.randn(2, 3, 8, 8, dtype=torch.double, generator=torch.Generator()),)))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(a, b) for a, b in zip(before, model.native.state_dict().values(), strict=True))
    assert [m.training for m in model.native.modules()] == modes


def test_generators_are_put_back_after_an_error():
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), _other_seed():
        assert random.getstate() != states[0]
        assert not torch.equal(torch.get_rng_state(), states[1])
        raise ZeroDivisionError
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_replaced_factory_is_what_the_next_bundle_names():
    example = Batch((torch.randn(2, 3, 8, 8),))
    save_model(open_model(f"{HERE}:Net"), "first", example=example)
    opened = open_model("first", factory=f"{HERE}:other_net")
    save_model(opened, "second", example=example)
    assert load_bundle("second")[1].factory == f"{HERE}:other_net"
    with pytest.raises(UsageError, match="no Python class"):
        save_model(open_model("first", factory=Net), "third", example=example)


def other_net() -> nn.Module:
    return Net()


def _export(path: str, *axes: int) -> str:
    dims = {axis: torch.export.Dim(f"d{axis}", min=2 if axis else 1, max=64) for axis in axes}
    program = torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 6),), dynamic_shapes=(dims,))
    torch.export.save(program, path)
    return path


SIZES = [(1, 3, 5, 9), (3, 3, 12, 4), (2, 3, 8, 8), (5, 3, 2, 7)]


@pytest.mark.parametrize("output", ["out.pt2", "out.onnx"])
@pytest.mark.parametrize("shape", ["1x3x8x6", "8x3x8x8"])
def test_dynamic_axes_of_a_program_stay(output, shape, cli):
    source = _export("in.pt2", 0, 2, 3)
    ended = cli("fold", source, "--input", shape, "-o", output, "--json")
    assert ended.code == 0, ended.err
    assert ended.document["summary"]["folded"] == 1
    batches = [Batch((torch.randn(size).numpy(),)) for size in SIZES]
    found = compare_runners(open_runner(open_model(source)), open_runner(open_model(output)), batches)
    assert found.passed, found.reason


def test_only_the_axes_of_the_source_are_dynamic(cli):
    assert cli("fold", _export("in.pt2", 2), "--input", "2x3x8x6", "-o", "out.pt2").code == 0
    assert open_model("in.pt2").dynamic_axes == open_model("out.pt2").dynamic_axes == ((2,),)
    assert open_model("in.pt2").program is not None
    assert cli("fold", "out.pt2", "--input", "2x3x8x6", "-o", "again.onnx").code == 0


def test_a_size_that_would_be_fixed_is_refused(cli):
    ended = cli("fold", _export("in.pt2", 0, 2, 3), "--input", "2x3x1x8", "-o", "out.pt2")
    assert ended.code == 2
    assert "size 2 or more" in ended.err
    assert not Path("out.pt2").exists()


def test_dynamic_axes_without_the_batch():
    batch = Batch((torch.randn(2, 3, 8, 6),))
    program = to_program(Net(), batch, dynamic_batch=False, dynamic_axes=((0, 3),))
    program.module()(torch.randn(2, 3, 8, 11))
    with pytest.raises(ModelError, match="cannot capture"):
        to_program(Net(), batch, dynamic_axes=((0,), (0,)))
