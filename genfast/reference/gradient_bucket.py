"""What the ops of ``gradient_bucket`` compute, in plain PyTorch: the specification.

Arithmetic is float32, each operation rounded. On a quantised wire a block of 256 values v with a = max |v| has

    scale = a / largest,   code = round(v * (largest / a)), kept within +-largest,   value = code * scale,

rounded to nearest even. A block with a < 2^-100 has scale 0 and codes 0; one with NaN or infinity has scale NaN and
codes 0, so that every rank finds it not finite. On the other wires a value is cast; NaN and infinity are themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.gradient_wire import BLOCK, SMALLEST, WIRES, BucketLayout


def encode(values: Tensor, layout: BucketLayout, out: Tensor) -> Tensor:
    """float32 [n chunks, chunk] to uint8 [n chunks, chunk_bytes]; what the other end will read, as float32."""
    wire = WIRES[layout.wire]
    if not layout.chunk:
        return values
    codes = out[:, : layout.code_bytes].view(wire.dtype)
    if not layout.quantised:
        codes.copy_(values)
        out[:, layout.code_bytes :] = 0
        return codes.float()
    blocks = values.reshape(len(values), -1, BLOCK)
    largest = torch.tensor(wire.largest, device=values.device)
    most = blocks.abs().amax(-1, keepdim=True)
    odd, small = ~blocks.isfinite().all(-1, keepdim=True), most < SMALLEST
    scale = torch.where(odd, torch.nan, torch.where(small, 0.0, most / largest))
    scaled = blocks * torch.where(odd | small, 0.0, largest / most)
    scaled = torch.where(odd | small, 0.0, scaled).clamp(-wire.largest, wire.largest)
    codes.copy_((scaled.round() if wire.dtype == torch.int8 else scaled).reshape(values.shape))
    scales = 4 * scale.shape[1]
    out[:, layout.code_bytes : layout.code_bytes + scales] = scale[..., 0].contiguous().view(torch.uint8)
    out[:, layout.code_bytes + scales :] = 0
    return (codes.float().view(blocks.shape) * scale).view(values.shape)


def decode(chunks: Tensor, layout: BucketLayout) -> Tensor:
    """uint8 [n chunks, chunk_bytes] to float32 [n chunks, chunk]."""
    if not layout.chunk:
        return chunks.float()
    values = chunks[:, : layout.code_bytes].contiguous().view(WIRES[layout.wire].dtype).float()
    if not layout.quantised:
        return values
    end = layout.code_bytes + 4 * (layout.chunk // BLOCK)
    scale = chunks[:, layout.code_bytes : end].contiguous().view(torch.float32)
    return (values.view(len(chunks), -1, BLOCK) * scale[..., None]).view(values.shape)


def _sent(values: Tensor, residual: Tensor | None, layout: BucketLayout, out: Tensor) -> Tensor:
    """Encodes values + residual, and tells which of them are finite, themselves and as a cast value. The residual
    becomes what the wire left out, except where it carries no number."""
    if residual is not None:
        padded = torch.nn.functional.pad(residual, (0, values.numel() - residual.numel()))
        values = values + padded.view(values.shape)
    read = encode(values, layout, out)
    if residual is not None:
        left = torch.where(read.isfinite(), values - read, padded.view(values.shape))
        residual.copy_(left.flatten()[: residual.numel()])
    return values.isfinite() & (layout.quantised | read.isfinite())


def _per_tensor(flat: Tensor, layout: BucketLayout) -> list[Tensor]:
    return list(flat[: layout.numel].split(layout.numels)) if layout.numels else []


def pack_gradients(gradients, *, layout: BucketLayout, scale, residual, out, finite) -> None:
    """out uint8 [ranks, chunk_bytes] of scale * gradients + residual; finite bool [tensors]: whether all of it is."""
    flat = out.new_zeros(layout.ranks * layout.chunk, dtype=torch.float32)
    for part, gradient in zip(_per_tensor(flat, layout), gradients):
        part.copy_((gradient.float() * scale).flatten())
    sound = _sent(flat.view(layout.ranks, layout.chunk), residual, layout, out)
    for k, part in enumerate(_per_tensor(sound.flatten(), layout)):
        finite[k] = part.all()


def reduce_chunks(received, *, layout: BucketLayout, scale, residual, out) -> None:
    """out uint8 [chunk_bytes] of scale * (chunk of rank 0 + chunk of rank 1 + ...) + residual, added in this order."""
    values = decode(received, layout)
    total = values[0].clone()
    for other in values[1:]:
        total += other
    _sent((total * scale)[None], residual, layout, out[None])


def unpack_gradients(reduced, gradients, *, layout: BucketLayout, scale, square_norm, finite) -> None:
    """gradients from reduced uint8 [ranks, chunk_bytes], times scale; per tensor the sum of squares and finiteness."""
    _write(decode(reduced, layout) * scale, gradients, layout, square_norm, finite)


def _write(values: Tensor, gradients, layout: BucketLayout, square_norm, finite) -> None:
    for k, (part, gradient) in enumerate(zip(_per_tensor(values.flatten(), layout), gradients)):
        gradient.copy_(part.view(gradient.shape))
        square_norm[k] = part.double().square().sum()
        finite[k] = part.isfinite().all()


def unpack_sum(buckets, gradients, *, layout: BucketLayout, scale, square_norm, finite) -> None:
    """The same from buckets uint8 [n, ranks, chunk_bytes]: (bucket 0 + bucket 1 + ...) * scale, added in this order."""
    total = decode(buckets[0], layout).clone()
    for other in buckets[1:]:
        total += decode(other, layout)
    _write(total * scale, gradients, layout, square_norm, finite)
