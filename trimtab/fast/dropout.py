"""Dropout masks without state: a function of (seed, part, site), drawn as bytes in bulk.

torch draws one random number at a time for a mask: 30 ms for 4096 x 1536 on two cores, where GELU takes 1.4 ms. A byte
an element is enough for a mask; numpy's SFC64 makes 4 of them in a nanosecond. The rate becomes a multiple of 1/256
(0.1 -> 26/256 = 0.1016), and the scale 1 / (1 - rate) is that of the rate in use, so the expectation is exact.
"""

from dataclasses import dataclass

import numpy as np
import torch

_WORDS = 1 << 16  # drawn and compared 512 KB at a time, which stays in the cache


@dataclass(frozen=True)
class Noise:
    """The randomness of one part of a batch."""

    seed: int
    part: int = 0

    def fill(self, mask: torch.Tensor, rate: float, *site: int) -> torch.Tensor:
        """Fills a mask, uint8 of any shape: 1 = keep, 0 with the probability of `rate` in 256ths.

        The same seed, part and site, such as (layer, 2), give the same mask.
        """
        # numpy compares bytes 9 times faster than torch; uint8 and not bool: torch multiplies it twice as fast.
        flat = mask.view(-1).numpy()
        generator = np.random.SFC64(np.random.SeedSequence([self.seed, self.part, *site]))
        for start in range(0, flat.size, 8 * _WORDS):
            part = flat[start : start + 8 * _WORDS]
            drawn = generator.random_raw(-(-part.size // 8)).view(np.uint8)[: part.size]
            np.greater_equal(drawn, _threshold(rate), out=part.view(np.bool_))
        return mask


def can_quantise(rate: float) -> bool:
    """Whether a rate is 0, or neither 0 nor 1 in 256ths."""
    return rate == 0 or 0 < _threshold(rate) < 256


def _threshold(rate: float) -> int:
    return round(256 * rate)


def keep_scale(rate: float) -> float:
    """1 / (1 - rate in use): what kept values are multiplied by."""
    return 256 / (256 - _threshold(rate))
