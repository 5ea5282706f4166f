"""Pieces that the kernels of a sampler step share: table rows, guidance, the estimate of x0.

The arithmetic follows ``genfast.reference.sampler_step`` operation by operation. All kernels are compiled with
``enable_fp_fusion=False``, so a pass that recomputes x0 gets the bits that another pass got.
"""

import triton
import triton.language as tl

BLOCK = 1024
"""Elements per tile of the kernels that read; a power of two."""

PARTS = 256
"""The most programs that share the reduction of one sample. A function of the sample's size alone, never of the batch,
so that a sample's result does not depend on its company."""


def parts_of(inner: int) -> int:
    """How many programs reduce one sample of ``inner`` elements."""
    return max(1, min(PARTS, -(-inner // (4 * BLOCK))))


@triton.jit
def table_row(table, step, row, row_stride, rows, sample, WIDTH: tl.constexpr, STEP_TENSOR: tl.constexpr):
    """(address of the sample's row, whether it exists, its index as int64)."""
    if STEP_TENSOR:
        r = tl.load(step + sample * row_stride)
    else:
        r = row + sample * row_stride
    r = r.to(tl.int64)
    ok = (r >= 0) & (r < rows)
    return table + tl.where(ok, r, 0) * WIDTH, ok, r


@triton.jit
def coefficient(row_ptr, column, ok, COMPUTE: tl.constexpr):
    """One number of a row; NaN where the row does not exist, which makes every result of the sample NaN."""
    return tl.load(row_ptr + column, mask=ok, other=float("nan")).to(COMPUTE)


@triton.jit
def guidance_scale(guidance_ptr, guidance, guidance_stride, sample, GUIDE: tl.constexpr, COMPUTE: tl.constexpr):
    """The sample's scale of classifier-free guidance: from a tensor (GUIDE = 2) or a number (GUIDE = 1)."""
    if GUIDE == 2:
        g = tl.load(guidance_ptr + sample * guidance_stride).to(COMPUTE)
    else:
        g = tl.full((), guidance, tl.float64).to(COMPUTE)
    return g


@triton.jit
def load_tile(pointer, lanes, mask, COMPUTE: tl.constexpr):
    return tl.load(pointer + lanes, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def guided(cond, uncond, scale):
    return uncond + scale * (cond - uncond)
