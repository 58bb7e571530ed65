"""Capture by execution: run the model once and write down which operator read which tensor.

Symbolic tracing fails on control flow and ``torch.export`` on data-dependent shapes; one run under a ``TorchDispatchMode`` records any model that runs at all.
Operators are seen below autograd, before composite ones are taken apart: ``aten.linear`` and not ``t, addmm, view``.

Tensors are followed by identity. A tensor written in place is a new *version* of its value; other living tensors over the same storage get new versions too,
made by a pseudo-operator that reads both, so that a write through a view is a further reader of its base. A tensor that outlives the pass (an output, a
feature that a hook keeps, a cache) has been seen by somebody: it is *held*.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from bnctl.engines.torch.living import LivingTensors, storage_of
from bnctl.engines.torch.nested import tensors_in
from bnctl.engines.torch.schema import operator_of
from bnctl.engines.torch.surroundings import layer_by_layer, values_read, young_objects_only

ALIASED_WRITE = "bnctl.aliased_write"
_RENORM = "aten.embedding_renorm_.default"
"""Shortens rows of a table that are too long, in place: done twice it changes nothing more."""

READ = "bnctl.read.values"
"""Python takes the values of a tensor without an operator."""


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in recorded arguments."""

    value: int


@dataclass(frozen=True)
class Unknown:
    """Stands for an object of some class in recorded arguments."""


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    Args:
        module: what was called; ``path`` is its first name in the model.
        parent: the call it happened in.
        inputs, outputs: values of the tensors that went in and came out.
        start: operators recorded before it.
        args, kwargs, result: what it was given and what it returned, with :class:`Ref` where tensors were.
    """

    module: nn.Module
    path: str | None
    parent: ModuleCall | None
    inputs: list[int]
    outputs: list[int] = field(default_factory=list)
    start: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None

    @property
    def plain(self) -> bool:
        """One tensor went in by position, and one tensor came out."""
        return len(self.args) == 1 and not self.kwargs and all(isinstance(t, Ref) for t in (*self.args, self.result))


@dataclass(frozen=True, eq=False)
class OpCall:
    """One call of an operator. ``args`` and ``kwargs`` hold :class:`Ref` where tensors were; ``writes`` says whether it wrote into one of them.

    ``aside`` says whether it ran in another method of its module than ``forward``, where that was asked for.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    within: ModuleCall
    random: bool = False
    writes: bool = False
    aside: bool = False


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] = field(default=(), compare=False)


@dataclass(eq=False)
class Trace:
    """The record of one forward pass.

    Args:
        ops: operator calls in order.
        modules: module calls in order.
        info: shape and dtype per value.
        parameters: values that are parameters or buffers, with one name per place that holds each: a module that hangs at two paths is one place.
        tensors: the tensors of values that derive from parameters alone.
        numbers: Python's numbers among those, see :mod:`bnctl.engines.torch.numbers`.
        inputs: values of the model's inputs.
        outputs: values of the model's outputs.
        held: values of tensors that outlive the pass.
        viewed: values of which an output is a view.
        overwritten: names of the parameters that the pass wrote into.
        result: what the model returned.
    """

    root: nn.Module
    ops: list[OpCall] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    info: list[TensorInfo] = field(default_factory=list)
    parameters: dict[int, tuple[str, ...]] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    numbers: dict[int, int | float] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    viewed: set[int] = field(default_factory=set)
    overwritten: list[str] = field(default_factory=list)
    result: Any = None


def record(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, methods: bool = False
) -> Trace:
    """Run the model once and record it. The model's mode (train or eval) is left as it is.

    Args:
        model: to be run.
        args, kwargs: its inputs.
        methods: note what runs in another method of a module than ``forward``; values may then live longer than they would.

    Raises:
        Exception: whatever the model raises.
    """
    recorder = _Recorder(model, methods)
    kwargs = dict(kwargs or {})
    recorder.trace.inputs = [recorder.value_of(t) for t in tensors_in((args, kwargs))]
    with (
        young_objects_only(),
        torch.no_grad(),
        layer_by_layer(),
        torch._C._AutoDispatchBelowAutograd(),
        recorder.watching_modules(),
        values_read(recorder.read),
        recorder,
    ):
        result = model(*args, **kwargs)
        recorder.finish(result)
    return recorder.trace


