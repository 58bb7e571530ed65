"""The graph inside a `.pt2` archive, checked field by field against torch's own schema.

torch does not check the types in this JSON, and many of its strings end up as code: names of values and arguments are written into the
generated `forward`, sizes are evaluated by sympy, guards are executed, a tree specification imports modules, an operator's name is
looked up with `getattr`. So every field must have the type that `torch._export.serde.schema` declares, and every string must be harmless
for the place it goes to. The default is the narrowest kind, an identifier; a field that a newer torch adds is held to that.

The result is written anew from what was checked: unknown fields, guards, stack traces and custom metadata do not come along. Guards only
check inputs, so the program computes the same without them.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from bnctl.errors import ModelError, UntrustedError
from bnctl.models.pt2_expr import check_expression
from bnctl.models.pt2_zip import TRUST_HINT

_IDENTIFIER = re.compile(r"(?:[A-Za-z_]\w*)?", re.ASCII)
# May stand between quotes of either kind in generated code.
_TEXT = re.compile(r"[^'\"\\\x00-\x1f\x7f-\x9f\u2028\u2029]*")
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+", re.ASCII)

_OVERLOAD = re.compile(r"torch\.ops\.(aten|prims|torchvision|quantized_decomposed)\.(\w+)\.(\w+)", re.ASCII)
_HIGHER_ORDER = frozenset(
    f"torch.ops.higher_order.{name}"
    for name in (
        *("cond", "while_loop", "map_impl", "scan", "associative_scan", "invoke_subgraph"),
        *("wrap_with_set_grad_enabled", "wrap_with_autocast"),
    )
)
_ARITHMETIC = frozenset(
    {
        *(
            f"_operator.{name}"
            for name in ("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv")
        ),
        *(
            f"_operator.{name}"
            for name in ("mod", "pow", "truediv", "and_", "or_", "not_", "lshift", "rshift", "getitem")
        ),
        *(f"math.{name}" for name in ("trunc", "ceil", "floor", "sqrt")),
        *(
            f"torch.{name}"
            for name in ("sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sqrt", "sym_sum")
        ),
    }
)
_SEQUENCES = frozenset({"builtins.tuple", "builtins.list"})
_MAPPINGS = frozenset({"builtins.dict", "collections.OrderedDict"})
_FLOAT_WORDS = frozenset({"Infinity", "-Infinity", "NaN"})  # as torch writes what JSON cannot


def clean_document(cls: type, text: bytes, where: str) -> bytes:
    """Check the JSON of a schema class (`ExportedProgram`, `PayloadConfig`) and write it anew.

    Args:
        cls: a dataclass of `torch._export.serde.schema`.
        text: the document.
        where: the file and the entry in it, named in errors.

    Raises:
        ModelError: it is not JSON, or a field has another type than the schema says.
        UntrustedError: a string would do more than name something.
    """
    try:
        return json.dumps(_clean(cls, json.loads(text), where)).encode()
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{where} is not JSON that can be read: {error}",
            hint="the archive is damaged, or of a version that bnctl does not know: write it again with torch.export.save",
        ) from error


def is_identifier(value: object) -> bool:
    """Whether `value` may stand as a name in generated code."""
    return isinstance(value, str) and _IDENTIFIER.fullmatch(value) is not None


def is_text(value: object) -> bool:
    """Whether `value` may stand between quotes in generated code."""
    return isinstance(value, str) and _TEXT.fullmatch(value) is not None


def _clean(kind: Any, data: Any, where: str, check: Callable[[str, str], None] | None = None) -> Any:
    """`data` as far as the type `kind` knows it; `check` takes every string in it (keys of mappings included)."""
    check = check or _check_identifier
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        present = next(a for a in arguments if a is not types.NoneType)
        return None if data is None else _clean(present, data, where, check)
    if origin is list:
        return [_clean(arguments[0], item, f"{where}[{i}]", check) for i, item in enumerate(_typed(data, list, where))]
    if origin is dict:
        for name in _typed(data, dict, where):
            check(name, where)
        return {name: _clean(arguments[1], item, f"{where}.{name}", check) for name, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _clean_object(typing.cast("type", kind), _typed(data, dict, where), where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(_typed(data, int, where)).value
    if kind is str:
        check(_typed(data, str, where), where)
        return data
    if kind is float:
        return data if data in _FLOAT_WORDS else _typed(data, (int, float), where)
    return _typed(data, kind, where)


def _clean_object(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints, union = _fields(cls)
    if union and (len(data) != 1 or next(iter(data)) not in hints):
        raise ModelError(
            f"{where}: {sorted(data)} is not one of the cases of {cls.__name__}",
            hint="the archive is damaged, or of a version that bnctl does not know: write it again with torch.export.save",
        )
    cleaned: dict[str, Any] = {}
    for name, value in data.items():
        place = f"{where}.{name}"
        if (cls.__name__, name) in _REFUSED and value:
            raise UntrustedError(f"{place}: {_REFUSED[cls.__name__, name]}", hint=TRUST_HINT)
        if (cls.__name__, name) == ("Graph", "inputs"):
            _check_constants(value, place)
        if name in hints and (cls.__name__, name) not in _LEFT_OUT:
            cleaned[name] = _clean(hints[name], value, place, _STRINGS.get((cls.__name__, name)))
    if (cls.__name__, "metadata") in _LEFT_OUT:
        cleaned["metadata"] = _harmless(data.get("metadata"))
    return cleaned


def _check_constants(inputs: Any, where: str) -> None:
    """A string that is an input of the program is compared with in its guards, and is written there without `repr`."""
    for i, argument in enumerate(_typed(inputs, list, where)):
        if isinstance(argument, dict) and isinstance(text := argument.get("as_string"), str):
            _check_text(text, f"{where}[{i}]")


@functools.cache
def _fields(cls: type) -> tuple[dict[str, Any], bool]:
    """Types of the fields of a schema class, and whether it is a union (exactly one field is given)."""
    from torch._export.serde import schema
    from torch._export.serde.union import _Union

    hints = typing.get_type_hints(cls, globalns=vars(schema))
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}, issubclass(cls, _Union)


def _typed(data: Any, kind: type | tuple[type, ...], where: str) -> Any:
    # A bool is an int in Python, and not here.
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise ModelError(
            f"{where} is a {type(data).__name__}, which the format does not have there",
            hint="the archive is damaged, or of a version that bnctl does not know: write it again with torch.export.save",
        )
    return data


def _harmless(metadata: object) -> dict[str, str]:
    """Of a node's metadata, where it stood in the module tree; engines name layers by it."""
    kept = metadata if isinstance(metadata, dict) else {}
    return {name: kept[name] for name in ("nn_module_stack", "torch_fn") if is_text(kept.get(name))}


