"""Cases of ``attention``: every structure of mask, head counts and sizes, dtypes, strides, forward and backward.

The oracle is autograd through a dense softmax in float64, with nothing of ours but ``AttentionMask.to_dense``. The same
in the case's own dtype sets the bound, or for float32 the reference: gradients from a stored log-sum-exp carry its
rounding, which a softmax that keeps its probabilities does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genfast.attention_mask import AttentionMask
from genfast.backends import backend
from genfast.checks import compare
from genfast.ops.attention import attention

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ("BHLD", "BLHD", "wide", "columns")
"""``wide``: NaN beyond every row of D numbers; ``columns``: the numbers of a head are not neighbours."""


def _uneven(batch: int, length: int) -> Tensor:
    """Lengths from the whole to 0."""
    return torch.tensor([length - (length * 5 * b // 7) % (length + 1) for b in range(batch)])


def _rows(batch: int, length: int, at: Callable[[Tensor], Tensor]) -> Tensor:
    return at(torch.arange(batch * length).view(batch, length))


MASKS: dict[str, Callable[[int, int, int], AttentionMask | None]] = {
    "none": lambda b, q, k: None,
    "full": lambda b, q, k: AttentionMask.full(q, k),
    "right padding": lambda b, q, k: AttentionMask.padding(_uneven(b, k), k, q_len=q),
    "left padding": lambda b, q, k: AttentionMask.padding(
        torch.full((b,), k), k, q_len=q, start=_uneven(b, k).flip(0) // 2
    ),
    "one sequence is padding": lambda b, q, k: AttentionMask.padding(torch.arange(b) * k // max(b - 1, 1), k, q_len=q),
    "varlen": lambda b, q, k: AttentionMask.varlen(
        torch.tensor([0, q // 5, q // 5, q // 2, q]), torch.tensor([0, k // 3, k // 2, k // 2 + 1, k])
    ),
    "causal": lambda b, q, k: AttentionMask.causal(q, k, q_offset=k - q),
    "block causal": lambda b, q, k: AttentionMask.block_causal(q, 12, kv_len=k),
    "block causal, offsets": lambda b, q, k: AttentionMask.block_causal(
        q, 8, kv_len=k, q_offset=torch.arange(b) * 11 - 9
    ),
    "block diffusion": lambda b, q, k: AttentionMask.block_diffusion(q // 2, 12),
    "block diffusion, packed": lambda b, q, k: AttentionMask.block_diffusion([q // 4, 0, q // 2 - q // 4], 8),
    "block diffusion, interleaved": lambda b, q, k: AttentionMask.block_diffusion(
        [q // 5, q // 2 - q // 5], 16, interleaved=True
    ),
    "prefix": lambda b, q, k: AttentionMask.prefix(torch.arange(b) * q // 3, q),
    "sliding window": lambda b, q, k: AttentionMask.sliding_window(q, 20, 3, kv_len=k, q_offset=k - q),
    "window and first keys": lambda b, q, k: (
        AttentionMask.sliding_window(q, 10, 10, kv_len=k)
        | AttentionMask.intervals(torch.zeros(q, dtype=torch.int64), torch.full((q,), 5), kv_len=k)
    ),
    "intervals, rows without keys": lambda b, q, k: AttentionMask.intervals(
        _rows(b, q, lambda i: i * 7 % k),
        _rows(b, q, lambda i: (i * 7 % k + i * 5 % (k // 2 + 1)) * (i % 3 > 0)),
        _rows(b, q, lambda i: i * 11 % k),
        _rows(b, q, lambda i: (i * 11 % k + 2) * (i % 5 > 0) * (i % 3 > 0)),
        kv_len=k,
    ),
    "nothing": lambda b, q, k: AttentionMask.full(q, k) & AttentionMask.intervals(*torch.zeros(2, q).long(), kv_len=k),
}
"""Mask by name, of batch, queries and keys."""


@dataclass(frozen=True)
class AttentionCase:
    """One call of ``attention``; ``shape`` is (B, H, Hkv, Lq, Lk, D, Dv), ``mask`` a key of ``MASKS``."""

    shape: tuple[int, int, int, int, int, int, int]
    mask: str = "none"
    dtype: torch.dtype = F32
    layout: str = "BHLD"
    backward: bool = False
    """Also the three gradients, by autograd, of a random combination of outputs and log-sum-exps."""
    scale: float | None = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        extra = [self.layout] * (self.layout != "BHLD") + [f"scale={self.scale}"] * (self.scale is not None)
        return " ".join(["x".join(map(str, self.shape)), self.mask, dtype, *extra, *["backward"] * self.backward])

    def arguments(self, device="cpu") -> tuple[Tensor, Tensor, Tensor, AttentionMask | None]:
        """q, k, v and the mask."""
        batch, heads, kv_heads, q_len, kv_len, size, v_size = self.shape
        draw = torch.Generator().manual_seed(sum(self.shape))
        shapes = (batch, heads, q_len, size), (batch, kv_heads, kv_len, size), (batch, kv_heads, kv_len, v_size)
        tensors = [_laid_out(torch.randn(s, generator=draw).to(device, self.dtype), self.layout) for s in shapes]
        mask = MASKS[self.mask](batch, q_len, kv_len)
        return (*tensors, None if mask is None else mask.to(device))

    def gradients(self, device="cpu") -> tuple[Tensor, Tensor]:
        """Those of the output and of the log-sum-exp."""
        batch, heads, _, q_len, _, _, v_size = self.shape
        draw = torch.Generator().manual_seed(1)
        grad_out = torch.randn((batch, heads, q_len, v_size), generator=draw)
        grad_lse = torch.randn((batch, heads, q_len), generator=draw)
        return _laid_out(grad_out.to(device, self.dtype), self.layout), grad_lse.to(device)


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "BLHD":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "wide":
        return torch.nn.functional.pad(t, (0, 3), value=torch.nan)[..., : t.shape[-1]]
    if layout == "columns":
        return t.mT.contiguous().mT
    return t


# More than 256 rows to a key head, which the CPU has another kernel for than for the few of the shapes below.
_ODD = (2, 8, 2, 78, 78, 40, 40)
_EVEN = (2, 3, 1, 128, 128, 64, 64)
_SQUARE_ONLY = ("block diffusion", "prefix")


def cases(quick: bool = False) -> list[AttentionCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every fourth."""
    found = [
        AttentionCase(shape, mask, dtype, backward=True)
        for shape, dtypes in ((_ODD, (F32, BF16)), (_EVEN, (F32, F16)))
        for mask in MASKS
        for dtype in dtypes
    ]
    # Few queries over many keys, heads of every kind, more values than keys.
    for shape in ((2, 8, 2, 5, 300, 64, 64), (1, 6, 1, 33, 190, 80, 24), (2, 3, 3, 100, 50, 8, 128)):
        found += [
            AttentionCase(shape, mask, dtype, backward=dtype != F16)
            for mask in MASKS
            if not mask.startswith(_SQUARE_ONLY)
            for dtype in (F32, BF16, F16)
        ]
    for size in (1, 16, 33, 96, 128, 256):
        shape = (1, 4, 1, 70, 70, size, size)
        found += [AttentionCase(shape, "block diffusion", dtype, backward=True) for dtype in (F32, BF16)]
    for layout in LAYOUTS[1:]:
        found += [
            AttentionCase(_ODD, mask, dtype, layout, backward=True)
            for mask in ("none", "window and first keys")
            for dtype in (F32, BF16)
        ]
    found += [AttentionCase(_ODD, "block causal", BF16, scale=scale, backward=True) for scale in (-0.3, 0.0, 1.0)]
    for shape in ((0, 2, 1, 5, 5, 16, 16), (2, 2, 1, 0, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16), (1, 1, 1, 1, 1, 16, 16)):
        found.append(AttentionCase(shape, backward=True))
    return found[::4] if quick else found


