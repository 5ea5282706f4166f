"""The public ops of ``scalar_quantize``: quantisers that need no codebook. Checks, choice of backend, gradients,
torch.library.

There is no CUDA C++, as in :mod:`genfast.ops.vector_quantize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.ops._codes import check_vectors, checked_dim, grouped
from genfast.reference import scalar_quantize as reference

FAMILY = "vector_quantize"
MOST_BITS = 62
"""Of an index, which is int64."""
MOST_BLOCK_BITS = 22
"""Of a block whose codes are enumerated."""
CODE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BinaryLosses(NamedTuple):
    """What :func:`lfq_quantize` and :func:`bsq_quantize` return for training; all float32 (float64 of float64)."""

    per_sample_entropy: Tensor
    """Mean over rows and groups: small where the quantiser is certain."""
    batch_entropy: Tensor
    """Of the mean probabilities, summed over a group's blocks, mean over groups: large where all codes are used."""
    entropy_loss: Tensor
    """per_sample_entropy - diversity_gamma batch_entropy"""
    commitment: Tensor
    """Mean squared distance of a number to its code."""
    mean_probability: Tensor
    """[G, blocks, 2^entropy_bits], whose entropy is the batch entropy: data-parallel training averages it first."""


@export(FAMILY)
def fsq_quantize(
    z: Tensor,
    levels: Sequence[int],
    *,
    dim: int = -1,
    groups: int | None = None,
    symmetric: bool = False,
    clamp: bool = False,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Finite scalar quantisation: each of D numbers becomes one of its own few levels.

    The levels are those of the exact formula, the same on every backend. Differentiable: gradients pass straight
    through the rounding.

    Args:
        z: float32, bfloat16 or float16 (float64 runs the reference), with any strides. Dimension ``dim`` holds D
            numbers, or ``groups`` times D: channel-last [..., D], or channel-first [B, D, H, W] with ``dim=1``, which
            is not copied.
        levels: D whole numbers from 2 (3 unless ``symmetric``), whose product is below 2^62.
        dim: the dimension of z that holds the numbers.
        groups: how many quantisers of the same levels share ``dim``; by default one, without a dimension for it.
        symmetric: the form whose codes are symmetric about 0 for any number of levels.
        clamp: bound z by a clamp to [-1, 1] in the place of tanh, for numbers that are bounded already.
        noise: float32 of z's shape, added to the codes, which stay in [-1, 1], and not to the indices: the noise of
            training with ``noise_dropout``.

    Returns:
        (codes, indices): codes in [-1, 1] in z's shape and dtype; indices int64 of z's shape without ``dim``, then [G]
        if groups are given, the first level varying fastest. A row with NaN has the index -1, and NaN where z has it.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: Mentzer et al. 2023 (arXiv:2309.15505); symmetric form and noise: Parker et al. 2024 (arXiv:2411.19842). The
    arithmetic: ``genfast/reference/scalar_quantize.py``.
    """
    levels = _checked_levels(levels, symmetric)
    rows, dim = _checked_rows(z, dim, groups, len(levels))
    if noise is not None:
        if not isinstance(noise, Tensor) or noise.dtype != torch.float32:
            raise TypeError(f"noise must be a float32 tensor, got {getattr(noise, 'dtype', type(noise).__name__)}")
        if noise.shape != z.shape or noise.device != z.device:
            raise ValueError(
                f"noise is {list(noise.shape)} on {noise.device}; expected {list(z.shape)} on {z.device}, as z"
            )
        noise = grouped(noise.detach(), dim, rows.shape[2])
    call = _fsq if _plain(z) else _fsq_op
    codes, indices = call(rows, noise, levels, bool(symmetric), bool(clamp))
    return _shaped(codes, z, dim), _indices_shaped(indices, z, dim, groups)


@export(FAMILY)
def fsq_codes(
    indices: Tensor, levels: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The codes of indices: what :func:`fsq_quantize` returned beside them.

    Args:
        indices: whole numbers of any shape.
        levels, symmetric: as for :func:`fsq_quantize`.
        dtype: of the codes.

    Returns:
        [..., D]; NaN for an index that no code has.

    Raises:
        TypeError, ValueError: as for :func:`fsq_quantize`.
    """
    levels = _checked_levels(levels, symmetric)
    _check_indices(indices, dtype)
    return reference.fsq_codes(indices, levels, bool(symmetric), dtype)


@export(FAMILY)
def lfq_quantize(
    z: Tensor,
    *,
    dim: int = -1,
    groups: int | None = None,
    scale: float = 1.0,
    return_losses: bool = False,
    inv_temperature: float = 100.0,
    entropy_bits: int | None = None,
    least_probability: float = 0.0,
    diversity_gamma: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, BinaryLosses]:
    """Lookup-free quantisation: each of D numbers becomes its sign, and the signs are the bits of the index.

    The losses are those of softmax over all codes, from the products over bits that it consists of: no tensor of rows
    by codes is made. Differentiable: gradients pass straight through to z, and through the losses.

    Args:
        z: float32, bfloat16 or float16 (float64 runs the reference), with any strides. Dimension ``dim`` holds D
            numbers, or ``groups`` times D: channel-last [..., D], or channel-first [B, D, H, W] with ``dim=1``, which
            is not copied.
        dim: the dimension of z that holds the numbers, at most 62 in a group.
        groups: how many quantisers share ``dim``; by default one, without a dimension for it.
        scale: the size of the codes' numbers, which are scale or -scale.
        return_losses: also return the losses.
        inv_temperature: of the softmax over codes, whose logits are 2 inv_temperature z.c.
        entropy_bits: the batch entropy is the sum of that of blocks of so many bits, a divisor of D and at most 22; by
            default D, which is exact. (Zhao et al. 2024 use 9.)
        least_probability: logarithms are of no less than this. 0 is the entropy; 1e-5 is what vector-quantize-pytorch
            computes.
        diversity_gamma: the weight of the batch entropy in ``entropy_loss``.
        mask: bool of z's shape without ``dim``: rows that count in the losses; all by default.

    Returns:
        (codes, indices) or (codes, indices, losses): codes in z's shape and dtype; indices int64 of z's shape without
        ``dim``, then [G] if groups are given, the first bit the highest; losses a named tuple of
        ``per_sample_entropy``, ``batch_entropy``, ``entropy_loss``, ``commitment`` and ``mean_probability``, NaN where
        no row counts. A row with NaN has the index -1, and NaN where z has it. Probabilities below e^-60 may be 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: Yu et al. 2023 (arXiv:2310.05737). The arithmetic: ``genfast/reference/scalar_quantize.py``.
    """
    return _binary_quantize(
        z, dim, groups, None, scale, return_losses, inv_temperature, entropy_bits, least_probability, diversity_gamma,
        mask,
    )  # fmt: skip


@export(FAMILY)
def bsq_quantize(
    z: Tensor,
    *,
    dim: int = -1,
    groups: int | None = None,
    scale: float = 1.0,
    return_losses: bool = False,
    inv_temperature: float = 100.0,
    entropy_bits: int | None = None,
    least_probability: float = 0.0,
    diversity_gamma: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, BinaryLosses]:
    """Binary spherical quantisation: rows of length ``scale``, and the nearest corner of the cube inside that sphere.

    As :func:`lfq_quantize` of scale z / |z|, with codes of scale / sqrt(D) or -scale / sqrt(D). Gradients pass straight
    through to the normalised rows, and through their normalisation.

    Args:
        z, dim, groups, return_losses, inv_temperature, entropy_bits, least_probability, diversity_gamma, mask: as for
            :func:`lfq_quantize`.
        scale: the length of rows and codes.

    Returns:
        As :func:`lfq_quantize`; a row of zeros has the index 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: Zhao et al. 2024 (arXiv:2406.07548). The arithmetic: ``genfast/reference/scalar_quantize.py``.
    """
    return _binary_quantize(
        z, dim, groups, scale, scale, return_losses, inv_temperature, entropy_bits, least_probability, diversity_gamma,
        mask,
    )  # fmt: skip


@export(FAMILY)
def binary_codes(indices: Tensor, bits: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The codes of the indices of :func:`lfq_quantize` and :func:`bsq_quantize`, from all 62 bits.

    Args:
        indices: whole numbers of any shape.
        bits: D.
        scale: the size of the codes' numbers: ``scale`` of LFQ, ``scale / sqrt(D)`` of BSQ.
        dtype: of the codes.

    Returns:
        [..., D]; NaN for an index that no code has.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype or range.
    """
    _check_indices(indices, dtype)
    _check_whole("bits", bits, MOST_BITS)
    return reference.bit_codes(indices, bits, _checked_scale("scale", scale), dtype)


# --- checks ----------------------------------------------------------------------------------------------------------


def _checked_levels(levels, symmetric: bool) -> list[int]:
    levels = list(levels)
    least = 2 if symmetric else 3
    for count in levels:
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"levels must be whole numbers from {least}, got {count!r}")
    if not levels or math.prod(levels) > 1 << MOST_BITS:
        raise ValueError(f"levels must be at least one, of a product up to 2^{MOST_BITS}; got {levels}")
    return levels


def _check_whole(name: str, value, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r}")


def _check_indices(indices, dtype) -> None:
    if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
        raise TypeError(f"indices must be whole numbers, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if dtype not in CODE_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype}")


def _checked_scale(name: str, value) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return value


def _checked_rows(z, dim: int, groups: int | None, size: int | None) -> tuple[Tensor, int]:
    """(z as [B, S, G, D], dim counted from the front)."""
    check_vectors("z", z)
    if z.dim() == 0:
        raise ValueError("z is a single number; expected at least one dimension")
    dim = checked_dim(z, dim)
    if groups is not None:
        _check_whole("groups", groups, max(z.shape[dim], 1))
    count = groups or 1
    if size is None:
        size = z.shape[dim] // count
        if size * count != z.shape[dim] or not 1 <= size <= MOST_BITS:
            raise ValueError(
                f"z is {list(z.shape)}; expected {count} groups of 1 to {MOST_BITS} numbers in dimension {dim}"
            )
    elif z.shape[dim] != size * count:
        raise ValueError(f"z is {list(z.shape)}; expected {count} groups of {size} in dimension {dim}, as levels has")
    return grouped(z, dim, count), dim


def _checked_mask(mask, z: Tensor, dim: int) -> Tensor | None:
    """As [B, S]."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    shape = [n for d, n in enumerate(z.shape) if d != dim]
    if list(mask.shape) != shape or mask.device != z.device:
        raise ValueError(f"mask is {list(mask.shape)} on {mask.device}; expected {shape} on {z.device}")
    return grouped(mask[..., None], -1, 1)[..., 0, 0]


def _plain(z: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and z.requires_grad)


def _shaped(codes: Tensor, z: Tensor, dim: int) -> Tensor:
    """[B, S, G, D] in z's shape."""
    lead = [n for d, n in enumerate(z.shape) if d != dim]
    return codes.flatten(2).reshape(*lead, z.shape[dim]).movedim(-1, dim)


def _indices_shaped(indices: Tensor, z: Tensor, dim: int, groups: int | None) -> Tensor:
    lead = [n for d, n in enumerate(z.shape) if d != dim]
    return indices.reshape(lead if groups is None else [*lead, groups])


def _binary_quantize(
    z, dim, groups, radius, scale, return_losses, inv_temperature, entropy_bits, least_probability, gamma, mask
):
    rows, dim = _checked_rows(z, dim, groups, None)
    size = rows.shape[3]
    scale = _checked_scale("scale", scale)
    sharpness = _checked_scale("inv_temperature", inv_temperature)
    magnitude = scale if radius is None else scale / math.sqrt(size)
    least = float(least_probability)
    if not 0 <= least < 1:
        raise ValueError(f"least_probability must be in [0, 1), got {least}")
    if not math.isfinite(float(gamma)):
        raise ValueError(f"diversity_gamma must be finite, got {gamma}")
    mask = _checked_mask(mask, z, dim)
    block = None
    if entropy_bits is not None:
        _check_whole("entropy_bits", entropy_bits, MOST_BLOCK_BITS)
        if size % entropy_bits:
            raise ValueError(f"entropy_bits must divide the {size} numbers of a group, got {entropy_bits}")
    if return_losses:
        block = entropy_bits or size
        if block > MOST_BLOCK_BITS:
            raise ValueError(
                f"a group has {size} bits, too many codes for an exact batch entropy: give entropy_bits, a divisor of "
                f"{size} up to {MOST_BLOCK_BITS}"
            )
    call = _binary if _plain(z) else _binary_op
    radius = None if radius is None else scale
    codes, indices, entropies, mean, commitment = call(rows, mask, radius, magnitude, sharpness, block, least)
    codes, indices = _shaped(codes, z, dim), _indices_shaped(indices, z, dim, groups)
    if not return_losses:
        return codes, indices
    batch = reference.entropy(mean, least).sum(-1).mean()
    return codes, indices, BinaryLosses(entropies, batch, entropies - gamma * batch, commitment, mean)


# --- torch.library ---------------------------------------------------------------------------------------------------


def _run(op: str, z: Tensor):
    """(name, function) of the backend; float64 is the reference's."""
    if z.dtype == torch.float64:
        return "reference", getattr(reference, op)
    return choose(FAMILY, op, z.device)


def _fsq(z: Tensor, noise: Tensor | None, levels: Sequence[int], symmetric: bool, clamp: bool) -> tuple[Tensor, Tensor]:
    codes, indices = _fsq_fake(z, noise, levels, symmetric, clamp)
    name, function = _run("fsq_quantize", z)
    with profiling.op_range(FAMILY, f"fsq_quantize[{name}]", *z.shape):
        function(
            z.detach(), levels=tuple(levels), symmetric=symmetric, clamp=clamp, noise=noise, quantized=codes,
            indices=indices,
        )  # fmt: skip
    return codes, indices


def _fsq_fake(z, noise, levels, symmetric, clamp):
    return torch.empty_like(z), z.new_empty(z.shape[:3], dtype=torch.int64)


_fsq_op = torch.library.custom_op(
    "genfast::fsq_quantize",
    _fsq,
    mutates_args=(),
    schema="(Tensor z, Tensor? noise, int[] levels, bool symmetric, bool clamp) -> (Tensor, Tensor)",
)
_fsq_op.register_fake(_fsq_fake)


def _fsq_backward(
    grad: Tensor, z: Tensor, noise: Tensor | None, levels: Sequence[int], symmetric: bool, clamp: bool
) -> Tensor:
    grad_z = torch.empty_like(z)
    name, function = _run("fsq_backward", z)
    with profiling.op_range(FAMILY, f"fsq_backward[{name}]", *z.shape):
        function(grad, z, levels=tuple(levels), symmetric=symmetric, clamp=clamp, noise=noise, grad_z=grad_z)
    return grad_z


_fsq_backward_op = torch.library.custom_op(
    "genfast::fsq_backward",
    _fsq_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor? noise, int[] levels, bool symmetric, bool clamp) -> Tensor",
)


@_fsq_backward_op.register_fake
def _fsq_backward_fake(grad, z, noise, levels, symmetric, clamp):
    return torch.empty_like(z)


def _keep_fsq(ctx, inputs, output) -> None:
    z, noise, *ctx.options = inputs
    ctx.save_for_backward(z, *(() if noise is None else (noise,)))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _fsq_gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    z, *noise = ctx.saved_tensors
    return _fsq_backward_op(grad, z, noise[0] if noise else None, *ctx.options), None, None, None, None


_fsq_op.register_autograd(_fsq_gradients, setup_context=_keep_fsq)


def _binary(
    z: Tensor, mask: Tensor | None, radius: float | None, magnitude: float, sharpness: float, block: int | None,
    least: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    codes, indices, entropies, mean, commitment = _binary_fake(z, mask, radius, magnitude, sharpness, block, least)
    name, function = _run("binary_quantize", z)
    with profiling.op_range(FAMILY, f"binary_quantize[{name}]", *z.shape):
        function(
            z.detach(), radius=radius, magnitude=magnitude, sharpness=sharpness, block=block, least=least, mask=mask,
            quantized=codes, indices=indices, entropies=None if block is None else entropies,
            mean=None if block is None else mean, commitment=None if block is None else commitment,
        )  # fmt: skip
    return codes, indices, entropies, mean, commitment


def _binary_fake(z, mask, radius, magnitude, sharpness, block, least):
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    shape = (0,) if block is None else (z.shape[2], z.shape[3] // block, 2**block)
    scalars = [z.new_empty((0,) if block is None else (), dtype=wide) for _ in range(2)]
    indices = z.new_empty(z.shape[:3], dtype=torch.int64)
    return torch.empty_like(z), indices, scalars[0], z.new_empty(shape, dtype=wide), scalars[1]


_binary_op = torch.library.custom_op(
    "genfast::binary_quantize",
    _binary,
    mutates_args=(),
    schema="(Tensor z, Tensor? mask, float? radius, float magnitude, float sharpness, int? block, float least) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_binary_op.register_fake(_binary_fake)


def _binary_backward(
    grad: Tensor | None, grad_entropies: Tensor | None, grad_mean: Tensor | None, grad_commitment: Tensor | None,
    z: Tensor, mask: Tensor | None, radius: float | None, magnitude: float, sharpness: float, block: int | None,
    least: float,
) -> Tensor:  # fmt: skip
    grad_z = torch.empty_like(z)
    name, function = _run("binary_backward", z)
    with profiling.op_range(FAMILY, f"binary_backward[{name}]", *z.shape):
        function(
            grad, grad_entropies, grad_mean, grad_commitment, z, radius=radius, magnitude=magnitude,
            sharpness=sharpness, block=block, least=least, mask=mask, grad_z=grad_z,
        )  # fmt: skip
    return grad_z


_binary_backward_op = torch.library.custom_op(
    "genfast::binary_backward",
    _binary_backward,
    mutates_args=(),
    schema="(Tensor? grad, Tensor? grad_entropies, Tensor? grad_mean, Tensor? grad_commitment, Tensor z, Tensor? mask, "
    "float? radius, float magnitude, float sharpness, int? block, float least) -> Tensor",
)


@_binary_backward_op.register_fake
def _binary_backward_fake(grad, grad_entropies, grad_mean, grad_commitment, z, *options):
    return torch.empty_like(z)


def _keep_binary(ctx, inputs, output) -> None:
    z, mask, *ctx.options = inputs
    ctx.save_for_backward(z, *(() if mask is None else (mask,)))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _binary_gradients(ctx, grad, _, grad_entropies, grad_mean, grad_commitment):
    z, *mask = ctx.saved_tensors
    radius, magnitude, sharpness, block, least = ctx.options
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    if block is None:
        grad_entropies = grad_mean = grad_commitment = None
    if grad_mean is None and (least == 0 or grad_entropies is None):
        block = None  # no code needs to be enumerated
    if not (grad_entropies is grad_mean is grad_commitment is None):
        none = z.new_zeros((), dtype=wide)
        grad_entropies = none if grad_entropies is None else grad_entropies
        grad_commitment = none if grad_commitment is None else grad_commitment
    found = _binary_backward_op(
        grad, grad_entropies, grad_mean, grad_commitment, z, mask[0] if mask else None, radius, magnitude, sharpness,
        block, least,
    )  # fmt: skip
    return found, None, None, None, None, None, None


_binary_op.register_autograd(_binary_gradients, setup_context=_keep_binary)
