"""torch modules, run as they are: in eval mode, without gradients, and put back afterwards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from bnctl.errors import ModelError, UsageError
from bnctl.runtime.runner import Prepared
from bnctl.runtime.tensors import as_tensors, hint_of
from bnctl.runtime.trace import Trace

if TYPE_CHECKING:
    from bnctl.data.batches import Batch

_COARSE_FIRST = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


class TorchRunner:
    """An ``nn.Module`` in eval mode, without gradients.

    The mode of every submodule is put back after each run, also when the run raises. Arrays become tensors; a float
    array takes the type of the module's first float parameter, tensors of the user stay as they are. ``device`` other
    than where the module lives moves the module, as ``module.to`` does.

    Args:
        module: the model.
        device: "cpu", "cuda", "cuda:1", ...
        name: what to call it in errors; by default its class.

    Raises:
        UsageError: torch has no such device here.
    """

    kind: Literal["onnx", "torch"] = "torch"

    def __init__(self, module: torch.nn.Module, *, device: str = "cpu", name: str | None = None) -> None:
        self._name = name or type(module).__name__
        try:
            self._device = torch.device(device)
            self._module = module.to(self._device)
        except (RuntimeError, AssertionError) as error:  # builds without CUDA assert
            raise UsageError(f"torch cannot use device {device!r}: {error}", hint="use --device cpu") from error

    @property
    def precision(self) -> str:
        """The coarsest float type among parameters and buffers."""
        types = {t.dtype for t in (*self._module.parameters(), *self._module.buffers())}
        return next((name for dtype, name in _COARSE_FIRST.items() if dtype in types), "float32")

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Outputs by path: "out" for a single tensor, else "0", "boxes", "0.scores". See :class:`Runner`."""
        return self.observe(batch, ())[0]

    def observe(self, batch: Batch, layers: Collection[str]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Outputs, and tensors that submodules return, by module path; the second call of a module is ``path#2``."""
        found: dict[str, NDArray[Any]] = {}

        def keep(name: str, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                calls = sum(key.partition("#")[0] == name for key in found)
                found[f"{name}#{calls + 1}" if calls else name] = to_numpy(output)

        modules = dict(self._module.named_modules())
        handles = [
            modules[name].register_forward_hook(lambda module, args, output, n=name: keep(n, output))
            for name in layers
            if name in modules and not isinstance(modules[name], torch.jit.ScriptModule)  # which refuse hooks
        ]
        try:
            with self.prepared(batch) as call:
                outputs = dict(named_values(call()))
        finally:
            for handle in handles:
                handle.remove()
        if not outputs:
            raise ModelError(f"{self._name} returns no tensor", hint="bnctl compares tensors")
        return {name or "out": to_numpy(value) for name, value in outputs.items()}, found

    def trace(self, batch: Batch) -> Trace:
        """Tensors that submodules return, in order of execution, with what each was computed from; names as in :meth:`observe`."""
        with self.prepared(batch) as call, _recording(self._module) as recorder:
            output = call()
        sources = recorder.sources(value for _, value in named_values(output))
        return Trace(recorder.values, recorder.parents, tuple(sources))

    def in_float64(self) -> TorchRunner | None:
        """A copy of the module in float64; None where it cannot be copied."""
        module = self._copy()
        try:
            return None if module is None else _Float64Runner(module.double(), device=str(self._device))
        except Exception:  # quantised parts have no other type
            return None

    def snapshot(self) -> Callable[[], None]:
        """Buffers and plain attributes of all modules as they are now, to be put back by a call."""
        from bnctl.engines.torch.state import snapshot

        return snapshot(self._module)

    def perturbed(self, step: float) -> TorchRunner | None:
        """A copy in which every float parameter and buffer is `step` larger or smaller, relative to itself; None where it cannot be copied."""
        module = self._copy()
        if module is None:
            return None
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
                    tensor.mul_(1 + step * signs)
        return TorchRunner(module, device=str(self._device))

    def _copy(self) -> torch.nn.Module | None:
        from bnctl.engines.torch.copies import copied

        try:
            return copied(self._module, self._name)
        except ModelError:  # modules may hold what cannot be copied
            return None

    @contextmanager
    def prepared(self, batch: Batch) -> Iterator[Prepared]:
        """A call that runs the module on tensors made beforehand, and on a GPU waits for the result."""
        args, kwargs = as_tensors(batch, self._module, self._device)
        state = _state_of((args, kwargs))

        def renew() -> None:
            nonlocal args, kwargs, state
            if _state_of((args, kwargs)) != state:
                args, kwargs = as_tensors(batch, self._module, self._device)
                state = _state_of((args, kwargs))

        def call() -> object:
            try:
                output = self._module(*args, **kwargs)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
            except SystemExit as error:
                raise ModelError(
                    f"the forward of {self._name} calls sys.exit({error.code!r})", hint="take it out"
                ) from error
            except Exception as error:  # whatever the user's code raises
                raise ModelError(
                    f"{self._name} fails on inputs {_shapes(args, kwargs)}: {type(error).__name__}: {error}",
                    hint=hint_of(error, "check the inputs that the model's forward takes (--input, --data)"),
                ) from error
            return output

        with evaluating(self._module), torch.no_grad():
            yield Prepared(call, renew)


class _Float64Runner(TorchRunner):
    @contextmanager
    def prepared(self, batch: Batch) -> Iterator[Prepared]:
        def widen(value: Any) -> Any:
            return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        args, kwargs = pytree.tree_map(widen, (tuple(batch.args), dict(batch.kwargs)))
        with super().prepared(dataclasses.replace(batch, args=args, kwargs=kwargs)) as call:
            yield call


def _state_of(inputs: Any) -> list[Any]:
    """What changes when a model writes into its inputs: versions and sizes of tensors, and what containers hold."""
    leaves = pytree.tree_leaves(inputs)
    return [(id(x), x._version, x.shape) if isinstance(x, torch.Tensor) and not x.is_inference() else x for x in leaves]


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a while, then every submodule's own mode again.

    The flags are set directly: ``train()`` and ``eval()`` may be overridden with side effects, and exported programs
    refuse them.
    """
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for m, training in modes:
            m.training = training


def named_values(output: Any) -> Iterator[tuple[str, Any]]:
    """Tensors, arrays and numbers in a nested output, with their paths ("" for the output itself).

    Sequences, mappings, dataclasses and whatever is registered with torch's pytrees are looked into, and of other objects (a distribution) the tensors among
    their attributes are taken.
    """
    for path, leaf in pytree.tree_leaves_with_path(output):
        name = ".".join(_key(entry) for entry in path)
        if isinstance(leaf, (torch.Tensor, np.ndarray, np.generic, int, float, complex)):
            yield name, leaf
            continue
        if _is_dataclass(leaf):
            inner: Any = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
        elif isinstance(leaf, Mapping):
            inner = dict(leaf)
        else:
            attributes = getattr(leaf, "__dict__", {})
            inner = {key: part for key, part in attributes.items() if isinstance(part, torch.Tensor)}
        yield from (
            ((f"{name}.{rest}" if name and rest else name or rest), value) for rest, value in named_values(inner)
        )


def to_numpy(value: Any) -> NDArray[Any]:
    """A copy as numpy array; bfloat16, which numpy lacks, becomes float32."""
    if not isinstance(value, torch.Tensor):
        return np.array(value)
    value = value.detach().to_dense()
    dtype = torch.float32 if value.dtype == torch.bfloat16 else value.dtype
    array: NDArray[Any] = value.to("cpu", dtype, copy=True).numpy()
    return array


class _Recorder(TorchDispatchMode):
    """Follows tensors from module to module: each tensor remembers the layers that it was computed from."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: dict[str, NDArray[Any]] = {}
        self.parents: dict[str, tuple[str, ...]] = {}
        self._names = {id(m): name for name, m in module.named_modules() if m is not module}
        self._calls: Counter[str] = Counter()
        # Dictionaries as ordered sets: the order of execution is kept.
        self._sources: Any = WeakTensorKeyDictionary()

    def sources(self, values: Any) -> dict[str, None]:
        """The layers that some tensors were computed from."""
        found: dict[str, None] = {}
        for value in values:
            if isinstance(value, torch.Tensor):
                found |= self._sources.get(value, {})
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sources = self.sources(pytree.tree_leaves((args, kwargs)))
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                # An in-place operation returns its input, perhaps a view of the tensor that is read later.
                for target in (tensor,) if tensor._base is None else (tensor, tensor._base):
                    self._sources[target] = self._sources.get(target, {}) | sources
        return output

    def on_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook: a module returned."""
        path = self._names.get(id(module))
        if path is None:
            return
        self._calls[path] += 1
        name = path if self._calls[path] == 1 else f"{path}#{self._calls[path]}"
        for rest, value in named_values(output):
            if isinstance(value, torch.Tensor):
                layer = f"{name}.{rest}" if rest else name
                self.parents[layer] = tuple(self.sources([value]))
                # A copy: an in-place operation may follow.
                self.values[layer] = to_numpy(value)
                self._sources[value] = {layer: None}


@contextmanager
def _recording(module: torch.nn.Module) -> Iterator[_Recorder]:
    recorder = _Recorder(module)
    handle = torch.nn.modules.module.register_module_forward_hook(recorder.on_forward)
    try:
        with recorder:
            yield recorder
    finally:
        handle.remove()


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def describe(value: Any) -> str:
        return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__

    parts = [describe(leaf) for leaf in pytree.tree_leaves((args, kwargs))]
    return f"({', '.join(parts)})"
