"""Where a convolution looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Per spatial axis, tap j of output o reads input ``stride * o - before + dilation * j``; zeros lie outside.

    Args:
        stride, dilation: one number per axis.
        before, after: zeros on each side.
    """

    stride: Sizes
    dilation: Sizes
    before: Sizes
    after: Sizes

    @classmethod
    def single(cls, spatial: int) -> Window:
        """That of an operator on single positions."""
        return cls((1,) * spatial, (1,) * spatial, (0,) * spatial, (0,) * spatial)

    def joined(self, kernel: Sizes, other: Window, other_kernel: Sizes) -> tuple[Window, Sizes] | None:
        """The smallest window that contains both, and its kernel; None where no single convolution has the taps of both and the outputs of either."""
        axes = zip(self._axes(kernel), other._axes(other_kernel), strict=True)
        joined = [_join(one, two) for one, two in axes]
        if any(axis is None for axis in joined):
            return None
        stride, dilation, before, after, taps = zip(*(axis for axis in joined if axis is not None), strict=True)
        return Window(stride, dilation, before, after), taps

    def _axes(self, kernel: Sizes) -> Sequence[tuple[int, int, int, int, int]]:
        return list(zip(self.stride, self.dilation, self.before, self.after, kernel, strict=True))


_Axis = tuple[int, int, int, int, int]


def _join(one: _Axis, two: _Axis) -> _Axis | None:
    (stride, d1, before1, after1, taps1), (stride2, d2, before2, after2, taps2) = one, two
    dilation = d2 if taps1 == 1 else d1
    before = max(before1, before2)
    if (
        stride != stride2
        or (taps1 > 1 and taps2 > 1 and d1 != d2)
        or (before - before1) % dilation
        or (before - before2) % dilation
    ):
        return None
    reach1, reach2 = dilation * (taps1 - 1) - before1, dilation * (taps2 - 1) - before2
    reach = max(reach1, reach2)
    after = after1 - reach1 + reach  # as many outputs as before
    if after != after2 - reach2 + reach or after < 0 or (before + reach) % dilation:
        return None
    return stride, dilation, before, after, (before + reach) // dilation + 1
