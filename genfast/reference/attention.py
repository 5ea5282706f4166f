"""Masked attention in plain PyTorch, forward and backward: the specification of ``attention``.

With s_ij = scale q_i . k_j over the keys j that row i sees,

    lse_i = log sum_j e^(s_ij),    p_ij = e^(s_ij - lse_i),    o_i = sum_j p_ij v_j;

a row that sees no key has o = 0 and lse = -inf. With do and dlse the gradients of o and lse,

    delta_i = do_i . o_i - dlse_i,    ds_ij = p_ij (do_i . v_j - delta_i),
    dq_i = scale sum_j ds_ij k_j,    dk_j = scale sum_i ds_ij q_i,    dv_j = sum_i p_ij do_i,

where the sums of dk and dv run over all query heads that share a key head. Arithmetic is float32, or float64 where the
inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(ranges: Tensor, kv_len: int) -> Tensor:
    """bool [B, 1, Lq, Lk] of the intervals int32 [B, Lq, 4] of an :class:`genfast.AttentionMask`."""
    keys = torch.arange(kv_len, device=ranges.device)
    begin, end, begin2, end2 = (ranges[..., k, None] for k in range(4))
    return (((keys >= begin) & (keys < end)) | ((keys >= begin2) & (keys < end2)))[:, None]


def wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def scores(q: Tensor, k: Tensor, ranges: Tensor | None, scale: float) -> Tensor:
    """s, -inf where a key is not seen, [B, H, Lq, Lk]."""
    s = scale * (wide(q) @ wide(k).repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
    return s if ranges is None else s.masked_fill(~visible(ranges, k.shape[2]), -torch.inf)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, ranges: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    """See :func:`genfast.attention`; out and lse are written."""
    s = scores(q, k, ranges, scale)
    found = s.logsumexp(-1)
    p = (s - found.masked_fill(found == -torch.inf, 0.0)[..., None]).exp()
    out.copy_(p @ wide(v).repeat_interleave(q.shape[1] // v.shape[1], 1))
    lse.copy_(found)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    ranges: Tensor | None,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """The three gradients, written."""
    group = q.shape[1] // k.shape[1]
    s = scores(q, k, ranges, scale)
    p = (s - lse.to(s.dtype).masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    do = wide(grad_out)
    delta = (do * wide(out)).sum(-1, keepdim=True)
    if grad_lse is not None:
        # Nothing depends on the lse of a row that sees nothing, whatever its gradient.
        delta = delta - grad_lse.to(s.dtype).masked_fill(lse == -torch.inf, 0.0)[..., None]
    ds = p * (do @ wide(v).repeat_interleave(group, 1).mT - delta)
    grad_q.copy_(scale * (ds @ wide(k).repeat_interleave(group, 1)))

    def of_group(t: Tensor) -> Tensor:
        return t.unflatten(1, (k.shape[1], group)).sum(2)

    grad_k.copy_(scale * of_group(ds.mT @ wide(q)))
    grad_v.copy_(of_group(p.mT @ do))


def merge_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """See :func:`genfast.merge_states`, which has no kernel: a part weighs e^(its lse - the whole lse)."""
    total = torch.stack(lses).logsumexp(0)
    seen = total.masked_fill(total == -torch.inf, 0.0)
    merged = sum(out.to(total.dtype) * (lse - seen).exp()[..., None] for out, lse in zip(outs, lses))
    return merged.to(outs[0].dtype), total
