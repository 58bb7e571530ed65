"""ONNX models, run by ONNX Runtime."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import ModelError, UsageError
from bnctl.runtime import arena, onnx_source
from bnctl.runtime.feeds import InputSpec, dtype_of, match_inputs
from bnctl.runtime.onnx_source import OnnxSource
from bnctl.runtime.runner import Prepared
from bnctl.runtime.trace import Trace

if TYPE_CHECKING:
    import onnxruntime

    from bnctl.data.batches import Batch

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_FATAL_ONLY = 4
"""What goes wrong is raised; some inputs are tried to see whether the model takes them."""


class OrtRunner:
    """An ONNX model in an ONNX Runtime session.

    The runtime's graph optimisations are off unless asked for: it rewrites BN itself, and not always exactly, so that
    a comparison with them on says little about the model in the file. Its threads never spin: a spinning pool of one
    session takes the core from another.

    Args:
        model: a path (external data beside it), a serialised model or an ``onnx_ir.Model``.
        optimised: all graph optimisations on.
        threads: intra-op threads.
        device: "cpu" or "cuda".
        name: what to call the model in errors.
        shared_arena: take memory from the arena of :func:`bnctl.runtime.arena.shared_arena`.

    Raises:
        ModelError: the runtime cannot load the model.
        UsageError: this build of the runtime does not know the device.
    """

    kind: Literal["onnx", "torch"] = "onnx"

    def __init__(
        self,
        model: OnnxSource,
        *,
        optimised: bool = False,
        threads: int = 1,
        device: str = "cpu",
        name: str | None = None,
        shared_arena: bool = False,
    ) -> None:
        self.name = name or (str(model) if isinstance(model, (str, Path)) else "the ONNX model")
        self._source = model
        self._threads = threads
        self._device = device
        self._shared_arena = shared_arena
        self._shared: dict[str, onnxruntime.OrtValue] = {}  # weights that the sessions read; they must live as long
        self._session = self._open(model, optimised=optimised)
        self._required = [_spec(i) for i in self._session.get_inputs()]
        self._optional = [_spec(i) for i in self._session.get_overridable_initializers()]

    @cached_property
    def precision(self) -> str:
        """The coarsest float type among the weights."""
        return onnx_source.precision(self._source)

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Outputs by name, in the model's order. See :meth:`bnctl.runtime.Runner.run`."""
        return self._copied(self._run(self._session, self._feeds(batch)))

    def run_values(self, values: Mapping[str, onnxruntime.OrtValue]) -> dict[str, onnxruntime.OrtValue]:
        """Like :meth:`run`, on values in the runtime's own memory, and giving such: nothing is copied.

        Args:
            values: the inputs, and any others.
        """
        feeds = {spec.name: values[spec.name] for spec in self._required}
        return self._run(self._session, feeds)

    def observe(self, batch: Batch, layers: Collection[str]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Outputs, and values inside the graph by name; values inside subgraphs and functions are not seen."""
        if not layers:
            return self.run(batch), {}
        names = [output.name for output in self._session.get_outputs()]
        values = self._run(self._open(self._source, optimised=False, exposed=layers), self._feeds(batch))
        inner = {name: array for name in layers if name in values and (array := view(values[name])) is not None}
        return self._copied({name: values[name] for name in names}), inner

    def in_float64(self) -> None:
        """ONNX Runtime has no float64 kernels for many operators, Conv among them."""

    def snapshot(self) -> Callable[[], None]:
        """A session has no state."""
        return lambda: None

    def perturbed(self, step: float) -> None:
        """Of use beside a float64 model only."""

    def trace(self, batch: Batch) -> Trace:
        """Values inside the graph by name, in topological order, with what each was computed from."""
        exposed = onnx_source.expose(self._source)
        values = self._run(self._open(exposed.model, optimised=False), self._feeds(batch))
        inner = {name: array for name in exposed.parents if (array := view(values[name])) is not None}
        return Trace(inner, exposed.parents, exposed.outputs)

    @contextmanager
    def prepared(self, batch: Batch) -> Iterator[Prepared]:
        """A call that runs the session on inputs that are converted already; outputs stay in the runtime's memory."""
        feeds = self._feeds(batch)

        def call() -> object:
            try:
                return self._session.run_with_ort_values(None, feeds)
            except Exception as error:  # the runtime's errors share no base class
                raise self._fails(feeds, error) from error

        yield Prepared(call)

    def _feeds(self, batch: Batch) -> dict[str, onnxruntime.OrtValue]:
        arrays = match_inputs(batch, self._required, self._optional, self.name)
        return {name: from_array(array, self._device) for name, array in arrays.items()}

    def _run(
        self, session: onnxruntime.InferenceSession, feeds: dict[str, onnxruntime.OrtValue]
    ) -> dict[str, onnxruntime.OrtValue]:
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run_with_ort_values(names, feeds), strict=True))
        except Exception as error:  # the runtime's errors share no base class
            raise self._fails(feeds, error) from error

    def _fails(self, feeds: Mapping[str, onnxruntime.OrtValue], error: Exception) -> ModelError:
        shapes = {name: value.shape() for name, value in feeds.items()}
        return ModelError(
            f"{self.name} fails on inputs of shape {shapes}: {_first_line(error)}",
            hint="check that the model takes inputs of this shape (a batch size may be fixed inside it)",
        )

    def _copied(self, values: Mapping[str, onnxruntime.OrtValue]) -> dict[str, NDArray[Any]]:
        """Outputs as arrays of their own: an output may share its memory with an input, or with the session."""
        found: dict[str, NDArray[Any]] = {}
        for name, value in values.items():
            array = view(value)
            if array is None:
                raise ModelError(
                    f"{self.name}: output {name!r} is not a tensor",
                    hint="bnctl compares tensors only; bnctl fold --no-verify compares nothing",
                )
            found[name] = np.array(array)
        return found

    def _open(
        self, model: OnnxSource, *, optimised: bool, exposed: Collection[str] = ()
    ) -> onnxruntime.InferenceSession:
        import onnxruntime

        provider = _PROVIDERS.get(self._device)
        if provider not in onnxruntime.get_available_providers():
            raise UsageError(
                f"ONNX Runtime has no device {self._device!r} here",
                hint="use --device cpu, or install a build of onnxruntime for that device",
            )
        options = onnxruntime.SessionOptions()
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = _FATAL_ONLY
        if self._shared_arena:
            options.add_session_config_entry(*arena.ENTRY)
        try:
            with onnx_source.loadable(model, shared=not optimised, exposed=exposed) as (source, weights):
                for name, tensor in weights.items():
                    if name not in self._shared:
                        self._shared[name] = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
                    options.add_initializer(name, self._shared[name])
                return onnxruntime.InferenceSession(source, options, providers=[provider])
        except Exception as error:  # the runtime's errors share no base class
            raise ModelError(
                f"ONNX Runtime cannot load {self.name}: {_first_line(error)}",
                hint="is the file whole, and does this onnxruntime know its opset and types? Not all operators are there in float64 and bfloat16; "
                "bnctl fold --no-verify runs nothing",
            ) from error


def _spec(node: Any) -> InputSpec:
    return InputSpec(node.name, dtype_of(node.type), tuple(node.shape))


def from_array(array: NDArray[Any], device: str = "cpu") -> onnxruntime.OrtValue:
    """An array as the runtime holds it; on the CPU, in the array's own memory."""
    from onnxruntime import OrtValue

    if array.dtype.name == "bfloat16":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array, device, 0)


def view(value: onnxruntime.OrtValue) -> NDArray[Any] | None:
    """A tensor as an array in the runtime's memory; None for what is no tensor. bfloat16 becomes float32."""
    if not (value.has_value() and value.is_tensor()):
        return None
    if value.element_type() != _BFLOAT16:
        return value.numpy()  # type: ignore[no-any-return]
    shape = value.shape()
    upper = np.frombuffer((ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr()), np.uint16)
    return (upper.astype(np.uint32) << 16).view(np.float32).reshape(shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
