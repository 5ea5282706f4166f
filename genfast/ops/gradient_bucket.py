"""The ops of the family ``gradient_bucket``: checks, choice of backend, torch.library.

Its CUDA C++ has what Triton has not: a list of tensors as an argument of the kernel, where Triton needs a table on the
device. Which of the two is the faster no GPU has said yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import HotPath, choose
from genfast.gradient_wire import BucketLayout

FAMILY = "gradient_bucket"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pack_path = HotPath(FAMILY, "pack_gradients")
unpack_path = HotPath(FAMILY, "unpack_gradients")
sum_path = HotPath(FAMILY, "unpack_sum")


@export(FAMILY)
class PackedBucket(NamedTuple):
    """What :func:`pack_gradients` returns: the bucket, and which tensors are finite."""

    wire: Tensor
    """uint8 [ranks, chunk_bytes], of the layout's shape."""
    finite: Tensor
    """bool [tensors], on the device: whether all values of a tensor are finite, also when cast to the wire's dtype. On
    a quantised wire one that is not spoils the block of 256 values around it, which :func:`unpack_gradients` finds."""


@export(FAMILY)
class Unpacked(NamedTuple):
    """What :func:`unpack_gradients` returns: the squared norm and finiteness of each tensor."""

    square_norm: Tensor
    """float64 [tensors], on the device: the sum of the squares of what was written, before its rounding to half
    precision."""
    finite: Tensor
    """bool [tensors], on the device."""


