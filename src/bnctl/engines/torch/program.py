"""The forward of one module as a list of steps: what is left to edit where an affine is computed in code that also does other things.

A :class:`Program` is read from the record of a call: the operators that the module's own code ran, and the calls of its children. It can be changed (a value
takes the place of another, an empty argument is filled) and put in the place of the code: :class:`Replay` becomes the instance's ``forward``. Class, children,
parameters and hooks of the module stay.

What cannot be told from one call is not read: a number that Python may have computed from the input (see decision 0007), a tensor from outside the module,
arguments that are no tensors. There is then no program, and the code stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnctl.engines.torch.bake import watched_at_entry
from bnctl.engines.torch.record import ALIASED_WRITE, ModuleCall, OpCall, Ref, Trace, tensors_in

_REPLAYED = frozenset(
    "add sub mul div maximum minimum conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear matmul mm addmm embedding "
    "batch_norm layer_norm group_norm instance_norm relu relu6 hardtanh silu gelu sigmoid tanh hardswish hardsigmoid leaky_relu elu selu celu mish "
    "softplus prelu softmax log_softmax cat concat stack flatten permute transpose t contiguous clone detach chunk mean amax dropout neg "
    "view reshape slice select narrow split split_with_sizes pad expand "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "unsqueeze squeeze".split()
)
"""Operators that are replayed, with their numbers: the caller has seen to it that no size of the input changes those."""

_ON_PARAMETERS = frozenset("reshape view expand sqrt rsqrt reciprocal pow exp square sum to _to_copy".split())
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
        return _values((self.args, dict(self.kwargs)))


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

    def filled(self, step: int, position: int, path: str) -> Program:
        """The program in which a step's argument is a stored parameter."""
        old = self.steps[step]
        args = (*old.args[:position], *[None] * (position - len(old.args)), Stored(path), *old.args[position + 1 :])
        return replace(self, steps=(*self.steps[:step], replace(old, args=args), *self.steps[step + 1 :]))

    def _needed(self, roots: set[int]) -> set[int]:
        """Numbers of the steps that the result and the steps in ``roots`` rest on."""
        values = set(_values(self.result)).union(*(self.steps[number].reads() for number in roots))
        needed: set[int] = set()
        for number in reversed(range(len(self.steps))):
            step = self.steps[number]
            if values.intersection(step.outputs):
                needed.add(number)
                values.update(step.reads())
        return needed

    def children(self) -> set[str]:
        """Paths of the children that are called."""
        return {step.name for step in self.steps if step.child}

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
            if not child and _base(entry["op"]) not in _REPLAYED | _ON_PARAMETERS:
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
            result = called(*given, **{k: self._given(v, values) for k, v in step.kwargs})
            if isinstance(result, Tensor):
                values[step.outputs[0]] = result
            else:
                values.update(zip(step.outputs, tensors_in(result), strict=True))
        return self._given(self.program.result, values)

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


@dataclass(frozen=True)
class Reading:
    """A program, the number that each value of the record has in it, and the number of the step that each operator call is."""

    program: Program
    numbers: Mapping[int, int]
    steps: Mapping[int, int]


def read(
    call: ModuleCall, own: Sequence[OpCall], children: Sequence[ModuleCall], position: Mapping[int, int], trace: Trace
) -> Reading | None:
    """The program of a module call, or None where there is none.

    Args:
        call: the call.
        own: the operators that the module's own code ran.
        children: the calls that it made of other modules.
        position: place of each operator in the record, by ``id``.
        trace: the record.
    """
    if call.path is None or call.kwargs or not call.args or not all(isinstance(a, Ref) for a in call.args):
        return None
    if isinstance(
        call.module, fx.GraphModule
    ):  # its copies are made from its graph, and would know nothing of another forward
        return None
    hooked = watched_at_entry(call.module) or any(c.module._forward_hooks for c in children)
    if hooked:  # what a hook does would be done twice: by the hook and by the steps
        return None
    return _Reader(call, trace).read(own, children, position)


