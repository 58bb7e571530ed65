"""Choose the zoo by rule, and write the list.

    python benchmarks/zoo_choose.py > benchmarks/zoo_models.txt

Of timm, the two smallest models with BatchNorm of every module file, and the smallest of every name within it (``byobnet`` holds RepVGG, MobileOne and
others); of torchvision, the two smallest of every file of classification, video and optical flow, and every segmentation and detection model. Size is the
number of parameters; what timm made for its own tests (``test_*``) and torchvision's quantised copies are no architectures.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from zoo_count import is_norm
from zoo_models import create

from bnctl.models.importing import import_module


def timm_names() -> Iterator[tuple[str, str]]:
    """Names of timm models, each with its file."""
    from timm.models import list_models, list_modules

    for module in list_modules():
        for name in list_models(module=module, pretrained=False):
            if not name.startswith("test_"):
                yield f"timm:{name}", module


def torchvision_names() -> Iterator[tuple[str, str]]:
    """Names of torchvision models, each with its file."""
    from torchvision.models import get_model_builder, list_models

    for name in list_models():
        file = get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if not file.startswith("quantization"):
            yield f"torchvision:{name}", file


def sizes(words: Iterable[tuple[str, str]]) -> Iterator[tuple[int, str, str]]:
    """Parameters, word and file of every model with a BatchNorm."""
    for word, file in words:
        try:
            with torch.device("meta"):
                model = create(word)
        except NotImplementedError:  # a RegNet computes its widths with tensors
            model = create(word)
        if any(is_norm(module) for module in model.modules()):
            yield sum(p.numel() for p in model.parameters()), word, file


def smallest(models: list[tuple[int, str, str]], number: int, *, by_name: bool) -> set[str]:
    """The smallest models of every file, or of every name within a file."""
    groups = defaultdict(list)
    for size, word, file in models:
        name = re.match("[a-z]+", word.partition(":")[2])
        groups[file, name[0] if by_name and name else ""].append((size, word))
    return {word for group in groups.values() for _, word in sorted(group)[:number]}


def main() -> None:
    warnings.simplefilter("ignore")
    import_module("torchvision")
    ours = list(sizes(torchvision_names()))
    dense = [m for m in ours if m[2].startswith(("segmentation", "detection"))]
    others = [m for m in ours if m not in dense]
    chosen = {word for _, word, _ in dense} | smallest(others, 2, by_name=False)
    theirs = list(sizes(timm_names()))
    chosen |= smallest(theirs, 2, by_name=False) | smallest(theirs, 1, by_name=True)
    print("\n".join(sorted(chosen)))


if __name__ == "__main__":
    main()
