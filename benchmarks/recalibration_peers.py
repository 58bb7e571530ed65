"""The methods that are compared, each called as its manual says."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec

import torch
from recalibration_truth import norms
from torch import nn

Method = Callable[[nn.Module, Sequence[torch.Tensor]], nn.Module]
"""Takes a model in eval mode, which it may change, and batches; returns the recalibrated model."""


def ours(method: str) -> Method:
    """``bnctl.recalibrate``."""

    def run(model: nn.Module, batches: Sequence[torch.Tensor]) -> nn.Module:
        import bnctl

        return bnctl.recalibrate(model, batches, method=method).model

    return run


def fvcore(model: nn.Module, batches: Sequence[torch.Tensor]) -> nn.Module:
    """``update_bn_stats``: puts no layer into train mode, the caller has to; only the BatchNorms, or dropout would be on."""
    from fvcore.nn.precise_bn import update_bn_stats

    for layer in norms(model).values():
        layer.train()
    update_bn_stats(model, batches, num_iters=len(batches))
    return model.eval()


@torch.no_grad()
def swa(model: nn.Module, batches: Sequence[torch.Tensor]) -> nn.Module:
    """``torch.optim.swa_utils.update_bn``."""
    from torch.optim.swa_utils import update_bn

    update_bn(batches, model)
    return model


def aimet(model: nn.Module, batches: Sequence[torch.Tensor]) -> nn.Module:
    """``reestimate_bn_stats``; its progress bar is not shown."""
    from bnctl.models.importing import import_module

    import_module("torchvision")  # AIMET imports it, and beside a torch for CPU it needs help
    from aimet_torch.bn_reestimation import reestimate_bn_stats

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        reestimate_bn_stats(model, batches, num_batches=len(batches))
    return model


METHODS: dict[str, Method] = {
    "bnctl exact": ours("exact"),
    "bnctl batch": ours("batch"),
    "bnctl ema": ours("ema"),
    "fvcore": fvcore,
    "torch update_bn": swa,
    "AIMET": aimet,
}
PACKAGES = {"fvcore": "fvcore", "AIMET": "aimet_torch"}


def installed() -> list[str]:
    """Names of the methods that can be run here."""
    return [name for name in METHODS if name not in PACKAGES or find_spec(PACKAGES[name])]


def versions() -> str:
    """Versions of what is compared."""
    packages = ["torch", *(PACKAGES[name].replace("_", "-") for name in installed() if name in PACKAGES)]
    return ", ".join(f"{package} {version(package)}" for package in packages)