class _Reader:
    def __init__(self, call: ModuleCall, trace: Trace) -> None:
        self.call, self.trace = call, trace
        self.prefix = f"{call.path}." if call.path else ""
        self.numbers: dict[int, int] = {a.value: i for i, a in enumerate(call.args)}
        self.count = len(call.args)

    def read(
        self, own: Sequence[OpCall], children: Sequence[ModuleCall], position: Mapping[int, int]
    ) -> Reading | None:
        calls: list[tuple[int, int, OpCall | ModuleCall]] = [(c.start, 0, c) for c in children]
        calls += [(position[id(op)], 1, op) for op in own]
        steps: list[Step] = []
        number_of: dict[int, int] = {}
        for _, _, called in sorted(calls, key=lambda entry: entry[:2]):
            step = self._operator(called) if isinstance(called, OpCall) else self._child(called)
            if step is None:
                return None
            number_of[id(called)] = len(steps)
            steps.append(step)
        # What a hook of a child keeps, it will keep again; what else is kept, the module's own code keeps.
        made = {v for c in children for v in c.outputs if not any(m._forward_hooks for m in c.module.modules())}
        made |= {v for c in own for v in c.outputs}
        result = self._tree(self.call.result, numbers=False)
        if result is None or (made - set(self.call.outputs)) & self.trace.held or not set(_values(result)):
            return None
        return Reading(Program(len(self.call.args), tuple(steps), result[0]), self.numbers, number_of)

    def _operator(self, op: OpCall) -> Step | None:
        name = _base(op.op)
        on_parameters = all(v in self.trace.tensors for v in (*op.inputs, *op.outputs))
        known = name in _REPLAYED or (on_parameters and name in _ON_PARAMETERS)
        if op.op == ALIASED_WRITE or op.random or not known or (op.writes and len(op.outputs) != 1):
            return None
        args, kwargs = self._tree(op.args, numbers=True), self._tree(op.kwargs, numbers=True)
        return None if args is None or kwargs is None else self._step(op.op, False, args[0], kwargs[0], op.outputs)

    def _child(self, child: ModuleCall) -> Step | None:
        if child.path is None or not child.path.startswith(self.prefix):
            return None
        args, kwargs = self._tree(child.args, numbers=False), self._tree(child.kwargs, numbers=False)
        if args is None or kwargs is None:
            return None
        return self._step(child.path.removeprefix(self.prefix), True, args[0], kwargs[0], tuple(child.outputs))

    def _step(self, name: str, child: bool, args: Any, kwargs: Any, outputs: Sequence[int]) -> Step:
        made = range(self.count, self.count + len(outputs))
        self.count += len(outputs)
        self.numbers.update(zip(outputs, made, strict=True))
        return Step(name, child, args, tuple(sorted(kwargs.items())), tuple(made))

    def _tree(self, tree: Any, *, numbers: bool) -> tuple[Any] | None:
        """Recorded arguments in the program's terms, in a tuple of one; None where something in them cannot be told."""
        if isinstance(tree, Ref):
            if tree.value in self.numbers:
                return (Ref(self.numbers[tree.value]),)
            if tree.value in self.trace.numbers:
                return (self.trace.numbers[tree.value],)
            names = [n for n in self.trace.parameters.get(tree.value, ()) if n.startswith(self.prefix)]
            return (Stored(names[0].removeprefix(self.prefix)),) if names else None
        if isinstance(tree, (tuple, list)):
            items = [self._tree(item, numbers=numbers) for item in tree]
            return None if None in items else ((tuple if isinstance(tree, tuple) else list)(i[0] for i in items if i),)
        if isinstance(tree, dict):
            entries = {key: self._tree(item, numbers=numbers) for key, item in tree.items()}
            return None if None in entries.values() else ({k: v[0] for k, v in entries.items() if v},)
        plain = tree is None or isinstance(tree, (bool, str)) or (numbers and isinstance(tree, (int, float)))
        return (tree,) if plain else None


def _values(tree: Any) -> Iterator[int]:
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _values(item)
    elif isinstance(tree, dict):
        yield from _values(list(tree.values()))


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


def _base(op: str) -> str:
    """``aten.relu_.default`` gives ``relu``; other namespaces give what is in no list."""
    namespace, _, rest = op.partition(".")
    name = rest.partition(".")[0]
    if namespace != "aten":
        return op
    return name.removesuffix("_") if not name.endswith("__") else name


def _child(owner: nn.Module, path: str) -> Any:
    module: Any = owner
    for name in path.split("."):
        module = module._modules[name]
    return module


@cache
def _operator(name: str) -> Any:
    namespace, base, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), overload)
