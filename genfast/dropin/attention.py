r"""PyTorch's two attention functions, with their signatures, on :func:`genfast.attention` where the mask has structure.

==================================== ==================================================================================
runs on ``genfast.attention``        runs on PyTorch
==================================== ==================================================================================
no mask, ``is_causal=True``          ``dropout_p > 0``, ``score_mod``, ``return_aux`` with ``max_scores``
an :class:`AttentionMask`            a mask of more than two runs of keys per query, or one that differs between heads
a BlockMask (see below)              a ``BACKEND`` in ``kernel_options``
a dense mask (see below)             an additive mask of other numbers than 0 and -inf
float32, bfloat16, float16           float64, tensors that are not [B, H, L, D], heads of more than 256 numbers, nested
                                     tensors and other subclasses, ``torch.func`` transforms, batches that broadcast
CPU with its module, CUDA            any other device, and where no fused backend is there
==================================== ==================================================================================

**BlockMask.** One that :meth:`AttentionMask.to_block_mask` made is known at no cost. Any other is converted at its
first use (its ``mask_mod`` is evaluated once for every pair, as ``create_block_mask`` does) and remembered as long as
it lives: tensors that its ``mask_mod`` reads must not change, which would not reach its blocks either.

**Dense masks** [.., Lq, Lk] that are the same for all heads: bool, or additive of 0 and -inf (or the least number of
the dtype, where every query sees some key). Reading one costs about half a nanosecond per pair on a CPU, some
hundredths of the attention itself. It is done on CPUs only (it needs an answer on the host), and from
:data:`LEAST_WORK` on; what was found is remembered as long as the tensor lives and is not changed in place. Tensors
made in inference mode do not tell of changes and are read at every call.

**A query that sees no key** has 0, log-sum-exp -inf and gradient 0. So say PyTorch's functions (2.13) for bool masks
and -inf; softmax written out says NaN.

**Autocast** converts query, key and value as PyTorch's functions do. Second derivatives are not there, as in PyTorch's
fused kernels. Under ``torch.compile`` masks are known by their kind alone: no mask, ``is_causal``, an AttentionMask and
a BlockMask made of one; the rest is PyTorch's.
"""

from __future__ import annotations

import functools
import weakref

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as peer
from torch.utils.weak import WeakTensorKeyDictionary

from genfast.attention_mask import AttentionMask
from genfast.backends import has_fused
from genfast.ops.attention import FAMILY, LARGEST_HEAD, attention