_PLAIN = {int, float, bool, str, type(None)}
"""Types of which objects are recorded as they are."""


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, methods: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.methods = methods
        self.trace = Trace(model)
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.top = ModuleCall(model, None, None, [])
        self.current = self.top
        self.versions = LivingTensors()
        self.stored_over: dict[int | None, list[Tensor]] = {}
        names: dict[int, list[str]] = {}
        self.stored: dict[int, Tensor] = {}
        for name, tensor in _named_tensors(model):
            names.setdefault(id(tensor), []).append(name)
            storage = storage_of(tensor)
            if id(tensor) not in self.stored and storage is not None:
                self.stored_over.setdefault(storage, []).append(tensor)
            self.stored[id(tensor)] = tensor
        self.names = {key: tuple(found) for key, found in names.items()}

    def new_value(self, tensor: Tensor) -> int:
        """Give the tensor a new version."""
        value = len(self.trace.info)
        strides = tensor.stride() if tensor.layout == torch.strided else ()
        self.trace.info.append(TensorInfo(tuple(tensor.shape), tensor.dtype, strides))
        self.versions[tensor] = value
        return value

    def value_of(self, tensor: Tensor) -> int:
        """The tensor's current version; a tensor not seen before is a parameter, an input, or comes from outside."""
        value = self.versions.get(tensor)
        if value is None:
            value = self.new_value(tensor)
            if id(tensor) in self.names:
                self.trace.parameters[value] = self.names[id(tensor)]
                self.trace.tensors[value] = tensor
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read: list[Tensor] = []
        recorded_args, recorded_kwargs = self._with_refs(args, read), self._with_refs(kwargs, read)
        inputs = tuple(self.value_of(t) for t in read)
        operator = operator_of(func)
        result = func(*args, **kwargs)
        written = operator.written(args, kwargs)
        known = {id(t) for t in read}
        returned = tensors_in(result)
        fresh = [t for t in returned if id(t) not in known]
        if returned and not fresh and not written:
            return result  # the operator handed back its input: nothing happened
        changed = list({id(t): t for t in read if id(t) in {id(w) for w in written}}.values()) if written else []
        outputs = tuple(self.new_value(t) for t in (*changed, *fresh))
        call = OpCall(
            operator.name,
            recorded_args,
            recorded_kwargs,
            inputs,
            outputs,
            self.current,
            operator.random,
            bool(changed),
            self.methods and _in_another_method(self.current.module),
        )
        self.trace.ops.append(call)
        if inputs and not call.random and not changed and all(v in self.trace.tensors for v in inputs):
            self.trace.tensors.update(zip(outputs, fresh, strict=True))
        for tensor in changed:
            self._touch_aliases(tensor)
            if call.op != _RENORM:
                self.trace.overwritten += self._parameters_in(tensor)
        return result

    def _parameters_in(self, tensor: Tensor) -> list[str]:
        """Names of the parameters whose memory a tensor is, or is a view of."""
        held = self.stored_over.get(storage_of(tensor), ())
        return [self.names[id(t)][0] for t in held if isinstance(t, nn.Parameter)]

    def _with_refs(self, tree: Any, read: list[Tensor]) -> Any:
        """An operator's arguments with :class:`Ref` for tensors, which are added to `read`, once per read: ``x + x`` reads x twice."""
        if type(tree) in _PLAIN:
            return tree
        if isinstance(tree, Tensor):
            read.append(tree)
            return Ref(self.value_of(tree))
        if isinstance(tree, (tuple, list)):
            return type(tree)([self._with_refs(item, read) for item in tree])
        if isinstance(tree, dict):
            return {key: self._with_refs(item, read) for key, item in tree.items()}
        return tree

    def _structure(self, tree: Any, values: list[int]) -> Any:
        """As :meth:`_with_refs`, for what a module is given or returns: anything may come, and nothing that could hold a tensor is kept. The values of the
        tensors in it are added to `values`, each once.
        """
        kind = type(tree)
        if kind in _PLAIN:
            return tree
        if kind is tuple or kind is list:
            return kind([self._structure(item, values) for item in tree])
        if kind is dict:
            return {key: self._structure(item, values) for key, item in tree.items()}
        values += [v for t in tensors_in(tree) if (v := self.value_of(t)) not in values]
        return Ref(self.value_of(tree)) if isinstance(tree, Tensor) else Unknown()

    def _touch_aliases(self, tensor: Tensor) -> None:
        """Every other living tensor over the written storage becomes a new value that depends on the write."""
        storage = storage_of(tensor)
        if storage is None:
            return
        others = (*self.versions.over(storage), *self.stored_over.get(storage, ()))
        for other in {id(t): t for t in others if t is not tensor}.values():
            inputs = (self.value_of(other), self.value_of(tensor))
            self.trace.ops.append(OpCall(ALIASED_WRITE, (), {}, inputs, (self.new_value(other),), self.current))

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Follow which module is running, without touching the modules themselves."""

        def enter(module: nn.Module, args: Any) -> None:
            path, start = self.paths.get(id(module)), len(self.trace.ops)
            self.current = call = ModuleCall(module, path, self.current, [], start=start)
            call.args = self._structure(args, call.inputs)
            self.trace.modules.append(call)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self.current
            call.result = self._structure(output, call.outputs)
            call.kwargs = self._structure(kwargs, call.inputs)
            self.current = call.parent or self.top

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, with_kwargs=True),  # type: ignore[call-arg, unused-ignore]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, tensor: Tensor) -> None:
        """Python takes the values of a tensor."""
        if self.versions.get(tensor) is not None:
            value = self.value_of(tensor)
            self.trace.ops.append(OpCall(READ, (Ref(value),), {}, (value,), (), self.current))

    def finish(self, result: Any) -> None:
        """Note the outputs, and what else outlives the pass."""
        self.trace.result = result
        outputs = tensors_in(result)
        self.trace.outputs = [self.value_of(t) for t in outputs]
        self.trace.viewed = {self.value_of(t._base) for t in outputs if t._base is not None}
        gc.collect()  # only what the pass has made: see `young_objects_only`
        self.trace.held = {
            v for key, v in self.versions.numbers() if key not in self.names and v not in self.trace.tensors
        } - set(self.trace.inputs)


def _in_another_method(module: nn.Module) -> bool:
    """Whether the code that is running is a method of the module that ``forward`` has called."""
    forward = getattr(type(module).forward, "__code__", None)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is forward or frame.f_code in _CALLING:
            return False
        method = getattr(type(module), frame.f_code.co_name, None)
        if getattr(method, "__code__", None) is frame.f_code and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


_CALLING = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor
