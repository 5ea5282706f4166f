"""The ops ``quantize`` and ``ema_update_`` of the family ``vector_quantize``: checks, gradients, torch.library.

There is no CUDA C++, as in :mod:`genfast.ops.vector_quantize`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.ops._checks import check_counters, checked_seed
from genfast.ops._codes import checked_rows
from genfast.ops.vector_quantize import NONFINITE, PRECISIONS, nearest_rows
from genfast.reference import code_update as reference
from genfast.reference.vector_quantize import METRICS

FAMILY = "vector_quantize"
WITHOUT_CODE = ("input", "zeros")


@export(FAMILY)
class Quantized(NamedTuple):
    """What :func:`quantize` returns: the codes, which they are, the losses, and how the codebook is used."""

    z_q: Tensor
    """Of z's shape, dtype and layout: the codes."""
    indices: Tensor
    """int64 of z's shape without ``dim``, then [G] if the codebook has groups; -1 where there is no code."""
    loss: Tensor
    """commitment_weight commitment_loss + codebook_weight codebook_loss, float32 (float64 of float64)."""
    commitment_loss: Tensor
    """mean (z - sg(z_q))^2 over the vectors that have a code; 0 if there are none."""
    codebook_loss: Tensor
    """mean (sg(z) - z_q)^2: the same number, whose gradient goes to the codebook."""
    usage: Tensor | None
    """int64 [K] or [G, K]: how often each code was taken."""
    perplexity: Tensor | None
    """float32 [] or [G] (float64 of float64): exp of the entropy of ``usage``."""


