"""The op ``nearest_code`` of the family ``vector_quantize``: checks, choice of backend, torch.library.

There is no CUDA C++: the screen is a matrix product, which Triton hands to the tensor cores (wgmma on Hopper), and none
of the family's other ops does more than Triton writes well. A measurement on a GPU may say otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.ops._codes import checked_rows
from genfast.reference import vector_quantize as reference

FAMILY = "vector_quantize"
PRECISIONS = ("exact", "fast")
NONFINITE = ("raise", "index")
MOST_NEIGHBOURS = 16


@export(FAMILY)
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    dim: int = -1,
    k: int | None = None,
    precision: str = "exact",
    nonfinite: str = "raise",
    return_distances: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The nearest code of every vector, as an index; no matrix of rows by codes is made.

    ``"exact"`` gives the argmin of the distance in float64 of the stored values, the lowest index where several are
    equal, the same on every backend: most codes are ruled out in low precision with a bound on the error, and only
    those that are left are computed in float64.

    Args:
        z: float32, bfloat16 or float16 (float64 runs the reference), with any strides. Dimension ``dim`` holds the
            vectors: channel-last [..., D], or channel-first [B, D, H, W] with ``dim=1``, which is not copied.
        codebook: [K, D], or [G, K, D] for product and grouped quantisation, where ``dim`` holds G D numbers and group g
            is looked up in ``codebook[g]``. Its dtype may differ from z's.
        metric: ``"l2"`` the Euclidean distance, ``"cosine"`` the largest cosine, ``"dot"`` the largest inner product.
        dim: the dimension of z that holds the vectors.
        k: how many nearest codes, nearest first, at most 16 and at most K; by default the nearest alone, without a
            dimension for it.
        precision: ``"exact"``, or ``"fast"``: float32 arithmetic without float64 afterwards. Where distances agree
            within its rounding, as in a plain float32 computation, another of these codes may be returned.
        nonfinite: ``"raise"`` for an error where a vector has NaN or infinity (only on the CPU: on a GPU the host would
            have to wait), ``"index"`` for the index -1 there. Codes that are not finite are never chosen.
        return_distances: also return the distances.

    Returns:
        int64 of z's shape without ``dim``, then [G] if the codebook has groups, then [k] if k is given. With
        ``return_distances``, and float32 of the same shape (float64 of float64): the squared distance, the cosine, or
        the inner product. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range; a vector that is not
            finite.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: van den Oord et al. 2017 (VQ-VAE, arXiv:1711.00937). The arithmetic:
    ``genfast/reference/vector_quantize.py``.
    """
    rows, codes, dim = checked_rows(z, codebook, dim)
    for name, value, known in (
        ("metric", metric, reference.METRICS),
        ("precision", precision, PRECISIONS),
        ("nonfinite", nonfinite, NONFINITE),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    most = min(MOST_NEIGHBOURS, codes.shape[1])
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most):
        raise ValueError(f"k must be a whole number from 1 to {most}, got {k!r}")
    call = _nearest_code_op if torch.compiler.is_compiling() else _nearest_code
    indices, distances = call(rows.detach(), codes.detach(), metric, precision == "exact", k or 1, return_distances)
    watched = nonfinite == "raise" and z.device.type == "cpu" and not torch.compiler.is_compiling()
    if watched and indices.numel() and int(indices.min()) < 0:
        raise ValueError("z has a vector with NaN or infinity, or codebook has fewer than k finite codes")
    shape = [n for d, n in enumerate(z.shape) if d != dim]
    shape += [codes.shape[0]] * (codebook.dim() == 3) + ([] if k is None else [k])
    indices = indices.reshape(shape)
    return (indices, distances.reshape(shape)) if return_distances else indices


def nearest_rows(z: Tensor, codebook: Tensor, metric: str, exact: bool) -> Tensor:
    """int64 [B, S, G] of z [B, S, G, D] and codebook [G, K, D]; -1 where a vector is not finite."""
    call = _nearest_code_op if torch.compiler.is_compiling() else _nearest_code
    return call(z.detach(), codebook.detach(), metric, exact, 1, False)[0][..., 0]


# --- torch.library ---------------------------------------------------------------------------------------------------


def _allocate(z: Tensor, k: int, wanted: bool) -> tuple[Tensor, Tensor]:
    shape = (*z.shape[:3], k)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty(shape, dtype=torch.int64), z.new_empty(shape if wanted else (0,), dtype=dtype)


def _nearest_code(z: Tensor, codebook: Tensor, metric: str, exact: bool, k: int, wanted: bool) -> tuple[Tensor, Tensor]:
    indices, distances = _allocate(z, k, wanted)
    if torch.float64 in (z.dtype, codebook.dtype):
        name, function = "reference", reference.nearest_code
    else:
        name, function = choose(FAMILY, "nearest_code", z.device)
    with profiling.op_range(FAMILY, f"nearest_code[{name}]", *z.shape, codebook.shape[1]):
        function(z, codebook, metric=metric, exact=exact, indices=indices, distances=distances if wanted else None)
    return indices, distances


_nearest_code_op = torch.library.custom_op(
    "genfast::nearest_code",
    _nearest_code,
    mutates_args=(),
    schema="(Tensor z, Tensor codebook, str metric, bool exact, int k, bool wanted) -> (Tensor, Tensor)",
)


@_nearest_code_op.register_fake
def _nearest_code_fake(z, codebook, metric, exact, k, wanted):
    return _allocate(z, k, wanted)
