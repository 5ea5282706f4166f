"""The public ops of the family ``attention``: checks, choice of backend, gradients, torch.library.

There is no CUDA C++: on Hopper it could beat Triton (wgmma with TMA), but that is to be shown on a GPU before it is
written, and none has been at hand for this family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.attention_mask import AttentionMask
from genfast.backends import choose
from genfast.reference import attention as reference

FAMILY = "attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_HEAD = 256


@export(FAMILY)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that a structured mask lets each query see.

    No matrix of the size Lq x Lk is made, tiles that nothing sees are not read, and the result is the same to the bit
    from run to run and for any number of threads. Differentiable; gradients are as deterministic.

    Args:
        q: [B, H, Lq, D], float32, bfloat16 or float16 (float64 runs the reference), with any strides: a [B, Lq, H, D]
            tensor is passed as ``t.transpose(1, 2)`` and not copied.
        k: [B, Hkv, Lk, D], v: [B, Hkv, Lk, Dv], dtype and device of q. H is a multiple of Hkv: query heads
            h H/Hkv ... (h + 1) H/Hkv - 1 share key head h. D and Dv are at most 256.
        mask: an :class:`AttentionMask` of Lq queries and Lk keys, for one sequence or for B; every key is seen by
            default.
        scale: 1 / sqrt(D) by default.
        return_lse: also return the log-sum-exp of the scaled scores, see :func:`merge_states`.

    Returns:
        [B, H, Lq, Dv] in q's dtype and order of strides; with ``return_lse``, and float32 [B, H, Lq] (float64 of
        float64). A query that sees no key has 0 and -inf, and gradient 0. Scores, softmax and sums are float32; in half
        precision the probabilities are rounded to q's dtype before they meet v.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: Dao et al. 2022 (arXiv:2205.14135); the masks are of Arriola et al. 2025 (arXiv:2503.09573) and others, see
    :class:`AttentionMask`. The arithmetic: ``genfast/reference/attention.py``.
    """
    _check_tensors(q, k, v)
    ranges = _checked_ranges(mask, q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    plain = not torch.compiler.is_compiling() and not (
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    )
    out, lse = (_attention if plain else _attention_op)(q, k, v, ranges, scale)
    return (out, lse) if return_lse else out


@export(FAMILY)
def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys out of attentions over parts of them, by their log-sum-exp.

    Args:
        outs: [..., D] each, of one dtype and shape.
        lses: float32 [...] each, of :func:`attention` with ``return_lse``.

    Returns:
        (out, lse), as if all parts had been one. Differentiable.

    Raises:
        TypeError, ValueError: lists of different lengths, or tensors that do not go together.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many, at least one; got {len(outs)} and {len(lses)}")
    for k, (out, lse) in enumerate(zip(outs, lses)):
        if not isinstance(out, Tensor) or not isinstance(lse, Tensor) or out.dtype not in DTYPES:
            raise TypeError(f"outs[{k}] and lses[{k}] must be floating tensors")
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype or lse.shape != out.shape[:-1]:
            raise ValueError(f"outs[{k}] is {list(out.shape)}, lses[{k}] {list(lse.shape)}; expected as the first")
    return reference.merge_states(outs, lses)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_tensors(q, k, v) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES or t.dtype != q.dtype:
            raise TypeError(f"{name} is {t.dtype}; expected float32, bfloat16 or float16, the same for q, k and v")
        if t.dim() != 4:
            raise ValueError(f"{name} is {list(t.shape)}; expected [B, H, L, D]")
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device}; expected {q.device}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expected [B, H, Lq, D], [B, Hkv, Lk, D] and "
            "[B, Hkv, Lk, Dv]"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k and v {k.shape[1]}; expected a multiple")
    for name, size in (("q and k", q.shape[3]), ("v", v.shape[3])):
        if not 1 <= size <= LARGEST_HEAD:
            raise ValueError(f"{name} have heads of {size} numbers; expected 1 to {LARGEST_HEAD}")


def _checked_ranges(mask, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, AttentionMask):
        raise TypeError(
            f"mask must be an AttentionMask, got {type(mask).__name__} (AttentionMask.from_dense and from_block_mask "
            "convert)"
        )
    if (mask.q_len, mask.kv_len) != (q.shape[2], k.shape[2]) or mask.batch not in (1, q.shape[0]):
        raise ValueError(f"mask is {mask!r}; expected {q.shape[2]} queries and {k.shape[2]} keys, 1 or {q.shape[0]} x")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}; expected {q.device} (mask.to(q.device))")
    return mask.ranges


# --- torch.library ---------------------------------------------------------------------------------------------------


def _run(op: str, q: Tensor):
    """(name, function) of the backend; float64 is the reference's."""
    if q.dtype == torch.float64:
        return "reference", getattr(reference, op)
    return choose(FAMILY, op, q.device)


def _attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _allocate(q, v)
    name, function = _run("attention", q)
    with profiling.op_range(FAMILY, f"attention[{name}]", *q.shape, k.shape[2]):
        function(q.detach(), k.detach(), v.detach(), ranges=ranges, scale=scale, out=out, lse=lse)
    return out, lse


def _allocate(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    # [B, Lq, H, D] where q is that in memory.
    if q.stride(1) < q.stride(2):
        out = q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    else:
        out = q.new_empty((batch, heads, length, v.shape[3]))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((batch, heads, length), dtype=wide)


_attention_op = torch.library.custom_op(
    "genfast::attention",
    _attention,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? ranges, float scale) -> (Tensor, Tensor)",
)


@_attention_op.register_fake
def _attention_fake(q, k, v, ranges, scale):
    return _allocate(q, v)


def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    ranges: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [torch.empty_like(t) for t in (q, k, v)]
    name, function = _run("attention_backward", q)
    with profiling.op_range(FAMILY, f"attention_backward[{name}]", *q.shape, k.shape[2]):
        function(
            grad_out, grad_lse, q, k, v, out, lse, ranges=ranges, scale=scale,
            grad_q=grads[0], grad_k=grads[1], grad_v=grads[2],
        )  # fmt: skip
    return tuple(grads)


_attention_backward_op = torch.library.custom_op(
    "genfast::attention_backward",
    _attention_backward,
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? ranges, "
    "float scale) -> (Tensor, Tensor, Tensor)",
)


@_attention_backward_op.register_fake
def _attention_backward_fake(grad_out, grad_lse, q, k, v, out, lse, ranges, scale):
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    q, k, v, ranges, scale = inputs
    ctx.save_for_backward(q, k, v, *output, *(() if ranges is None else (ranges,)))
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *ranges = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _attention_backward_op(grad_out, grad_lse, q, k, v, out, lse, ranges[0] if ranges else None, ctx.scale)
    return (*grads, None, None)


_attention_op.register_autograd(_gradients, setup_context=_keep)
