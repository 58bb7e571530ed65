"""`bnctl.json`: the text half of a bundle, read strictly because anybody may have written it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnctl.errors import ModelError
from bnctl.models.origin import Origin

FORMAT = "bnctl-bundle"
FORMAT_VERSION = 1

# Names of parameters and modules: no empty part, so no "..", and nothing that is a path.
_TENSOR_NAME = re.compile(r"[^./\\\x00]+(?:\.[^./\\\x00]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What `bnctl.json` says.

    Args:
        origin: how the module is built.
        state_sha256: hex digest of `model.safetensors`.
        bnctl: version of bnctl that wrote it.
        source: what the model was made from, for the record.
        inputs: example inputs, as `--input` takes them; None where unknown.
        training: mode of the module.
        ties: further names of tensors that are stored once, each with the name it is stored under.
        frozen: names of parameters with `requires_grad=False`.
        buffer_dtypes: dtypes of the buffers that are not in the state dict, such as `"float16"`.
    """

    origin: Origin
    state_sha256: str
    bnctl: str
    source: dict[str, Any] | None = None
    inputs: list[Any] | None = None
    training: bool = False
    ties: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    buffer_dtypes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The document, as UTF-8 text.

        Raises:
            ModelError: an argument or edit is not JSON.
        """
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "bnctl": self.bnctl,
            "factory": self.origin.factory,
            "args": self.origin.args,
            "edits": list(self.origin.edits),
            "weights": self.origin.weights,
            "state_sha256": self.state_sha256,
            "source": self.source,
            "inputs": self.inputs,
            "training": self.training,
            "ties": self.ties,
            "frozen": list(self.frozen),
            "buffer_dtypes": self.buffer_dtypes,
        }
        try:
            text = json.dumps(document, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"a bundle of {self.origin.factory} cannot be written: its arguments or edits are not JSON ({error})",
                hint="give the factory arguments that are JSON values",
            ) from error
        return text + "\n"


def parse_manifest(text: str, path: Path) -> Manifest:
    """Read the document; `path` is named in errors.

    Raises:
        ModelError: it is not JSON, of another format or a newer version, or a field is of the wrong type.
    """
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not JSON: {error}", hint="the bundle is damaged or was edited: write it again with bnctl"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(
            f'{path} is not the manifest of a bundle: its "format" is not "{FORMAT}"',
            hint="the bundle is damaged or was edited: write it again with bnctl",
        )
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path} has format version {version!r}, and this bnctl reads {FORMAT_VERSION}", hint="update bnctl"
        )

    def get(name: str, *kinds: type, default: Any = None) -> Any:
        value = content.get(name, default)
        if not isinstance(value, kinds):
            raise ModelError(
                f'{path}: "{name}" is {type(value).__name__}, not {" or ".join(k.__name__ for k in kinds)}',
                hint="the bundle is damaged or was edited: write it again with bnctl",
            )
        return value

    none = type(None)
    edits, frozen = get("edits", list, default=[]), get("frozen", list, default=[])
    ties, dtypes = get("ties", dict, default={}), get("buffer_dtypes", dict, default={})
    if not all(isinstance(edit, dict) for edit in edits):
        raise ModelError(
            f'{path}: "edits" may hold only objects',
            hint="the bundle is damaged or was edited: write it again with bnctl",
        )
    _check_names([*frozen, *ties, *ties.values(), *dtypes], path)
    digest = get("state_sha256", str)
    if not _SHA256.fullmatch(digest):
        raise ModelError(
            f'{path}: "state_sha256" is not a SHA-256',
            hint="the bundle is damaged or was edited: write it again with bnctl",
        )
    return Manifest(
        origin=Origin(
            get("factory", str),
            get("args", dict, default={}),
            tuple(edits),
            get("weights", str, none),
            tuple(word for word in get("inputs", list, none) or () if isinstance(word, str)),
        ),
        state_sha256=digest,
        bnctl=get("bnctl", str, default=""),
        source=get("source", dict, none),
        inputs=get("inputs", list, none),
        training=get("training", bool, default=False),
        ties=ties,
        frozen=tuple(frozen),
        buffer_dtypes=dtypes,
    )


def _check_names(names: list[Any], path: Path) -> None:
    for name in names:
        if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
            raise ModelError(
                f"{path}: {name!r} is not the name of a tensor",
                hint="the bundle is damaged or was edited: write it again with bnctl",
            )


def _no_constant(name: str) -> Mapping[str, Any]:
    raise ValueError(f"{name} is not JSON")
