"""The table from torch operators to the vocabulary of the normalised graph: one small entry per operator, one file per kind."""

from bnctl.engines.torch.translate import elementwise, linear, norms, selections, shapes, windows
from bnctl.engines.torch.translate.table import Operands, Translated, translate

__all__ = [
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
