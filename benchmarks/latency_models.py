"""Networks with branches, merged by the code that their authors wrote."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def _by_hand(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from bnctl.models.importing import import_module

        import_module("torchvision")
        import timm
        from timm.utils.model import reparameterize_model

        model: nn.Module = reparameterize_model(timm.create_model(name, pretrained=False).eval())
        return model

    return build


repvgg_a0 = _by_hand("repvgg_a0")
mobileone_s0 = _by_hand("mobileone_s0")
fastvit_t8 = _by_hand("fastvit_t8")
repvit_m0_9 = _by_hand("repvit_m0_9")
repghostnet_050 = _by_hand("repghostnet_050")