def _check_nothing(text: str, where: str) -> None:
    """Arguments of operators are written into code by `repr`, which quotes whatever they hold."""


def _check_identifier(text: str, where: str) -> None:
    if not is_identifier(text):
        raise UntrustedError(f"{where}: {text[:60]!r} is not a name, and would be written into code", hint=TRUST_HINT)


def _check_text(text: str, where: str) -> None:
    if not is_text(text):
        raise UntrustedError(f"{where}: {text[:60]!r} could end the string it is written into as code", hint=TRUST_HINT)


def _check_payload(text: str, where: str) -> None:
    if not _PAYLOAD.fullmatch(text):
        raise UntrustedError(f"{where}: {text[:60]!r} is not a plain tensor file", hint=TRUST_HINT)


def _check_operator(text: str, where: str) -> None:
    if text in _ARITHMETIC or text in _HIGHER_ORDER:
        return
    match = _OVERLOAD.fullmatch(text)
    if match is None:
        raise UntrustedError(
            f"{where}: {text[:80]!r} is not an operator that bnctl knows to be harmless", hint=TRUST_HINT
        )
    import torch

    namespace, name, overload = match.groups()
    operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(operator, torch._ops.OpOverload):
        raise ModelError(f"{where}: this torch has no operator {text}", hint="use the torch that wrote the file")
    if any(argument.name == "filename" for argument in operator._schema.arguments):
        raise UntrustedError(f"{where}: {text} opens a file", hint=TRUST_HINT)


def _check_tree(text: str, where: str, *, keys: Callable[[object], bool]) -> None:
    """A tree of tuples, lists and dicts; anything else is built by importing what the text names."""
    content = json.loads(text)
    if not isinstance(content, list) or len(content) != 2 or content[0] != 1:
        raise UntrustedError(f"{where} is not a tree specification that bnctl knows", hint=TRUST_HINT)
    _check_branch(content[1], where, keys)


def _check_branch(node: Any, where: str, keys: Callable[[object], bool]) -> None:
    if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        raise ModelError(
            f"{where} is not a tree specification",
            hint="the archive is damaged, or of a version that bnctl does not know: write it again with torch.export.save",
        )
    kind, context, children = node["type"], node["context"], _typed(node["children_spec"], list, where)
    if kind is None:
        harmless = context is None and not children
    elif kind in _SEQUENCES:
        harmless = context == "null"
    elif kind in _MAPPINGS and isinstance(context, str):
        names = json.loads(context)
        harmless = isinstance(names, list) and all(type(name) is int or keys(name) for name in names)
    else:
        harmless = False
    if not harmless:
        raise UntrustedError(
            f"{where}: a {kind} with {str(context)[:60]!r} is not a plain tuple, list or dict", hint=TRUST_HINT
        )
    for child in children:
        _check_branch(child, where, keys)


# Strings that are something else than a name, by class and field.
_STRINGS: dict[tuple[str, str], Callable[[str, str], None]] = {
    ("SymExpr", "expr_str"): check_expression,
    ("Node", "target"): _check_operator,
    ("Argument", "as_operator"): _check_operator,
    ("Argument", "as_string"): _check_nothing,
    ("Argument", "as_strings"): _check_nothing,
    ("ConstantValue", "as_string"): _check_text,
    ("InputToParameterSpec", "parameter_name"): _check_text,
    ("InputToBufferSpec", "buffer_name"): _check_text,
    ("InputToTensorConstantSpec", "tensor_constant_name"): _check_text,
    ("BufferMutationSpec", "buffer_name"): _check_text,
    ("ParameterMutationSpec", "parameter_name"): _check_text,
    ("GradientToParameterSpec", "parameter_name"): _check_text,
    ("ModuleCallEntry", "fqn"): _check_text,
    # Its keys become the names of keyword arguments.
    ("ModuleCallSignature", "in_spec"): functools.partial(_check_tree, keys=is_identifier),
    ("ModuleCallSignature", "out_spec"): functools.partial(_check_tree, keys=is_text),
    ("GraphModule", "treespec_namedtuple_fields"): _check_text,
    ("ExportedProgram", "torch_version"): _check_text,
    ("ExportedProgram", "range_constraints"): _check_text,
    ("PayloadConfig", "config"): _check_text,
    ("PayloadMeta", "path_name"): _check_payload,
}
_LEFT_OUT = frozenset({("ExportedProgram", "guards_code"), ("GraphModule", "metadata"), ("Node", "metadata")})
_REFUSED = {
    ("PayloadMeta", "use_pickle"): "a pickled tensor runs code when it is loaded",
    ("Argument", "as_custom_obj"): "custom objects are pickled",
    ("InputSpec", "custom_obj"): "custom objects are pickled",
    ("Graph", "custom_obj_values"): "custom objects are pickled",
}
