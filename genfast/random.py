"""Counter-based random numbers: the specification that every kernel follows to the bit.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Philox4x32-10.

A draw is addressed by (seed, stream, sample, element), never by the order in which threads ask for it:

* key      = the 64-bit ``seed``, low word first;
* counter  = (block low, block high, sample, stream), where ``sample`` is ``offset`` plus the row in the batch and
  ``stream`` tells apart the draws of one sample (a sampling loop adds its step index);
* element e of a sample, counted in row-major order, takes word ``(e >> 4) & 3`` of block
  ``(e >> 6) * 16 + (e & 15)``. Runs of 16 neighbours share a word index, so that a 16-lane vector unit and a
  coalesced GPU warp both store what they computed without a shuffle.

Normals are Box-Muller in float32: words (0, 1) of a block give elements' lanes 0 and 1, words (2, 3) lanes 2 and 3.
The radius uses all 32 bits (``u = float32(w | 1) * 2^-32``, so the tail reaches 6.66), the angle the top 26 bits,
centred. Logarithm, sine and cosine are fixed polynomials evaluated with fused multiply-adds in a fixed order, which
is what makes the backends agree; against exact mathematics a normal is off by at most 2.5 units in the last place.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

# ln(1 + f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; minimax, 0.1 ulp.
LOG_P = (
    0.3333333134651184,
    -0.250008225440979,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201761782169342,
    -0.131601944565773,
    0.12761549651622772,
    -0.07634429633617401,
)
LN2_HI, LN2_LO = 0.693359375, -2.12194440e-4
SQRT_HALF_BITS = 0x3F3504F3
# sin(2 pi y) = y (SIN_HI + (SIN_LO + y^2 P(y^2))) and cos(2 pi y) = 1 + y^2 P(y^2) on [-1/8, 1/8].
SIN_HI, SIN_LO = 6.2831854820251465, -1.9519180227689503e-07
SIN_P = (-41.3416633605957, 81.59235382080078, -75.39356231689453)
COS_P = (-19.739208221435547, 64.93932342529297, -85.44374084472656, 59.2459602355957)


def philox_words(seed: Tensor, block: Tensor, sample: Tensor, stream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on broadcast int64 tensors; the four words come back as int64 in [0, 2^32)."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(block & MASK, (block >> 32) & MASK, sample & MASK, stream & MASK)
    for _ in range(10):
        hi0, lo0 = mul_hi_lo(c0, M0)
        hi1, lo1 = mul_hi_lo(c2, M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3


def normal_from_words(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller of two words: (radius * cos, radius * sin), float32, in the exact operation order of the kernels."""
    f32 = torch.float32
    u = (w0 | 1).to(f32) * 2.0**-32
    bits = u.view(torch.int32) - SQRT_HALF_BITS
    exponent = (bits >> 23).to(f32)
    f = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(f32) - 1.0
    p = torch.full_like(f, LOG_P[-1])
    for c in LOG_P[-2::-1]:
        p = _fma(p, f, c)
    tail = _fma(exponent, LN2_LO, (f * f) * _fma(p, f, -0.5))
    radius = _sqrt(-2.0 * _fma(exponent, LN2_HI, f + tail))

    turns = (w1 & ~63) | 32
    quadrant = (turns + (1 << 29)) >> 30
    y = (turns - (quadrant << 30)).to(f32) * 2.0**-32
    y2 = y * y
    p = torch.full_like(y, SIN_P[2])
    for c in (SIN_P[1], SIN_P[0], SIN_LO):
        p = _fma(p, y2, c)
    sin = _fma(y, SIN_HI, y * p)
    p = torch.full_like(y, COS_P[3])
    for c in (COS_P[2], COS_P[1], COS_P[0], 1.0):
        p = _fma(p, y2, c)
    odd = (quadrant & 1).bool()
    c, s = torch.where(odd, sin, p), torch.where(odd, p, sin)
    c = torch.where(((quadrant + 1) & 2).bool(), -c, c)
    s = torch.where((quadrant & 2).bool(), -s, s)
    return radius * c, radius * s


def reference_normal(
    batch: int, inner: int, seed: int | Tensor, stream: int | Tensor = 0, offset: int = 0, device="cpu"
) -> Tensor:
    """Standard normals, float32 [batch, inner], in plain PyTorch: what ``seed=`` draws inside the kernels.

    ``seed`` is an int or an int64 tensor, 0-d (rows are samples ``offset``, ``offset + 1``, ...) or [batch] (every
    row is sample ``offset`` of its own seed). ``stream`` is an int or an int64 tensor [batch].
    """
    seed = torch.as_tensor(signed64(seed) if isinstance(seed, int) else seed, dtype=torch.int64, device=device)
    stream = torch.as_tensor(stream, dtype=torch.int64, device=device)
    rows = (
        torch.arange(batch, device=device) if seed.dim() == 0 else torch.zeros(batch, dtype=torch.int64, device=device)
    )
    blocks = torch.arange(-(-inner // 64) * 16, device=device)
    w = philox_words(seed.reshape(-1, 1), blocks[None], (rows + offset)[:, None], stream.reshape(-1, 1))
    z = torch.stack(normal_from_words(w[0], w[1]) + normal_from_words(w[2], w[3]))
    z = z.view(4, batch, blocks.numel() // 16, 16).permute(1, 2, 0, 3).reshape(batch, blocks.numel() * 4)
    return z[:, :inner].contiguous()


def signed64(value: int) -> int:
    """A seed in [-2^63, 2^64) as the two's-complement int64 with the same bits."""
    return (value + 2**63) % 2**64 - 2**63


def mul_hi_lo(x: Tensor, m: int | Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of the product of int64 tensors in [0, 2^32)."""
    # int64 has no room for a 32 x 32 product with both operands unsigned, so split the operand in halves.
    low, high = (x & 0xFFFF) * m, (x >> 16) * m
    high = high + (low >> 16)
    return (high >> 16) & MASK, ((high << 16) | (low & 0xFFFF)) & MASK


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    # The product of two float32 is exact in float64, so one rounding to float32 remains (double rounding aside).
    f64 = torch.float64
    b = b.to(f64) if isinstance(b, Tensor) else float(np.float32(b))
    c = c.to(f64) if isinstance(c, Tensor) else float(np.float32(c))
    return (a.to(f64) * b + c).to(torch.float32)


def _sqrt(x: Tensor) -> Tensor:
    return x.to(torch.float64).sqrt().to(torch.float32)
