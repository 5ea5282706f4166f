"""The op ``residual_quantize`` of the family ``vector_quantize``: checks, choice of backend, torch.library.

There is no CUDA C++, as in :mod:`genfast.ops.vector_quantize`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.ops._codes import check_vectors, checked_codebook, checked_dim, grouped
from genfast.ops.vector_quantize import FAMILY, NONFINITE, PRECISIONS
from genfast.reference import residual_quantize as reference
from genfast.reference.vector_quantize import METRICS


@export(FAMILY)
def residual_quantize(
    z: Tensor,
    codebooks: Tensor | Sequence[Tensor],
    *,
    dim: int = -1,
    metric: str = "l2",
    precision: str = "exact",
    nonfinite: str = "raise",
    return_errors: bool = False,
) -> tuple[Tensor, ...]:
    """The codes whose sum is near to every vector: each stage quantises what the stages before have left.

    A whole stack of codebooks in one call, with the exact indices of :func:`nearest_code` on the float32 residual of
    every stage. Of the residuals only the last one is kept.

    Args:
        z: float32, bfloat16 or float16 (float64 runs the reference), with any strides; see :func:`nearest_code`.
        codebooks: [Q, K, D], a codebook for each stage; or [G, Q, K, D] for groups, where ``dim`` holds G D numbers.
            Fewer stages, as in quantizer dropout, are ``codebooks[:n]``. Or a sequence of Q codebooks [K, D] or
            [G, K, D], which are read where they lie; their K may differ.
        dim: the dimension of z that holds the vectors.
        metric, precision, nonfinite: as in :func:`nearest_code`.
        return_errors: also return what each stage has left.

    Returns:
        (indices, z_q): int64 of z's shape without ``dim``, then [G] if there are groups, then [Q]; and the sum of the
        codes, contiguous, of z's shape and dtype. With ``return_errors`` third |z - sum of the codes so far|^2, float32
        and shaped as the indices. Not differentiable: the straight-through estimator is ``z + (z_q - z).detach()``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range; a vector that is not
            finite.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: Zeghidour et al. 2021 (SoundStream, arXiv:2107.03312). The arithmetic:
    ``genfast/reference/residual_quantize.py``.
    """
    check_vectors("z", z)
    stages, single = _checked_stages(codebooks, z.device)
    if z.dim() == 0:
        raise ValueError("z is a single number; expected at least one dimension")
    dim = checked_dim(z, dim)
    groups, _, size = stages[0].shape
    if z.shape[dim] != groups * size:
        expected = f"{groups} groups of {size}" if groups > 1 else f"{size}"
        raise ValueError(f"z is {list(z.shape)}; expected {expected} in dimension {dim}, as codebooks has")
    for name, value, known in (
        ("metric", metric, METRICS), ("precision", precision, PRECISIONS), ("nonfinite", nonfinite, NONFINITE),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    rows = grouped(z, dim, groups)
    call = _residual_quantize_op if torch.compiler.is_compiling() else _residual_quantize
    indices, z_q, errors = call(
        rows.detach(), [t.detach() for t in stages], metric, precision == "exact", return_errors
    )
    watched = nonfinite == "raise" and z.device.type == "cpu" and not torch.compiler.is_compiling()
    if watched and indices.numel() and int(indices.min()) < 0:
        raise ValueError("z has a vector with NaN or infinity, or a codebook has no finite code")
    lead = [n for d, n in enumerate(z.shape) if d != dim]
    z_q = z_q.reshape(*lead, groups * size).movedim(-1, dim).contiguous()
    shape = [*lead, *([] if single else [groups]), len(stages)]
    indices = indices.movedim(0, -1).reshape(shape)
    return (indices, z_q, errors.movedim(0, -1).reshape(shape)) if return_errors else (indices, z_q)


def _checked_stages(codebooks, device) -> tuple[list[Tensor], bool]:
    """(the stages' codebooks as [G, K, D], whether they came without groups)"""
    if isinstance(codebooks, Tensor):
        check_vectors("codebooks", codebooks)
        if codebooks.dim() not in (3, 4) or 0 in codebooks.shape:
            raise ValueError(
                f"codebooks is {list(codebooks.shape)}; expected [Q, K, D] or [G, Q, K, D], none of them 0"
            )
        codebooks = codebooks.unbind(-3)
    if not codebooks:
        raise ValueError("codebooks has no stages")
    found = [checked_codebook(t, device, f"codebooks[{q}]") for q, t in enumerate(codebooks)]
    first = codebooks[0]
    for q, t in enumerate(codebooks):
        if (*t.shape[:-2], t.shape[-1]) != (*first.shape[:-2], first.shape[-1]):
            raise ValueError(f"codebooks[{q}] is {list(t.shape)}, and the first {list(first.shape)}; only K may differ")
    return found, first.dim() == 2


# --- torch.library ---------------------------------------------------------------------------------------------------


def _allocate(z: Tensor, stages: int, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (stages, *z.shape[:3])
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    z_q = z.new_empty(z.shape)
    return z.new_empty(shape, dtype=torch.int64), z_q, z.new_empty(shape if wanted else (0,), dtype=dtype)


def _residual_quantize(
    z: Tensor, codebooks: list[Tensor], metric: str, exact: bool, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    indices, z_q, errors = _allocate(z, len(codebooks), wanted)
    if torch.float64 in (z.dtype, *(t.dtype for t in codebooks)):
        name, function = "reference", reference.residual_quantize
    else:
        name, function = choose(FAMILY, "residual_quantize", z.device)
    with profiling.op_range(FAMILY, f"residual_quantize[{name}]", *z.shape, len(codebooks), codebooks[0].shape[1]):
        function(
            z, codebooks, metric=metric, exact=exact, indices=indices, z_q=z_q, errors=errors if wanted else None
        )  # fmt: skip
    return indices, z_q, errors


_residual_quantize_op = torch.library.custom_op(
    "genfast::residual_quantize",
    _residual_quantize,
    mutates_args=(),
    schema="(Tensor z, Tensor[] codebooks, str metric, bool exact, bool wanted) -> (Tensor, Tensor, Tensor)",
)


@_residual_quantize_op.register_fake
def _residual_quantize_fake(z, codebooks, metric, exact, wanted):
    return _allocate(z, len(codebooks), wanted)
