"""Where a torch model comes from: what a bundle records, so that the user's own class can be built again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Origin:
    """The recipe of a torch model: call `factory` with `args`, then apply `edits`.

    Args:
        factory: `"package.module:callable"`.
        args: its keyword arguments; JSON values only.
        edits: structural edits since then, in order, as :func:`bnctl.engines.torch.edits.apply_edits` takes them; JSON only.
        weights: the weight file that was loaded first, if any; for the record, not read again.
        inputs: example inputs as `--input` takes them; empty where unknown.
    """

    factory: str
    args: dict[str, Any] = field(default_factory=dict)
    edits: tuple[dict[str, Any], ...] = ()
    weights: str | None = None
    inputs: tuple[str, ...] = ()

    def edited(self, *edits: dict[str, Any]) -> Origin:
        """The origin of the same model after further edits."""
        return replace(self, edits=(*self.edits, *edits))
