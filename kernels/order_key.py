"""Floats as whole numbers of the same order, int64 in [0, 2^32): -0 is 0, -inf is 0x7FFFFF."""

import triton
import triton.language as tl


@triton.jit
def from_key(key):
    """The float32 of an order key, int64 in [0, 2^32)."""
    u = tl.where(key >= 0x80000000, key - 0x80000000, 0xFFFFFFFF - key)
    return u.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def to_key(x):
    u = (x + 0.0).to(tl.uint32, bitcast=True).to(tl.int64)
    return tl.where(u >= 0x80000000, 0xFFFFFFFF - u, u + 0x80000000)
