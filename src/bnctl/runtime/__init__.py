"""Running a model, whatever it is, on a batch."""

from bnctl.runtime.runner import Runner, open_runner
from bnctl.runtime.trace import Trace, first_divergence

__all__ = ["Runner", "Trace", "first_divergence", "open_runner"]
