"""Equations of ``einsum`` that say what a linear layer does."""

from __future__ import annotations

from bnctl.graph.ops import Linear, WeightLayout


def contraction(equation: str, stored: int) -> Linear | None:
    """The linear operator that an equation over a value and a stored matrix describes: ``bnc,cd->bnd``, ``oi,bil->bol``, ``...c,dc->...d``.

    The matrix has one axis in common with the value, and gives its other one to the result in the same place; None for any other equation.

    Args:
        equation: explicit or implicit, of two terms.
        stored: the position of the matrix among them.
    """
    terms, arrow, result = equation.replace(" ", "").replace("...", ".").partition("->")
    factors = terms.split(",")
    if len(factors) != 2:
        return None
    matrix, value = factors[stored], factors[1 - stored]
    inner, outer = set(matrix) & set(value), set(matrix) - set(value)
    if len(matrix) != 2 or "." in matrix or len(inner) != 1 or len(outer) != 1 or len(set(value)) != len(value):
        return None
    (channel,), (new,) = inner, outer
    if not arrow:  # all letters that occur once, in the order of the alphabet, behind what the dots stand for
        result = "".join(sorted(c for c in value + matrix if (value + matrix).count(c) == 1))
    _, _, behind = value.partition(channel)
    if "." in behind or result != value.replace(channel, new):
        return None
    return Linear(WeightLayout(out_first=matrix[0] == new), spatial=len(behind))
