"""The fixture: real images and two small trained nets, in the repository under `fixtures/` and in the wheel.

As models on the command line, `bnctl.fixture:plain@digits_plain.safetensors` and `bnctl.fixture:with_bn@digits_bn.safetensors`.
Importing this module does not import torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.errors import InputError

if TYPE_CHECKING:
    from bnctl.fixture_nets import DigitsBN, PlainDigits

__all__ = ["DigitsBN", "PlainDigits", "fixture_path", "plain", "with_bn"]

_HERE = Path(__file__).resolve()
# In a wheel beside this file, in the repository at its root.
_FOLDERS = (_HERE.parent / "fixtures", _HERE.parents[2] / "fixtures")
_MARK = "digits_bn.onnx"  # the root of a site-packages may have a `fixtures` folder of its own


def plain() -> PlainDigits:
    """The net without normalisation, with random weights; those of `digits_plain.safetensors` fit."""
    from bnctl.fixture_nets import PlainDigits

    return PlainDigits()


def with_bn() -> DigitsBN:
    """The net with BN, with random weights; those of `digits_bn.safetensors` fit."""
    from bnctl.fixture_nets import DigitsBN

    return DigitsBN()


def fixture_path(name: str) -> Path:
    """Where a file of the fixture lies.

    Args:
        name: such as "digits_bn.onnx", "digits_plain.safetensors", "test.npz".

    Raises:
        InputError: there is no such file, or the fixture is not installed.
    """
    folder = next((folder for folder in _FOLDERS if (folder / _MARK).is_file()), None)
    if folder is None:
        raise InputError("the fixture is not installed", hint="in a checkout, make it: python fixtures/build.py")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if name not in names:
        raise InputError(
            f"the fixture has no file {name!r}",
            hint=f"one of {', '.join(difflib.get_close_matches(name, names) or names)}",
        )
    return folder / name


def __getattr__(name: str) -> Any:
    if name in ("DigitsBN", "PlainDigits"):
        from bnctl import fixture_nets

        return getattr(fixture_nets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