@export(FAMILY)
def quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    dim: int = -1,
    gradient: str = "straight_through",
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    mask: Tensor | None = None,
    without_code: str = "input",
    indices: Tensor | None = None,
    precision: str = "exact",
    nonfinite: str = "raise",
    return_usage: bool = True,
) -> Quantized:
    """Every vector's nearest code in its place, with the losses, gradients and statistics that training needs.

    After the lookup one pass over z copies the codes, adds up the losses and counts; a second one makes the gradients.
    No one-hot matrix. The same to the bit from run to run and for any number of threads, gradients too: those of a code
    are added in the order of its vectors.

    Args:
        z, codebook, metric, dim, precision, nonfinite: as in :func:`nearest_code`. Codes are rounded to z's dtype. For
            ``"cosine"`` the vectors are compared by direction, and z_q and the losses are of the vectors as they are
            stored.
        gradient: how the gradient of z_q reaches z: ``"straight_through"`` as it is, ``"rotation"`` turned and
            stretched as z is to become its code, ``"none"`` not at all; it then goes to the codebook instead.
        commitment_weight, codebook_weight: of ``loss``; by default those of VQ-VAE. Codebooks that follow moving
            averages have no codebook loss: leave them without ``requires_grad``.
        mask: bool of z's shape without ``dim``: False where there is nothing to quantise.
        without_code: what z_q is where there is no code: ``"input"`` z, to which the gradient then goes, or
            ``"zeros"`` (vector_quantize_pytorch's default).
        indices: take these codes instead of the nearest; -1 for none. A number that is no code counts as -1 (an error
            on the CPU).
        return_usage: whether to count.

    Returns:
        :class:`Quantized`. Differentiable once, with respect to z and the codebook.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range; a vector that is not
            finite.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: van den Oord et al. 2017 (VQ-VAE, arXiv:1711.00937), Fifty et al. 2024 (rotation trick, arXiv:2410.06424).
    The arithmetic: ``genfast/reference/code_update.py``.
    """
    rows, codes, dim = checked_rows(z, codebook, dim)
    for name, value, known in (
        ("metric", metric, METRICS),
        ("gradient", gradient, reference.GRADIENTS),
        ("without_code", without_code, WITHOUT_CODE),
        ("precision", precision, PRECISIONS),
        ("nonfinite", nonfinite, NONFINITE),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    for name, value in (("commitment_weight", commitment_weight), ("codebook_weight", codebook_weight)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    lead = [n for d, n in enumerate(z.shape) if d != dim]
    shape = lead + [codes.shape[0]] * (codebook.dim() == 3)
    mask = checked_mask(mask, lead, z.device)
    if indices is None:
        found = nearest_rows(rows, codes, metric, precision == "exact")
        reject_nonfinite(found, mask, nonfinite)
    else:
        found = _checked_indices(indices, shape, codes.shape[1], z.device).reshape(rows.shape[:3])
    if mask is not None:
        found = found.masked_fill(~mask.reshape(*rows.shape[:2], 1), -1)

    recorded = torch.is_grad_enabled() and (z.requires_grad or codebook.requires_grad)
    run = _quantize_op if recorded or torch.compiler.is_compiling() else _quantize
    z_q, losses, _, usage, perplexity = run(rows, codes, found, gradient, without_code == "zeros", return_usage)
    commitment, of_codes = losses.unbind()
    z_q = z_q.flatten(2).reshape(*lead, z.shape[dim]).movedim(-1, dim)
    single = codebook.dim() == 2
    return Quantized(
        z_q,
        found.reshape(shape),
        commitment_weight * commitment + codebook_weight * of_codes,
        commitment,
        of_codes,
        (usage[0] if single else usage) if return_usage else None,
        (perplexity[0] if single else perplexity) if return_usage else None,
    )


@export(FAMILY)
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    z: Tensor,
    indices: Tensor,
    *,
    decay: float = 0.8,
    eps: float = 1e-5,
    dim: int = -1,
    metric: str = "l2",
    mask: Tensor | None = None,
    threshold: float = 0.0,
    reset_cluster_size: float | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    group: dist.ProcessGroup | None = None,
) -> None:
    """A codebook that follows moving averages of its vectors, in place: counts, sums, smoothing, dead codes revived.

    The order is that of vector_quantize_pytorch: cluster sizes and sums are averaged, the codebook is rewritten with
    Laplace smoothing, then codes whose size has fallen below ``threshold`` get vectors of the batch. Sums are added in
    the order of the vectors in float64, so that the result is the same to the bit for any number of threads.

    Args:
        codebook, embed_avg: float32 (float64 runs the reference), contiguous, [K, D] or [G, K, D].
        cluster_size: alike, [K] or [G, K].
        z: the vectors that were quantised, of any dtype and strides, see :func:`nearest_code`; not differentiated.
        indices: int64 of z's shape without ``dim``, then [G]: their codes, -1 for none.
        decay: how much of the old averages stays.
        eps: of the smoothing, (N + eps) / (sum N + K eps) sum N.
        metric: for ``"cosine"`` vectors and codes are divided by their lengths; ``"l2"`` and ``"dot"`` are the same.
        mask: bool of z's shape without ``dim``: False where z takes no part.
        threshold: the cluster size below which a code is dead; 0 revives none.
        reset_cluster_size: the cluster size of a revived code, by default ``threshold``.
        seed, stream, offset: what draws the vectors for dead codes, the same on every rank: ``seed`` an int or an int64
            tensor [], ``stream`` for example the number of the codebook, ``offset`` the number of the step. At most one
            vector of the batch goes to one code; dead codes for which there are none left wait.
        group: the ranks (``torch.distributed.group.WORLD``) whose batches are one; by default this process is alone.
            One all-reduce of [G, K, D + 1] float32, twice that with ``threshold``. With as many vectors on every rank,
            dead codes get what they would get from the joined batch; else every rank is as likely as the others. Counts
            travel as float32, exact up to 2^24 vectors of one code.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range. Nothing is then changed.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: van den Oord et al. 2017, appendix A.1; Razavi et al. 2019 (VQ-VAE-2). The arithmetic:
    ``genfast/reference/code_update.py``.
    """
    rows, codes, dim = checked_rows(z, codebook, dim)
    state = _checked_state(codebook, cluster_size, embed_avg)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if not 0 <= decay <= 1 or not 0 <= eps < math.inf:
        raise ValueError(f"decay must be in [0, 1] and eps at least 0 and finite; got {decay} and {eps}")
    reset = threshold if reset_cluster_size is None else reset_cluster_size
    if not 0 <= threshold < math.inf or not 0 <= reset < math.inf:
        raise ValueError(f"threshold and reset_cluster_size must be at least 0 and finite; got {threshold} and {reset}")
    lead = [n for d, n in enumerate(z.shape) if d != dim]
    shape = lead + [codes.shape[0]] * (codebook.dim() == 3)
    indices = _checked_indices(indices, shape, codes.shape[1], z.device).reshape(rows.shape[:3])
    mask = checked_mask(mask, lead, z.device)
    if mask is not None:
        indices = indices.masked_fill(~mask.reshape(*rows.shape[:2], 1), -1)
    check_counters(stream, offset)
    if threshold > 0:
        if seed is None:
            raise ValueError("seed must be given where threshold is above 0: it draws the vectors for dead codes")
        seed = checked_seed(seed, 1, z.device)
    else:
        seed = 0
    run = _ema_op if torch.compiler.is_compiling() else _ema
    numbers = (decay, eps, metric == "cosine", threshold, reset)
    draw = (seed if isinstance(seed, Tensor) else None, 0 if isinstance(seed, Tensor) else seed, stream, offset)
    vectors = rows.detach()
    if group is None:
        run(*state, vectors, indices, *numbers, *draw)
        return
    sums = code_sums(vectors, indices, codes.shape[1], metric == "cosine", threshold > 0, draw, group)
    run(*state, None, None, *numbers, *draw, *sums)


# --- checks ----------------------------------------------------------------------------------------------------------


def checked_mask(mask, lead: list[int], device) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError("mask must be a bool tensor")
    if list(mask.shape) != lead or mask.device != device:
        raise ValueError(f"mask is {list(mask.shape)} on {mask.device}; expected {lead} on {device}")
    return mask


def _checked_indices(indices, shape: list[int], codes: int, device) -> Tensor:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError("indices must be an int64 tensor")
    if list(indices.shape) != shape or indices.device != device:
        raise ValueError(f"indices is {list(indices.shape)} on {indices.device}; expected {shape} on {device}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        low, high = (int(n) for n in indices.aminmax())
        if low < -1 or high >= codes:
            raise ValueError(f"indices is out of range: {low} to {high} for {codes} codes")
    return indices


def reject_nonfinite(found: Tensor, mask: Tensor | None, nonfinite: str) -> None:
    """An error for vectors without a nearest code, where the host need not wait for it."""
    if nonfinite != "raise" or found.device.type != "cpu" or torch.compiler.is_compiling() or not found.numel():
        return
    if int(found.min()) < 0 and (mask is None or bool((found < 0)[mask.reshape(found.shape[:2])].any())):
        raise ValueError("z has a vector with NaN or infinity, or codebook has no finite code")


def _checked_state(codebook, cluster_size, embed_avg) -> tuple[Tensor, Tensor, Tensor]:
    """As [G, K, D], [G, K], [G, K, D]."""
    if codebook.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"codebook must be float32 or float64 to be updated, got {codebook.dtype}")
    given = (("codebook", codebook), ("cluster_size", cluster_size), ("embed_avg", embed_avg))
    for name, t in given:
        expected = codebook.shape[:-1] if name == "cluster_size" else codebook.shape
        if not isinstance(t, Tensor) or t.dtype != codebook.dtype:
            raise TypeError(f"{name} must be a tensor of {codebook.dtype}, as codebook")
        if t.shape != expected or t.device != codebook.device or not t.is_contiguous():
            raise ValueError(
                f"{name} is {list(t.shape)} on {t.device}; expected {list(expected)} on {codebook.device}, contiguous"
            )
    tensors = [t.detach() for _, t in given]
    return tuple(tensors if codebook.dim() == 3 else [t[None] for t in tensors])


# --- data-parallel sums ----------------------------------------------------------------------------------------------


def code_sums(
    z: Tensor, indices: Tensor, codes: int, cosine: bool, slots: bool, draw: tuple, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """[G, K, D + 1] over all ranks: sums and counts of each code's vectors; and with ``slots`` the vectors drawn for
    dead codes. ``draw`` is (seeds, seed, stream, offset)."""
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    run = _sums_op if torch.compiler.is_compiling() else _sums
    packed = run(z, indices, codes, cosine, slots, *draw, world, rank)
    if world > 1:
        dist.all_reduce(packed, group=group)
    return packed[0], packed[1] if slots else None


# --- torch.library ---------------------------------------------------------------------------------------------------


def run_on(op: str, *tensors: Tensor):
    """(name, function) of the backend; float64 is the reference's."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "reference", getattr(reference, op)
    return choose(FAMILY, op, tensors[0].device)


def _allocate(z: Tensor, codebook: Tensor, usage: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    groups, codes, _ = codebook.shape
    return (
        torch.empty_like(z),
        z.new_empty(2, dtype=wide),
        z.new_empty((), dtype=torch.int64),
        z.new_empty((groups, codes) if usage else (0,), dtype=torch.int64),
        z.new_empty(groups if usage else 0, dtype=wide),
    )


def _quantize(z: Tensor, codebook: Tensor, indices: Tensor, gradient: str, zeros: bool, usage: bool):
    z, codebook = z.detach(), codebook.detach()
    z_q, losses, valid, counts, perplexity = made = _allocate(z, codebook, usage)
    name, function = run_on("quantize", z, codebook)
    with profiling.op_range(FAMILY, f"quantize[{name}]", *z.shape, codebook.shape[1]):
        function(
            z, codebook, indices, zeros=zeros, z_q=z_q, losses=losses, valid=valid,
            counts=counts if usage else None, perplexity=perplexity if usage else None,
        )  # fmt: skip
    return made


_quantize_op = torch.library.custom_op(
    "genfast::quantize",
    _quantize,
    mutates_args=(),
    schema="(Tensor z, Tensor codebook, Tensor indices, str gradient, bool zeros, bool usage) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_quantize_op.register_fake
def _quantize_fake(z, codebook, indices, gradient, zeros, usage):
    return _allocate(z, codebook, usage)


def _quantize_backward(
    grad_z_q: Tensor | None, grad_losses: Tensor | None, z: Tensor, z_q: Tensor, indices: Tensor, valid: Tensor,
    codebook_shape: list[int], codebook_dtype: torch.dtype, gradient: str, zeros: bool, to_z: bool, to_codebook: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_z, grad_codebook = _allocate_gradients(z, codebook_shape, codebook_dtype, to_z, to_codebook)
    name, function = run_on("quantize_backward", z, grad_codebook)
    with profiling.op_range(FAMILY, f"quantize_backward[{name}]", *z.shape, codebook_shape[1]):
        function(
            grad_z_q, grad_losses, z, z_q, indices, valid, gradient=gradient, zeros=zeros, codes=codebook_shape[1],
            grad_z=grad_z if to_z else None, grad_codebook=grad_codebook if to_codebook else None,
        )  # fmt: skip
    return grad_z, grad_codebook


def _allocate_gradients(z, codebook_shape, codebook_dtype, to_z, to_codebook) -> tuple[Tensor, Tensor]:
    grad_z = torch.empty_like(z) if to_z else z.new_empty(0)
    return grad_z, z.new_empty(codebook_shape if to_codebook else (0,), dtype=codebook_dtype)


_quantize_backward_op = torch.library.custom_op(
    "genfast::quantize_backward",
    _quantize_backward,
    mutates_args=(),
    schema="(Tensor? grad_z_q, Tensor? grad_losses, Tensor z, Tensor z_q, Tensor indices, Tensor valid, "
    "SymInt[] codebook_shape, ScalarType codebook_dtype, str gradient, bool zeros, bool to_z, bool to_codebook) "
    "-> (Tensor, Tensor)",
)


@_quantize_backward_op.register_fake
def _quantize_backward_fake(
    grad_z_q, grad_losses, z, z_q, indices, valid, codebook_shape, codebook_dtype, gradient, zeros, to_z, to_codebook
):
    return _allocate_gradients(z, codebook_shape, codebook_dtype, to_z, to_codebook)


def _keep(ctx, inputs, output) -> None:
    z, codebook, indices, ctx.gradient, ctx.zeros, _ = inputs
    z_q, _, valid, counts, perplexity = output
    # Not the codebook: a moving average changes it before the backward pass. What was chosen is in z_q.
    ctx.save_for_backward(z, z_q, indices, valid)
    ctx.codebook = codebook.shape, codebook.dtype
    ctx.mark_non_differentiable(valid, counts, perplexity)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_z_q, grad_losses, *_):
    to_z, to_codebook = ctx.needs_input_grad[:2]
    grads = _quantize_backward_op(
        grad_z_q, grad_losses, *ctx.saved_tensors, *ctx.codebook, ctx.gradient, ctx.zeros, to_z, to_codebook
    )
    return (*(grad if needed else None for grad, needed in zip(grads, (to_z, to_codebook))), None, None, None, None)


_quantize_op.register_autograd(_gradients, setup_context=_keep)


def _ema(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, z: Tensor | None, indices: Tensor | None,
    decay: float, eps: float, cosine: bool, threshold: float, reset: float, seeds: Tensor | None, seed: int,
    stream: int, offset: int, sums: Tensor | None = None, slots: Tensor | None = None,
) -> None:  # fmt: skip
    numbers = dict(decay=decay, eps=eps, cosine=cosine, threshold=threshold, reset=reset)
    if sums is None:
        draw = dict(seed=seed if seeds is None else seeds, stream=stream, offset=offset)
        name, function = run_on("ema_update", codebook, z)
        with profiling.op_range(FAMILY, f"ema_update[{name}]", *z.shape, codebook.shape[1]):
            function(codebook, cluster_size, embed_avg, z, indices, **numbers, **draw)
    else:
        name, function = run_on("ema_apply", codebook, sums)
        with profiling.op_range(FAMILY, f"ema_apply[{name}]", *codebook.shape):
            function(codebook, cluster_size, embed_avg, sums, slots, **numbers)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((codebook, cluster_size, embed_avg))


_ema_op = torch.library.custom_op(
    "genfast::ema_update_",
    _ema,
    mutates_args=("codebook", "cluster_size", "embed_avg"),
    schema="(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_avg, Tensor? z, Tensor? indices, "
    "float decay, float eps, bool cosine, float threshold, float reset, Tensor? seeds, int seed, int stream, "
    "int offset, Tensor? sums=None, Tensor? slots=None) -> ()",
)


@_ema_op.register_fake
def _ema_fake(*_):
    return None


def _sums(
    z: Tensor, indices: Tensor, codes: int, cosine: bool, slots: bool, seeds: Tensor | None, seed: int, stream: int,
    offset: int, world: int, rank: int,
) -> Tensor:  # fmt: skip
    packed = _allocate_sums(z, codes, slots)
    name, function = run_on("code_sums", z)
    with profiling.op_range(FAMILY, f"code_sums[{name}]", *z.shape, codes):
        function(
            z, indices, cosine=cosine, sums=packed[0], slots=packed[1] if slots else None,
            seed=seed if seeds is None else seeds, stream=stream, offset=offset, world=world, rank=rank,
        )  # fmt: skip
    return packed


def _allocate_sums(z, codes, slots) -> Tensor:
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty((1 + slots, z.shape[2], codes, z.shape[3] + 1), dtype=wide)


_sums_op = torch.library.custom_op(
    "genfast::code_sums",
    _sums,
    mutates_args=(),
    schema="(Tensor z, Tensor indices, int codes, bool cosine, bool slots, Tensor? seeds, int seed, int stream, "
    "int offset, int world, int rank) -> Tensor",
)


@_sums_op.register_fake
def _sums_fake(z, indices, codes, cosine, slots, *_):
    return _allocate_sums(z, codes, slots)
