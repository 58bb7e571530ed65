"""The forward of one module as a list of steps: what is left to edit where an affine is computed in code that also does other things.

A :class:`Program` is read from the record of a call (:mod:`bnctl.engines.torch.readings`). It can be changed (a value takes the place of another, an empty
argument is filled) and put in the place of the code: :class:`Replay` becomes the instance's ``forward``. Class, children, parameters and hooks of the module
stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, nn

from bnctl.engines.torch.nested import tensors_in
from bnctl.engines.torch.record import Ref

REPLAYED = frozenset(
    "add sub mul div maximum minimum conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear matmul mm einsum addmm "
    "embedding batch_norm layer_norm group_norm instance_norm relu relu6 hardtanh silu gelu sigmoid tanh hardswish hardsigmoid leaky_relu elu selu celu mish "
    "softplus prelu softmax log_softmax cat concat stack flatten permute transpose t contiguous clone detach chunk mean amax dropout neg "
    "view reshape slice select narrow split split_with_sizes pad expand "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "unsqueeze squeeze".split()
)
"""Operators that are replayed, with their numbers: the caller has seen to it that no size of the input changes those."""

WITHOUT_BIAS = frozenset({"matmul", "mm", "einsum"})
"""Linear operators that take no bias."""

ON_PARAMETERS = frozenset("reshape view expand sqrt rsqrt reciprocal pow exp square sum to _to_copy".split())
"""Operators that are also taken, with all their numbers, where they act on parameters alone."""


@dataclass(frozen=True)
class Stored:
    """Stands for a parameter or buffer of the module, by its path below the module."""

    path: str


@dataclass(frozen=True)
class Step:
    """One operator or the call of one child. ``outputs`` are the numbers of the tensors it makes, in order."""

    name: str
    child: bool
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]

    def reads(self) -> Iterator[int]:
        """The values it reads."""
        return values_in((self.args, dict(self.kwargs)))


@dataclass(frozen=True)
class Program:
    """Steps over numbered values: first the inputs, then what each step makes.

    Args:
        inputs: how many tensors the module takes.
        steps: in order.
        result: what it returns, with :class:`Ref` where tensors are.
    """

    inputs: int
    steps: tuple[Step, ...]
    result: Any

    def without(self, aliases: Mapping[int, int]) -> Program:
        """The program in which other values stand for some, without the steps that nobody needs any more."""

        def stands_for(value: int) -> int:
            while value in aliases:
                value = aliases[value]
            return value

        steps = tuple(
            replace(s, args=_renamed(s.args, stands_for), kwargs=_renamed(s.kwargs, stands_for)) for s in self.steps
        )
        changed = Program(self.inputs, steps, _renamed(self.result, stands_for))
        needed = self._needed(set())
        idle = set(range(len(steps))) - needed  # what the result never rested on was there for other reasons
        kept = changed._needed(idle) | idle
        return replace(changed, steps=tuple(s for i, s in enumerate(steps) if i in kept))

    def biased(self, biases: Mapping[int, tuple[str, int | None]]) -> Program:
        """The program in which some steps have a bias.

        Args:
            biases: by the number of the step: the path of a stored parameter, and None where it is the step's third argument; else it is added to what the
                step makes, with so many axes behind its own.
        """
        steps: list[Step] = []
        new = 1 + max((self.inputs - 1, *(number for step in self.steps for number in step.outputs)), default=0)
        for number, step in enumerate(self.steps):
            path, behind = biases.get(number, (None, None))
            if path is None:
                steps.append(step)
            elif behind is None:
                args = (*step.args[:2], *[None] * (2 - len(step.args)), Stored(path), *step.args[3:])
                steps.append(replace(step, args=args))
            else:  # what the sum makes has the number by which all others know the product
                steps += [
                    replace(step, outputs=(new,)),
                    Step("aten.view.default", False, (Stored(path), [-1, *[1] * behind]), (), (new + 1,)),
                    Step("aten.add.Tensor", False, (Ref(new), Ref(new + 1)), (), step.outputs),
                ]
                new += 2
        return replace(self, steps=tuple(steps))

    def _needed(self, roots: set[int]) -> set[int]:
        """Numbers of the steps that the result and the steps in ``roots`` rest on."""
        values = set(values_in(self.result)).union(*(self.steps[number].reads() for number in roots))
        needed: set[int] = set()
        for number in reversed(range(len(self.steps))):
            step = self.steps[number]
            if values.intersection(step.outputs):
                needed.add(number)
                values.update(step.reads())
        return needed

    def to_json(self) -> dict[str, Any]:
        """For a bundle's edits."""
        steps = [
            {
                "child" if s.child else "op": s.name,
                "args": [_to_json(a) for a in s.args],
                "kwargs": {k: _to_json(v) for k, v in s.kwargs},
                "outputs": list(s.outputs),
            }
            for s in self.steps
        ]
        return {"inputs": self.inputs, "steps": steps, "result": _to_json(self.result)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Program:
        """The inverse of :meth:`to_json`; only operators that a program may hold are taken.

        Raises:
            ValueError: an operator is none of those.
        """
        steps = []
        for entry in data["steps"]:
            child = "child" in entry
            if not child and base_name(entry["op"]) not in REPLAYED | ON_PARAMETERS:
                raise ValueError(f"{entry['op']} is not an operator that bnctl replays")
            args, kwargs = tuple(_from_json(a) for a in entry["args"]), entry["kwargs"]
            named = tuple((str(k), _from_json(v)) for k, v in kwargs.items())
            steps.append(Step(entry["child" if child else "op"], child, args, named, tuple(entry["outputs"])))
        return cls(int(data["inputs"]), tuple(steps), _from_json(data["result"]))


class Replay:
    """Runs a program as the ``forward`` of a module. Parameters and children are looked up in every call: they may be moved, loaded or replaced.

    Args:
        owner: the module.
        program: its steps.
    """

    def __init__(self, owner: nn.Module, program: Program) -> None:
        self.owner = owner
        self.program = program

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the code in whose place it stands."""
        return inspect.signature(self._code.__get__(self.owner))

    @property
    def __code__(self) -> Any:
        """That code: torch.export names shapes after it."""
        return self._code.__code__

    @property
    def _code(self) -> Any:
        return type(self.owner).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the steps.

        Raises:
            TypeError: other arguments are given than those in the recorded call.
        """
        if kwargs or len(args) != self.program.inputs:
            args = self._without_defaults(args, kwargs)
        if len(args) != self.program.inputs:
            raise TypeError(f"{type(self.owner).__name__} was folded for calls with {self.program.inputs} tensors")
        values: dict[int, Any] = dict(enumerate(args))
        for step in self.program.steps:
            called = _child(self.owner, step.name) if step.child else _operator(step.name)
            given = [values[a.value] if type(a) is Ref else self._given(a, values) for a in step.args]
            named = {k: self._given(v, values) for k, v in step.kwargs} if step.kwargs else {}
            result = called(*given, **named)
            if isinstance(result, Tensor):
                values[step.outputs[0]] = result
            else:
                values.update(zip(step.outputs, tensors_in(result), strict=True))
        result = self.program.result
        return values[result.value] if type(result) is Ref else self._given(result, values)

    def _without_defaults(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Arguments in order, without those that say what would be taken anyway."""
        signature = self.__signature__
        given = signature.bind(*args, **kwargs).arguments
        return tuple(v for name, v in given.items() if v is not signature.parameters[name].default)

    def _given(self, tree: Any, values: Mapping[int, Any]) -> Any:
        if isinstance(tree, Ref):
            return values[tree.value]
        if isinstance(tree, Stored):
            return reduce(getattr, tree.path.split("."), self.owner)
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._given(item, values) for item in tree)
        if isinstance(tree, dict):
            return {key: self._given(item, values) for key, item in tree.items()}
        return tree


def values_in(tree: Any) -> Iterator[int]:
    """The numbers of the values that arguments refer to."""
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from values_in(item)
    elif isinstance(tree, dict):
        yield from values_in(list(tree.values()))


def _renamed(tree: Any, name: Any) -> Any:
    if isinstance(tree, Ref):
        return Ref(name(tree.value))
    if isinstance(tree, (tuple, list)):
        return type(tree)(_renamed(item, name) for item in tree)
    if isinstance(tree, dict):
        return {key: _renamed(item, name) for key, item in tree.items()}
    return tree


def _to_json(tree: Any) -> Any:
    if isinstance(tree, Ref):
        return {"value": tree.value}
    if isinstance(tree, Stored):
        return {"stored": tree.path}
    if isinstance(tree, dict):
        return {"dict": {key: _to_json(item) for key, item in tree.items()}}
    if isinstance(tree, tuple):
        return {"tuple": [_to_json(item) for item in tree]}
    return [_to_json(item) for item in tree] if isinstance(tree, list) else tree


def _from_json(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_from_json(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "value":
        return Ref(int(content))
    if kind == "stored":
        return Stored(str(content))
    if kind == "dict":
        return {key: _from_json(item) for key, item in content.items()}
    return tuple(_from_json(item) for item in content)


def base_name(op: str) -> str:
    """The name of an operator in the lists above: ``aten.relu_.default`` gives ``relu``; other namespaces give what is in no list."""
    namespace, _, rest = op.partition(".")
    name = rest.partition(".")[0]
    if namespace != "aten":
        return op
    return name.removesuffix("_") if not name.endswith("__") else name


def _child(owner: nn.Module, path: str) -> Any:
    module: Any = owner
    for name in _names(path):
        module = module._modules[name]
    return module


@cache
def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


@cache
def _operator(name: str) -> Any:
    namespace, base, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), overload)
