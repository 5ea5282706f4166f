"""float32 to what is stored, rounded to nearest even everywhere."""

import triton
import triton.language as tl

from genfast.backends import interpreting

_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def rounded(value, TARGET: tl.constexpr):
    """``value`` in another dtype."""
    if _INTERPRETED and tl.bfloat16 == TARGET:
        # The interpreter truncates where hardware rounds.
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        value = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(TARGET)
