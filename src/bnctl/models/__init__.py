"""Models in and out: what a MODEL word means, loading without running foreign code, atomic writing."""

from bnctl.models.model import Model
from bnctl.models.open import open_model
from bnctl.models.origin import Origin

__all__ = ["Model", "Origin", "open_model"]
