"""The table from torch operators to the vocabulary of the normalised graph: one small entry per operator, one file per kind."""

from bnctl.engines.torch.translate import elementwise, linear, norms, selections, shapes, windows
from bnctl.engines.torch.translate.table import PARAMETER_ARGUMENTS, Operands, Translated, translate

__all__ = [
    "PARAMETER_ARGUMENTS",
    "Operands",
    "Translated",
    "elementwise",
    "linear",
    "norms",
    "selections",
    "shapes",
    "translate",
    "windows",
]