__all__ = ["flex_attention", "scaled_dot_product_attention"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_WORK = 2**22
"""B H Lq Lk D from which a dense mask that was not seen before is read: below, PyTorch is done sooner."""

UNKNOWN = object()
"""In place of a mask: PyTorch has to take it."""

_of_block_masks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_of_tensors = WeakTensorKeyDictionary()


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod=None,
    block_mask=None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options=None,
    *,
    return_aux=None,
):
    """``torch.nn.attention.flex_attention.flex_attention``; see the module for what runs where.

    Unlike it, on CPUs it has gradients, and it need not be compiled to be fast.

    Args:
        block_mask: a BlockMask; an :class:`AttentionMask` is taken as well.
        kernel_options: of PyTorch's kernels. Sizes of tiles and the like are used only where PyTorch runs; a
            ``BACKEND`` is an order, and PyTorch runs.

    Returns:
        [B, H, Lq, Dv]; with ``return_lse`` and float32 [B, H, Lq], or with ``return_aux`` and an AuxOutput.
    """
    q, k, v = autocast(query, key, value)
    orders = {"BACKEND", "FORCE_USE_FLEX_ATTENTION"} & set(kernel_options or ())
    plain = score_mod is None and not orders and not (return_lse and return_aux is not None)
    if plain and not getattr(return_aux, "max_scores", False) and takes(q, k, v, enable_gqa):
        mask = of_block_mask(block_mask)
        if mask is None or (mask is not UNKNOWN and fits(mask, q, k)):
            lse = return_lse or getattr(return_aux, "lse", False)
            found = attention(q, k, v, mask=mask, scale=scale, return_lse=lse)
            if return_aux is None:
                return found
            return (found[0], peer.AuxOutput(lse=found[1])) if lse else (found, peer.AuxOutput())
    if isinstance(block_mask, AttentionMask):
        block_mask = block_mask.to_block_mask()
    later = {} if return_aux is None else {"return_aux": return_aux}  # torch 2.7 does not know it
    return peer.flex_attention(
        query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse, kernel_options, **later
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | AttentionMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``; see the module for what runs where.

    Args:
        attn_mask: as there, or an :class:`AttentionMask`.

    Raises:
        ValueError: an AttentionMask with ``is_causal``, or of other lengths than query and key.
        RuntimeError, ValueError: PyTorch's own.
    """
    ours = isinstance(attn_mask, AttentionMask)
    if ours and is_causal:
        raise ValueError("attn_mask is an AttentionMask, so is_causal must be False (`& AttentionMask.causal(..)`)")
    if ours and not fits(attn_mask, query, key):
        raise ValueError(
            f"attn_mask is {attn_mask!r}; query is {list(query.shape)}, key {list(key.shape)} on {query.device}"
        )
    q, k, v = autocast(query, key, value)
    if dropout_p == 0 and takes(q, k, v, enable_gqa):
        mask = of_attn_mask(attn_mask, is_causal, q, k)
        if mask is not UNKNOWN:
            return attention(q, k, v, mask=mask, scale=scale)
    if ours:
        attn_mask = attn_mask.to_dense()[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


# --- tensors ---------------------------------------------------------------------------------------------------------


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in the dtype of the autocast that is on, if one is."""
    given = q, k, v
    if not all(isinstance(t, Tensor) and t.dtype in DTYPES and t.device.type in ("cpu", "cuda") for t in given):
        return given
    if not torch.is_autocast_enabled(q.device.type):
        return given
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(t.to(dtype) for t in given)


def takes(q, k, v, enable_gqa: bool) -> bool:
    """Whether :func:`genfast.attention` runs on these, fused."""
    tensors = (q, k, v)
    if not all(isinstance(t, Tensor) for t in tensors) or torch.overrides.has_torch_function(tensors):
        return False
    if any(t.is_nested or t.layout != torch.strided or t.dim() != 4 for t in tensors) or q.dtype not in DTYPES:
        return False
    if any(t.dtype != q.dtype or t.device != q.device for t in tensors) or torch._C._are_functorch_transforms_active():
        return False
    heads, key_heads = q.shape[1], k.shape[1]
    if heads != key_heads and not (enable_gqa and key_heads and heads % key_heads == 0):
        return False
    same = q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    sizes = 1 <= q.shape[3] <= LARGEST_HEAD and 1 <= v.shape[3] <= LARGEST_HEAD and key_heads > 0
    return same and sizes and _has_fused(q.device.type)


@torch.compiler.assume_constant_result
def _has_fused(device: str) -> bool:
    return has_fused(FAMILY, device)


def fits(mask: AttentionMask, q: Tensor, k: Tensor) -> bool:
    """Whether the mask is of the tensors' lengths, batch and device."""
    lengths = (mask.q_len, mask.kv_len) == (q.shape[-2], k.shape[-2])
    return lengths and mask.batch in (1, q.shape[0]) and mask.device == q.device


# --- masks -----------------------------------------------------------------------------------------------------------


def of_block_mask(block_mask):
    """The AttentionMask of a BlockMask, None of None, UNKNOWN of one that is none."""
    if block_mask is None or isinstance(block_mask, AttentionMask):
        return block_mask
    own = getattr(block_mask, "attention_mask", None)
    if isinstance(own, AttentionMask):
        return own
    if torch.compiler.is_compiling():
        return UNKNOWN
    if block_mask not in _of_block_masks:
        _of_block_masks[block_mask] = _converted(AttentionMask.from_block_mask, block_mask)
    return _of_block_masks[block_mask]


def of_attn_mask(attn_mask, is_causal: bool, q: Tensor, k: Tensor):
    """The AttentionMask (or None) of SDPA's arguments; UNKNOWN of what is none, or does not pay."""
    if isinstance(attn_mask, AttentionMask):
        return attn_mask
    if attn_mask is None:
        if not is_causal:
            return None
        return causal_mask(q.shape[2], k.shape[2], q.device)
    if is_causal or not isinstance(attn_mask, Tensor) or torch.compiler.is_compiling():
        return UNKNOWN
    work = q.numel() * k.shape[2]
    return of_dense(attn_mask, q, k, read=q.device.type == "cpu" and work >= LEAST_WORK)


def causal_mask(q_len: int, kv_len: int, device: torch.device) -> AttentionMask:
    """Query i sees the keys up to i; one is kept for the lengths that come up."""
    if torch.compiler.is_compiling():
        return AttentionMask.causal(q_len, kv_len, device=device)
    return _causal(q_len, kv_len, device)


@functools.lru_cache(maxsize=32)
def _causal(q_len: int, kv_len: int, device: torch.device) -> AttentionMask:
    with torch.inference_mode(False):  # it is kept, and saved for backward later
        return AttentionMask.causal(q_len, kv_len, device=device)


def of_dense(dense: Tensor, q: Tensor, k: Tensor, read: bool = True):
    """The AttentionMask of a dense mask, or UNKNOWN.

    Args:
        read: also look into a mask that was not seen before.
    """
    if torch.overrides.has_torch_function((dense,)) or dense.requires_grad or dense.device != q.device:
        return UNKNOWN
    lengths = q.shape[2], k.shape[2]
    rows = _rows(dense, q.shape[0], q.shape[1], *lengths)
    if rows is None:
        return UNKNOWN
    # What the tensor was when it was read; without a count of changes nothing can be remembered.
    state = None if dense.is_inference() else (dense._version, dense.data_ptr(), dense.stride(), *lengths)
    known, mask = _of_tensors.get(dense, (None, None))
    if state is not None and known == state:
        return mask
    if not read:
        return UNKNOWN
    mask = _converted(_of_rows, rows, lengths[0])
    if state is not None:
        _of_tensors[dense] = (state, mask)
    return mask


def _rows(dense: Tensor, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor | None:
    """[1 or B, 1 or Lq, Lk] of what broadcasts to [B, H, Lq, Lk]; None of other shapes, and where heads differ."""
    if not 2 <= dense.dim() <= 4 or not dense.numel():
        return None
    wide = dense[(None,) * (4 - dense.dim())]
    fit = all(n in (1, m) for n, m in zip(wide.shape, (batch, heads, q_len, kv_len)))
    if not fit or (wide.shape[1] != 1 and wide.stride(1) != 0):
        return None
    rows = wide[:, 0]
    for dim in (0, 1):
        if rows.shape[dim] > 1 and rows.stride(dim) == 0:
            rows = rows.narrow(dim, 0, 1)
    return rows.expand(-1, -1, kv_len)


def _of_rows(rows: Tensor, q_len: int) -> AttentionMask:
    if rows.dtype != torch.bool:
        rows = _seen(rows)
    mask = AttentionMask.from_dense(rows)
    if mask.q_len == q_len:
        return mask
    return AttentionMask(mask.ranges.expand(-1, q_len, -1).contiguous(), mask.kv_len, mask.description)


def _seen(bias: Tensor) -> Tensor:
    """bool of an additive mask."""
    if not bias.is_floating_point():
        raise TypeError("an additive mask is of floating numbers")
    seen, never = bias == 0, bias == -torch.inf
    hidden = never | (bias == torch.finfo(bias.dtype).min)
    # A query whose scores are all the least number sees all keys alike; one that has only -inf sees none.
    decided = seen.any(-1) | never.all(-1)
    if not bool((seen | hidden).all()) or not bool(decided.all()):
        raise ValueError("an additive mask of other numbers than 0 and -inf")
    return seen


def _converted(convert, *arguments):
    """What ``convert`` makes, to be kept; UNKNOWN of what it cannot take."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            return convert(*arguments)
    except Exception:  # whatever goes wrong, also in a mask_mod of somebody's, is PyTorch's to report
        return UNKNOWN
