"""Image files to pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from bnctl.data.preprocess import Preprocess
from bnctl.errors import DataError

_REPAIR = "repair or remove it"


@dataclass(frozen=True)
class ImageFile:
    """An encoded image: what to call it in errors, and how to open it."""

    name: str
    open: Callable[[], BinaryIO]

    def pixels(self, steps: Preprocess) -> NDArray[np.uint8]:
        """Decode, resize and crop: (H, W, C).

        Raises:
            DataError: it cannot be opened or decoded, or does not suit the steps.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with self.open() as file, Image.open(file) as image:
                image.load()
        except UnidentifiedImageError as error:  # its message names an object in memory
            raise DataError(f"{self.name} is not an image: its format is unknown", hint=_REPAIR) from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's decoders raise these
            raise DataError(f"{self.name} is not an image that can be read: {error}", hint=_REPAIR) from error
        return steps.pixels(image, self.name)
