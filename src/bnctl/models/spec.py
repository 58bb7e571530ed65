"""What a MODEL word on the command line means.

    model.onnx                               OnnxWord
    model.pt2                                Pt2Word
    folder/                                  BundleWord
    package.module:callable[@weights]        FactoryWord

Parsing looks at names and at the file system and imports nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bnctl.errors import ModelError, UsageError

BUNDLE_JSON = "bnctl.json"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth")

_FACTORY = re.compile(
    r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<attr>[^\W\d]\w*(?:\.[^\W\d]\w*)*)(?:@(?P<weights>.+))?"
)
_KINDS = "a .onnx or .pt2 file, a bundle folder, or package.module:callable"
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".th")


@dataclass(frozen=True)
class OnnxWord:
    """An ONNX file."""

    word: str
    path: Path


@dataclass(frozen=True)
class Pt2Word:
    """A `torch.export` archive."""

    word: str
    path: Path


@dataclass(frozen=True)
class BundleWord:
    """A folder that bnctl wrote."""

    word: str
    path: Path


@dataclass(frozen=True)
class FactoryWord:
    """A callable that returns an `nn.Module`, and the weights to load into it, if any."""

    word: str
    module: str
    attr: str
    weights: Path | None = None

    @property
    def factory(self) -> str:
        """`package.module:callable`, without the weights."""
        return f"{self.module}:{self.attr}"


ModelWord = OnnxWord | Pt2Word | BundleWord | FactoryWord


def parse_model_word(word: str, *, weights: str | Path | None = None) -> ModelWord:
    """Parse one MODEL word.

    Args:
        word: as given on the command line.
        weights: a weight file for a factory that names none itself; ignored by the other kinds.

    Raises:
        ModelError: a file is missing, is pickled code, or is of a kind that bnctl does not read.
    """
    path = Path(word)
    if path.is_dir():
        return BundleWord(word, _bundle(path))
    if not path.exists() and (match := _FACTORY.fullmatch(word)):
        given = match["weights"] or weights
        return FactoryWord(word, match["module"], match["attr"], None if given is None else _weights(Path(given)))
    match path.suffix.lower():
        case ".onnx":
            return OnnxWord(word, require_file(path))
        case ".pt2":
            return Pt2Word(word, require_file(path))
    raise _not_a_model(path, word)


def parse_model_words(words: Sequence[str], *, weights: str | Path | None = None) -> tuple[ModelWord, ...]:
    """Parse all MODEL words of a command line; `weights` goes to every factory among them that names none.

    Raises:
        UsageError: `weights` is given and no factory is there to take it.
        ModelError: see :func:`parse_model_word`.
    """
    parsed = tuple(parse_model_word(word) for word in words)
    if weights is None:
        return parsed
    takers = [p for p in parsed if isinstance(p, FactoryWord) and p.weights is None]
    if not takers:
        raise UsageError(
            f"--weights {weights}: no model here takes weights",
            hint="--weights goes to factories (package.module:callable) that name no weights of their own",
        )
    path = _weights(Path(weights))
    return tuple(replace(p, weights=path) if isinstance(p, FactoryWord) and p.weights is None else p for p in parsed)


def require_file(path: Path) -> Path:
    """Return `path` if it is a regular file.

    Raises:
        ModelError: there is no such file; names near it are given as a hint.
    """
    if path.is_file():
        return path
    if path.exists():
        raise ModelError(f"{path} is not a regular file", hint="give a file that is not a device, a pipe or a socket")
    raise ModelError(f"{path}: no such file", hint=_near(path) or _KINDS)


def _weights(path: Path) -> Path:
    require_file(path)
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise ModelError(f"{path}: not a weight file that bnctl reads", hint=f"one of {', '.join(WEIGHT_SUFFIXES)}")
    return path


def _bundle(folder: Path) -> Path:
    if not (folder / BUNDLE_JSON).is_file():
        raise ModelError(
            f"{folder} is not a bundle: it holds no {BUNDLE_JSON}",
            hint="give a folder that bnctl wrote, a model file, or package.module:callable",
        )
    return folder


def _not_a_model(path: Path, word: str) -> ModelError:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        return ModelError(
            f"{word}: a pickled model is code, and is not run",
            hint=f"give the factory that builds the model, and the file as its weights: package.module:callable --weights {word}",
        )
    if suffix == ".safetensors":
        return ModelError(
            f"{word}: these are weights without a model", hint=f"name the factory too: package.module:callable@{word}"
        )
    if path.exists():
        return ModelError(
            f"{word}: not a kind of model that bnctl reads",
            hint=_KINDS,
        )
    return ModelError(f"{word}: no such file or folder", hint=_near(path) or _as_factory(word) or _KINDS)


def _as_factory(word: str) -> str | None:
    module, _, attr = word.rpartition(".")
    if module.replace(".", "").isidentifier() and attr.isidentifier():
        return f"a factory is written with a colon: {module}:{attr}"
    return None


def _near(path: Path) -> str | None:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return f"the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return "did you mean " + ", ".join(str(path.parent / name) for name in close) + "?" if close else None
