"""Products of many tokens with weights that never change, kept a second time in oneDNN's blocked layout.

On an AMD processor with AVX2 and width 384, oneDNN with such weights was 5 to 7 % faster than MKL at 1,024 tokens and
1 to 17 % at 4,096, as fast below 512 tokens and slower for one; MKL with packed weights of its own was 3 to 11 % slower
than without. On Intel's processors, whose library MKL is, and on those with AVX-512 nobody has measured float32: they
keep MKL. In bfloat16 both ways are oneDNN's, and it reads plain weights in another order at every call: one token took
0.5 to 0.6 of the time with blocked ones, 64 tokens 0.9, 2,048 tokens 0.9 to 0.95 (AMD with bf16 instructions, width 384
and 768).
"""

import torch
from torch import Tensor

from trimtab.machine import has_bf16, processor

LEAST_TOKENS = 768  # in float32


def pays(dtype: torch.dtype) -> bool:
    """Whether products are faster so on this machine; a processor that is not known keeps MKL."""
    has_onednn, chip = torch.backends.mkldnn.is_available(), processor()  # type: ignore[no-untyped-call]
    if dtype == torch.bfloat16:
        return bool(has_onednn) and has_bf16(chip)
    is_measured = chip.name.startswith("AMD ") and "avx2" in chip.features and "avx512f" not in chip.features
    return bool(has_onednn) and dtype == torch.float32 and is_measured


class Blocked:
    """A weight [out, in] in oneDNN's layout, made by the first product that wants it: as many bytes again, 1 ms."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._blocked: Tensor | None = None

    def takes(self, tokens: int) -> bool:
        """Whether a product of so many tokens is faster with it."""
        return tokens >= LEAST_TOKENS or self._weight.dtype == torch.bfloat16

    def product(self, x: Tensor, bias: Tensor) -> Tensor:
        """X [N, in] -> x W' + bias, [N, out], in memory of its own: oneDNN through torch writes to no other."""
        if self._blocked is None:  # two threads may both make it: of the same bytes
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(self._weight, LEAST_TOKENS)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocked, bias, "none", [], "")
        return out
