"""onnx-ir without sympy, until somebody asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ONNX_BN

START = "import sys; import bnctl.engines.onnx.shapes; import onnx_ir; assert 'sympy' not in sys.modules; "
PARSE = "from onnx_ir._symbolic_shapes import parse_symbolic_expression as parse; "


def result(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(onnx_ir.SymbolicDim('n') + 1)", "n + 1"),
        (PARSE + "print(parse('max(n, 2) + floor(n / 2)'))", "floor(n/2) + Max(2, n)"),
        (PARSE + "import sympy; print(isinstance(parse('n'), sympy.Symbol))", "True"),
        ("import sympy.abc; print(onnx_ir._core.sympy.Symbol is sympy.Symbol)", "True"),
    ],
)
def test_arithmetic_with_sizes_is_there_when_it_is_needed(code: str, expected: str) -> None:
    assert result(START + code) == expected


def test_a_command_never_needs_it(tmp_path: Path) -> None:
    words = ["fold", str(ONNX_BN), "-o", str(tmp_path / "out.onnx"), "--quiet"]
    code = f"import sys; from bnctl.cli.app import run; print(run({words!r}), 'sympy' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split()[-2:] == ["0", "False"]


@pytest.mark.parametrize(
    "before",
    [
        "import sympy",
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
    ],
)
def test_nothing_stands_in_for_what_is_there_or_may_come(before: str) -> None:
    code = f"{before}; import bnctl.engines.onnx.shapes, onnx_ir, sympy; print(onnx_ir._core.sympy is sympy)"
    assert result(code) == "True"


def test_a_module_that_takes_more_than_functions_is_imported_as_usual(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pathlib import Path; "
        f"Path({str(tmp_path)!r}, 'needless.py').write_text('class Base: pass'); "
        f"Path({str(tmp_path)!r}, 'user.py').write_text('import needless\\nclass Own(needless.Base): pass'); "
        "from bnctl.engines.onnx.deferred import import_without; import_without('needless', 'user'); "
        "import needless, user; print(issubclass(user.Own, needless.Base))"
    )
    assert result(code) == "True"