def check(case: AttentionCase, device) -> tuple[float, float]:
    """Error and what is allowed, of the result that comes nearest to its bound or exceeds it most."""
    q, k, v, mask = case.arguments(device)
    gradients = case.gradients(device)
    dense = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool) if mask is None else mask.to_dense()[:, None]

    def dense_attention(q, k, v):
        return plain(q, k, v, dense, case.scale)

    def ours(q, k, v):
        return attention(q, k, v, mask=mask, scale=case.scale, return_lse=True)

    got = results(ours, (q, k, v), gradients, case.backward)
    oracle = results(dense_attention, tuple(t.double() for t in (q, k, v)), gradients, case.backward)
    with backend("reference"):
        theirs = results(ours if case.dtype == F32 else dense_attention, (q, k, v), gradients, case.backward)
    found = [compare(*three) for three in zip(got, oracle, theirs, strict=True) if three[0].numel()]
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[1] else pair[0], default=(0.0, 0.0))


def results(function, inputs, gradients, backward: bool) -> list[Tensor]:
    """Output and log-sum-exp of ``function(q, k, v)``, and with ``backward`` the three gradients."""
    if not backward:
        return list(function(*inputs))
    inputs = [t.detach().requires_grad_() for t in inputs]
    out, lse = function(*inputs)
    grads = torch.autograd.grad((out, lse), inputs, [g.to(o.dtype) for g, o in zip(gradients, (out, lse))])
    return [t.detach() for t in (out, lse, *grads)]


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention as it is written without kernels: products in q's dtype, softmax in float32 or wider."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = (q @ k.mT) * scale
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    some = seen.any(-1, keepdim=True)
    # A row without keys is a softmax over all, thrown away, so that no NaN reaches the gradients.
    s = s.masked_fill(~seen & some, -torch.inf)
    p = s.softmax(-1).masked_fill(~some, 0.0)
    return p.to(q.dtype) @ v, s.logsumexp(-1).masked_fill(~some.squeeze(-1), -torch.inf)