@export(FAMILY)
def pack_gradients(
    gradients: Sequence[Tensor],
    layout: BucketLayout,
    *,
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> PackedBucket:
    """Gradients into one bucket on the wire: scaled, residual added, rounded, checked for NaN, in one pass.

    Args:
        gradients: float32, bfloat16 or float16, of any shapes and strides, on one device; as many values each as
            ``layout`` says.
        layout: the :class:`BucketLayout`.
        scale: a float, or a float32 tensor of one number on the device; every value is multiplied by it.
        residual: float32 [layout.numel], for error feedback: added to the scaled values, then overwritten with what
            rounding took away. Where the wire carries NaN or infinity it stays as it was.
        out: where to write, uint8 of ``layout.shape``, contiguous.

    Returns:
        :class:`PackedBucket`. The same bits on every backend.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; nothing is then written.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: Dettmers 2016 (8-bit gradients, arXiv:1511.04561); Karimireddy et al. 2019 (error feedback,
    arXiv:1901.09847). The arithmetic: ``genfast/reference/gradient_bucket.py``.
    """
    if not torch.compiler.is_compiling() and _is_plain(out, layout) and _is_plain_residual(residual, layout):
        finite = torch.empty(len(layout.numels), dtype=torch.bool)
        wire = torch.empty(layout.shape, dtype=torch.uint8) if out is None else out
        kept = 0 if residual is None else residual.data_ptr()
        arguments = gradients, layout.numels, layout.native, scale, kept, wire.data_ptr(), 0, finite.data_ptr()
        if pack_path.run(*arguments) is not NotImplemented:
            return PackedBucket(wire, finite)
    gradients = _checked_gradients(gradients, layout)
    device = gradients[0].device if gradients else _device_of(out)
    scale, number = _checked_scale(scale, device)
    _check_residual(residual, layout.numel, device)
    out = _checked_wire("out", out, layout.shape, device)
    call = _pack_op if torch.compiler.is_compiling() else _pack
    finite = call(gradients, *_flat(layout), scale, number, residual, out)
    return PackedBucket(out, finite)


@export(FAMILY)
def reduce_chunks(
    received: Tensor,
    layout: BucketLayout,
    *,
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The chunk that this rank reduces, from every rank's part of it: read, summed in float32, rounded again.

    Args:
        received: uint8 ``layout.shape``: row r is what rank r sent, as after an all-to-all of packed buckets.
        layout: the :class:`BucketLayout`.
        scale: a float, or a float32 tensor of one number; the sum is multiplied by it (1 / ranks averages).
        residual: float32 [layout.chunk], the error feedback of this second rounding.
        out: where to write, uint8 [layout.chunk_bytes], contiguous; it may be a row of ``received``, and must not
            overlap it otherwise.

    Returns:
        uint8 [layout.chunk_bytes]. The sum runs from rank 0 upwards, so that the result does not depend on who
        computes it, and its error does not grow with the number of hops.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; nothing is then written.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.
    """
    _check_layout(layout)
    device = received.device if isinstance(received, Tensor) else None
    received = _checked_wire("received", received, layout.shape, device, made=False)
    scale, number = _checked_scale(scale, device)
    _check_residual(residual, layout.chunk, device)
    out = _checked_wire("out", out, layout.shape[1:], device)
    call = _reduce_op if torch.compiler.is_compiling() else _reduce
    call(received, *_flat(layout), scale, number, residual, out)
    return out


@export(FAMILY)
def unpack_gradients(
    reduced: Tensor, layout: BucketLayout, gradients: Sequence[Tensor], *, scale: float | Tensor = 1.0
) -> Unpacked:
    """A reduced bucket back into gradients: read, scaled, written, its squares added up and checked, in one pass.

    Args:
        reduced: uint8 ``layout.shape``: every rank's reduced chunk, as after an all-gather.
        layout: the :class:`BucketLayout`.
        gradients: where to write, as in :func:`pack_gradients`; tensors that share memory are not allowed.
        scale: a float, or a float32 tensor of one number; every value is multiplied by it (AMP's unscaling).

    Returns:
        :class:`Unpacked`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; nothing is then written.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.
    """
    if not torch.compiler.is_compiling() and reduced is not None and _is_plain(reduced, layout):
        square_norm, finite = _unpack_results(reduced, layout.numels)
        where = reduced.data_ptr(), square_norm.data_ptr(), finite.data_ptr()
        if unpack_path.run(gradients, layout.numels, layout.native, scale, 1, *where) is not NotImplemented:
            return Unpacked(square_norm, finite)
    gradients, device = _checked_targets(gradients, layout, reduced)
    reduced = _checked_wire("reduced", reduced, layout.shape, device, made=False)
    scale, number = _checked_scale(scale, device)
    call = _unpack_op if torch.compiler.is_compiling() else _unpack
    return Unpacked(*call(reduced, gradients, *_flat(layout), scale, number))


@export(FAMILY)
def unpack_sum(
    buckets: Tensor, layout: BucketLayout, gradients: Sequence[Tensor], *, scale: float | Tensor = 1.0
) -> Unpacked:
    """The sum of buckets into gradients: read, added in float32, scaled, written, checked, in one pass.

    Where every rank has all ranks' buckets there is nothing to gather, and no second rounding. There are kernels for
    it on CPUs; on GPUs it runs in plain PyTorch.

    Args:
        buckets: uint8 [n, *layout.shape], at least one: what the ranks packed.
        layout: the :class:`BucketLayout`.
        gradients: where to write, as in :func:`unpack_gradients`.
        scale: a float, or a float32 tensor of one number; the sum is multiplied by it (1 / n averages).

    Returns:
        :class:`Unpacked`. The sum runs from bucket 0 upwards.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; nothing is then written.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.
    """
    several = isinstance(buckets, Tensor) and buckets.dim() == 3 and len(buckets) > 0 and buckets.is_contiguous()
    if not torch.compiler.is_compiling() and several and _is_plain(buckets[0], layout):
        square_norm, finite = _unpack_results(buckets, layout.numels)
        where = buckets.data_ptr(), square_norm.data_ptr(), finite.data_ptr()
        if sum_path.run(gradients, layout.numels, layout.native, scale, len(buckets), *where) is not NotImplemented:
            return Unpacked(square_norm, finite)
    gradients, device = _checked_targets(gradients, layout, buckets)
    count = len(buckets) if isinstance(buckets, Tensor) and buckets.dim() else 0
    buckets = _checked_wire("buckets", buckets, (max(count, 1), *layout.shape), device, made=False)
    scale, number = _checked_scale(scale, device)
    call = _sum_op if torch.compiler.is_compiling() else _sum
    return Unpacked(*call(buckets, gradients, *_flat(layout), scale, number))


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_layout(layout) -> None:
    if not isinstance(layout, BucketLayout):
        raise TypeError(f"layout must be a BucketLayout, got {type(layout).__name__}")


def _device_of(t) -> torch.device:
    return t.device if isinstance(t, Tensor) else torch.device("cpu")


def _is_plain(wire, layout) -> bool:
    """Whether a bucket, if there is one, is what the hot path may take unseen; the path looks at the tensors itself."""
    if type(layout) is not BucketLayout:
        return False
    return wire is None or (
        type(wire) is Tensor and wire.dtype is torch.uint8 and wire.is_cpu and wire.is_contiguous()
        and wire.shape == layout.shape
    )  # fmt: skip


def _is_plain_residual(residual, layout) -> bool:
    return residual is None or (
        type(residual) is Tensor and residual.dtype is torch.float32 and residual.is_cpu and residual.is_contiguous()
        and residual.shape == (layout.numel,)
    )  # fmt: skip


def _checked_gradients(gradients, layout) -> list[Tensor]:
    _check_layout(layout)
    gradients = list(gradients)
    if len(gradients) != len(layout.numels):
        raise ValueError(f"gradients has {len(gradients)} tensors; expected {len(layout.numels)}, as layout has")
    for k, (t, numel) in enumerate(zip(gradients, layout.numels)):
        if not isinstance(t, Tensor):
            raise TypeError(f"gradients[{k}] must be a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES or t.layout is not torch.strided:
            raise TypeError(f"gradients[{k}] must be dense float32, bfloat16 or float16; got {t.dtype}, {t.layout}")
        if t.numel() != numel:
            raise ValueError(f"gradients[{k}] has {t.numel()} values; expected {numel}, as layout has")
        if t.device != gradients[0].device:
            raise ValueError(f"gradients[{k}] is on {t.device}; expected {gradients[0].device}, as the first")
    return [t.detach() for t in gradients]


def _checked_targets(gradients, layout, wire) -> tuple[list[Tensor], torch.device]:
    """Gradients to be written, and their device."""
    gradients = _checked_gradients(gradients, layout)
    for k, t in enumerate(gradients):
        if any(n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride())):
            raise ValueError(f"gradients[{k}] is an expanded tensor: several of its elements share one place in memory")
    return gradients, gradients[0].device if gradients else _device_of(wire)


def _checked_scale(scale, device) -> tuple[Tensor | None, float]:
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != device:
            raise ValueError(
                f"scale is {scale.dtype} {list(scale.shape)} on {scale.device}; expected one float32 on {device}"
            )
        return scale.detach().reshape(()), 1.0
    return None, float(scale)


def _check_residual(residual, numel: int, device) -> None:
    if residual is None:
        return
    if not isinstance(residual, Tensor) or residual.dtype != torch.float32 or not residual.is_contiguous():
        raise TypeError("residual must be a contiguous float32 tensor")
    if residual.shape != (numel,) or residual.device != device:
        raise ValueError(
            f"residual is {list(residual.shape)} on {residual.device}; expected [{numel}] on {device}, as layout says"
        )


def _checked_wire(name: str, t, shape, device, made: bool = True) -> Tensor:
    if t is None and made:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    if not isinstance(t, Tensor) or t.dtype != torch.uint8 or not t.is_contiguous():
        raise TypeError(f"{name} must be a contiguous uint8 tensor")
    if t.shape != shape or t.device != device:
        raise ValueError(f"{name} is {list(t.shape)} on {t.device}; expected {list(shape)} on {device}")
    return t


# --- torch.library ---------------------------------------------------------------------------------------------------


def _flat(layout: BucketLayout) -> tuple[list[int], int, str]:
    return list(layout.numels), layout.ranks, layout.wire


def _run(op: str, device, size: int, *arguments, **options) -> None:
    name, function = choose(FAMILY, op, device)
    with profiling.op_range(FAMILY, f"{op}[{name}]", size):
        function(*arguments, **options)


def _pack(
    gradients: Sequence[Tensor], numels: Sequence[int], ranks: int, wire: str, scale: Tensor | None, number: float,
    residual: Tensor | None, out: Tensor,
) -> Tensor:  # fmt: skip
    layout = BucketLayout(numels, ranks, wire)
    finite = out.new_empty(len(numels), dtype=torch.bool)
    _run(
        "pack_gradients", out.device, layout.numel, gradients, layout=layout,
        scale=number if scale is None else scale, residual=residual, out=out, finite=finite,
    )  # fmt: skip
    return finite


def _reduce(
    received: Tensor, numels: Sequence[int], ranks: int, wire: str, scale: Tensor | None, number: float,
    residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    layout = BucketLayout(numels, ranks, wire)
    _run(
        "reduce_chunks", out.device, layout.chunk, received, layout=layout,
        scale=number if scale is None else scale, residual=residual, out=out,
    )  # fmt: skip


def _unpack(
    reduced: Tensor, gradients: Sequence[Tensor], numels: Sequence[int], ranks: int, wire: str, scale: Tensor | None,
    number: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _unpack_by("unpack_gradients", reduced, gradients, BucketLayout(numels, ranks, wire), scale, number)


def _sum(
    buckets: Tensor, gradients: Sequence[Tensor], numels: Sequence[int], ranks: int, wire: str, scale: Tensor | None,
    number: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _unpack_by("unpack_sum", buckets, gradients, BucketLayout(numels, ranks, wire), scale, number)


def _unpack_by(op, buckets, gradients, layout, scale, number) -> tuple[Tensor, Tensor]:
    square_norm, finite = _unpack_results(buckets, layout.numels)
    _run(
        op, buckets.device, layout.numel, buckets, gradients, layout=layout,
        scale=number if scale is None else scale, square_norm=square_norm, finite=finite,
    )  # fmt: skip
    return square_norm, finite


def _unpack_results(reduced, numels) -> tuple[Tensor, Tensor]:
    return reduced.new_empty(len(numels), dtype=torch.float64), reduced.new_empty(len(numels), dtype=torch.bool)


_LAYOUT = "SymInt[] numels, int ranks, str wire, Tensor? scale, float number"
_pack_op = torch.library.custom_op(
    "genfast::pack_gradients",
    _pack,
    mutates_args=("residual", "out"),
    schema=f"(Tensor[] gradients, {_LAYOUT}, Tensor(a!)? residual, Tensor(b!) out) -> Tensor",
)
_reduce_op = torch.library.custom_op(
    "genfast::reduce_chunks",
    _reduce,
    mutates_args=("residual", "out"),
    schema=f"(Tensor received, {_LAYOUT}, Tensor(a!)? residual, Tensor(b!) out) -> ()",
)
_unpack_op = torch.library.custom_op(
    "genfast::unpack_gradients",
    _unpack,
    mutates_args=("gradients",),
    schema=f"(Tensor reduced, Tensor(a!)[] gradients, {_LAYOUT}) -> (Tensor, Tensor)",
)

_sum_op = torch.library.custom_op(
    "genfast::unpack_sum",
    _sum,
    mutates_args=("gradients",),
    schema=f"(Tensor buckets, Tensor(a!)[] gradients, {_LAYOUT}) -> (Tensor, Tensor)",
)


@_sum_op.register_fake
@_unpack_op.register_fake
def _unpack_fake(reduced, gradients, numels, ranks, wire, scale, number):
    return _unpack_results(reduced, numels)


@_pack_op.register_fake
def _pack_fake(gradients, numels, ranks, wire, scale, number, residual, out):
    return out.new_empty(len(numels), dtype=torch.bool)


@_reduce_op.register_fake
def _reduce_fake(received, numels, ranks, wire, scale, number, residual, out):
    return None
