"""Dropout masks without state: a function of (seed, layer, site), drawn as bytes in bulk.

torch draws one random number at a time for a mask: 30 ms for 4096 x 1536 on two cores, where GELU takes 1.4 ms. A byte
an element is enough for a mask; numpy's SFC64 makes 4 of them in a nanosecond. The rate becomes a multiple of 1/256
(0.1 -> 26/256 = 0.1016), and the scale 1 / (1 - rate) is that of the rate in use, so the expectation is exact.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Noise:
    """The randomness of one batch."""

    seed: int

    def masks(self, *site: int) -> "Masks":
        """The stream of masks of one place in the model, such as (layer, 2): the same masks every time it is asked."""
        return Masks(np.random.SFC64(np.random.SeedSequence([self.seed, *site])))


@dataclass(frozen=True)
class Masks:
    """A stream of masks."""

    generator: np.random.SFC64

    def draw(self, rate: float, *shape: int) -> torch.Tensor:
        """The next mask: uint8[shape], 1 = keep, 0 with probability `quantised(rate)`."""
        size = int(np.prod(shape))
        bytes_ = self.generator.random_raw(-(-size // 8)).view(np.uint8)[:size]
        # numpy compares bytes 9 times faster than torch; uint8 and not bool: torch multiplies it twice as fast.
        return torch.from_numpy((bytes_ >= _threshold(rate)).view(np.uint8)).view(shape)


def _threshold(rate: float) -> int:
    return round(256 * rate)


def keep_scale(rate: float) -> float:
    """1 / (1 - rate in use): what kept values are multiplied by."""
    return 256 / (256 - _threshold(rate))
