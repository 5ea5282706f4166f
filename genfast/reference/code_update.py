"""What ``quantize``, ``ema_update_`` and ``kmeans`` compute, in plain PyTorch: the specification.

z is [B, S, G, D], codebook [G, K, D], indices int64 [B, S, G]; an index outside 0 ... K - 1 means no code, and its
vector takes no part in losses, counts and sums. With e the chosen code, rounded to z's dtype, and M the numbers in
vectors that have one:

* both losses are sum (z - e)^2 / M; the commitment's gradient is 2 (z - e) / M to z, the codebook's 2 (e - z) / M to e;
* ``"straight_through"`` hands the gradient g of z_q to z as it is; ``"rotation"`` hands on
  |e| / |z| (g - 2 (g w) w + 2 (g q) u), with u = z / |z|, q = e / |e|, w = (u + q) / |u + q|, that is g rotated by the
  rotation that takes u to q (Fifty et al. 2024, section 4.2); ``"none"`` hands g to e and nothing to z;
* lengths count as at least 1e-6 where they divide, as in vector_quantize_pytorch.

The moving averages, with n and s the count and the sum of the vectors of a code (each divided by its length for
``cosine``), N and A the cluster size and ``embed_avg``:

    N += (1 - decay) (n - N),  A += (1 - decay) (s - A),  T = sum N,
    codebook = A / ((N + eps) / (T + K eps) T),  for ``cosine`` divided by its length,

where a code whose divisor is 0 keeps its row. After that the dead codes, N < threshold, get rows of z: K slots are
drawn, slot j by the 64 bits U of words 0 and 1 of Philox block j + 2^32 g: rank floor(U world / 2^64), and of its n
vectors number floor(R n / 2^64), R being the remainder of U world modulo 2^64. With as many vectors on every rank, that
is vector floor(U world n / 2^64) of the joined batch. A slot whose vector has no code, or was drawn by an earlier slot,
is empty. The i-th dead code takes the i-th slot that is not; what is left over stays as it is. Then N = reset and
A = reset times the row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.random import MASK, mul_hi_lo, philox_words
from genfast.reference.token_sampling import high_product

GRADIENTS = ("straight_through", "rotation", "none")
SHORTEST = 1e-6
"""What a length is at least, where it divides."""


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _divided(t: Tensor) -> Tensor:
    """Vectors divided by their lengths."""
    return F.normalize(t, dim=-1, eps=SHORTEST)


def chosen(indices: Tensor, codes: int) -> Tensor:
    """Where there is a code."""
    return (indices >= 0) & (indices < codes)


def flat(indices: Tensor, codes: int) -> Tensor:
    """Indices [B, S, G] into codebook.flatten(0, 1); one past its end where there is no code."""
    groups = indices.shape[-1]
    first = torch.arange(groups, device=indices.device) * codes
    return torch.where(chosen(indices, codes), indices + first, groups * codes)


# --- quantize --------------------------------------------------------------------------------------------------------


def quantize(z, codebook, indices, *, zeros, z_q, losses, valid, counts, perplexity) -> None:
    """Fills z_q like z, losses [2] (commitment, codebook), valid int64 [] (how many indices are codes), and counts
    int64 [G, K] with perplexity [G], or None. ``zeros``: what z_q has where there is no code, 0 instead of z."""
    groups, codes, size = codebook.shape
    there = chosen(indices, codes)
    rows = codebook.flatten(0, 1)[flat(indices, codes).clamp_max(groups * codes - 1)].to(z.dtype)
    z_q.copy_(torch.where(there[..., None], rows, torch.zeros_like(z) if zeros else z))
    valid.copy_(there.sum())
    error = torch.where(there[..., None], _wide(z) - _wide(rows), 0).square().sum(dtype=torch.float64)
    losses.copy_((error / (valid * size).clamp_min(1)).expand(2))
    if counts is None:
        return
    at = flat(indices, codes).flatten()
    found = torch.zeros(groups * codes + 1, dtype=torch.int64, device=z.device)
    counts.copy_(found.index_add_(0, at, torch.ones_like(at))[:-1].view(groups, codes))
    share = counts / counts.sum(1, keepdim=True).clamp_min(1).double()
    perplexity.copy_(torch.special.entr(share).sum(1).exp())


def quantize_backward(
    grad_z_q, grad_losses, z, z_q, indices, valid, *, gradient, zeros, codes, grad_z, grad_codebook
) -> None:
    """grad_z_q like z and grad_losses [2], or None for zeros, to grad_z like z and grad_codebook [G, K, D], where not
    None. z_q is what :func:`quantize` gave of ``codes`` codes."""
    there = chosen(indices, codes)[..., None]
    x, e = _wide(z), _wide(z_q)
    none = torch.zeros_like(x)
    g = none if grad_z_q is None else _wide(grad_z_q)
    difference = torch.where(there, x - e, none)
    if grad_losses is None:
        to_z = to_e = none
    else:
        unit = 2 * difference / (valid * z.shape[-1]).clamp_min(1)
        to_z, to_e = grad_losses[0] * unit, -grad_losses[1] * unit
    if grad_z is not None:
        passed = dict(straight_through=lambda: g, rotation=lambda: _rotated(g, x, e), none=lambda: none)[gradient]()
        grad_z.copy_(torch.where(there, passed + to_z, none if zeros else g))
    if grad_codebook is not None:
        rows = to_e + torch.where(there, g, none) if gradient == "none" else to_e
        grad_codebook.copy_(_segment_sums(rows, indices, codes))


def _rotated(g: Tensor, z: Tensor, e: Tensor) -> Tensor:
    length, reach = z.norm(dim=-1, keepdim=True).clamp_min(SHORTEST), e.norm(dim=-1, keepdim=True)
    u, q = z / length, e / reach.clamp_min(SHORTEST)
    w = _divided(u + q)
    turned = g - 2 * (g * w).sum(-1, keepdim=True) * w + 2 * (g * q).sum(-1, keepdim=True) * u
    return turned * (reach / length)


def _segment_sums(rows: Tensor, indices: Tensor, codes: int) -> Tensor:
    """float64 [G, K, D]: the sum of the rows [B, S, G, D] of each code."""
    groups, size = rows.shape[2:]
    sums = torch.zeros(groups * codes + 1, size, dtype=torch.float64, device=rows.device)
    return sums.index_add_(0, flat(indices, codes).flatten(), rows.reshape(-1, size).double())[:-1].view(
        groups, codes, size
    )


# --- moving averages -------------------------------------------------------------------------------------------------


def ema_update(
    codebook, cluster_size, embed_avg, z, indices, *, decay, eps, cosine, threshold, reset, seed, stream, offset
) -> None:
    """codebook, embed_avg [G, K, D] and cluster_size [G, K] in place; the whole batch is here."""
    shape = (*codebook.shape[:2], codebook.shape[2] + 1)
    sums = codebook.new_empty(shape)
    slots = codebook.new_empty(shape) if threshold > 0 else None
    code_sums(
        z, indices, cosine=cosine, sums=sums, slots=slots, seed=seed, stream=stream, offset=offset, world=1, rank=0
    )
    ema_apply(
        codebook, cluster_size, embed_avg, sums, slots, decay=decay, eps=eps, cosine=cosine, threshold=threshold,
        reset=reset,
    )  # fmt: skip


def code_sums(z, indices, *, cosine, sums, slots, seed, stream, offset, world, rank) -> None:
    """sums [G, K, D + 1]: the sum of each code's vectors and their number; slots alike or None: this rank's share of
    the vectors for dead codes, and 1, or zeros. Added over ranks, both are those of the joined batch."""
    groups, codes, _ = sums.shape
    rows = _divided(_wide(z)) if cosine else _wide(z)
    sums[..., :-1] = _segment_sums(rows, indices, codes)
    sums[..., -1] = _segment_sums(torch.ones_like(rows[..., :1]), indices, codes)[..., 0]
    if slots is None:
        return
    position, mine = slot_positions(indices, codes, groups, seed, stream, offset, world, rank)
    vectors = rows.flatten(0, 1).transpose(0, 1)  # [G, N, D]
    if vectors.shape[1]:
        slots[..., :-1] = vectors.gather(1, position[..., None].expand(-1, -1, vectors.shape[2])) * mine[..., None]
    else:
        slots[..., :-1] = 0
    slots[..., -1] = mine


def slot_positions(indices, codes, groups, seed, stream, offset, world, rank) -> tuple[Tensor, Tensor]:
    """int64 [G, K], the vector that each slot draws, and bool, whether it is on this rank and the slot is not empty."""
    device = indices.device
    count = indices.shape[0] * indices.shape[1]
    j = torch.arange(codes, device=device) + (torch.arange(groups, device=device) << 32)[:, None]
    seed, stream, offset = (counter(n, device) for n in (seed, stream, offset))
    high, low, *_ = philox_words(seed, j, offset, stream)
    owner, high, low = _shared_out(high, low, world)
    position = _shared_out(high, low, count)[0]
    mine = owner == rank
    mine = mine & (chosen(indices, codes).flatten(0, 1).T.gather(1, position) if count else False)
    # The first slot of each position: sorted stably, those that differ from the one before.
    order = torch.where(owner == rank, position, count).sort(dim=1, stable=True)
    first = torch.ones_like(mine)
    first[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    return position, mine & torch.empty_like(first).scatter_(1, order.indices, first)


def counter(n: int | Tensor, device) -> Tensor:
    """As int64 []: filled on the device, since a copy would make the host wait for a GPU."""
    return n.reshape(()) if isinstance(n, Tensor) else torch.full((), n, dtype=torch.int64, device=device)


def _shared_out(high: Tensor, low: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A 64-bit number times n in 32-bit words: what is above 2^64, and the two words below."""
    (over, a), (b, low) = mul_hi_lo(high, n), mul_hi_lo(low, n)
    return over + ((a + b) >> 32), (a + b) & MASK, low


def ema_apply(codebook, cluster_size, embed_avg, sums, slots, *, decay, eps, cosine, threshold, reset) -> None:
    """The update by sums and slots, as :func:`code_sums` makes them."""
    codes, size = codebook.shape[1:]
    sums = sums.to(codebook.dtype)
    cluster_size.lerp_(sums[..., size], 1 - decay)
    embed_avg.lerp_(sums[..., :size], 1 - decay)
    total = cluster_size.sum(1, keepdim=True)
    smooth = ((cluster_size + eps) / (total + codes * eps) * total)[..., None]
    rows = embed_avg / smooth
    codebook.copy_(torch.where(smooth > 0, _divided(rows) if cosine else rows, codebook))
    if slots is None:
        return
    slot, revived = assigned_slots(cluster_size < threshold, slots[..., size] > 0)
    rows = slots[..., :size].to(codebook.dtype).gather(1, slot[..., None].expand(-1, -1, size))
    codebook.copy_(torch.where(revived[..., None], rows, codebook))
    embed_avg.copy_(torch.where(revived[..., None], rows * reset, embed_avg))
    cluster_size.masked_fill_(revived, reset)


def assigned_slots(dead: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """[G, K]: the slot of each code and whether it has one: of the i-th dead code, the i-th slot that is full."""
    order = (~full).to(torch.int8).sort(dim=1, stable=True).indices
    turn = dead.cumsum(1) - 1
    return order.gather(1, turn.clamp_min(0)), dead & (turn < full.sum(1, keepdim=True))


# --- k-means ---------------------------------------------------------------------------------------------------------


def min_distance_update(z, centre, distance) -> None:
    """distance [N] becomes the smaller of itself and the squared distance of z [N, D] to centre [1, D]."""
    torch.minimum(distance, (z - centre).square().sum(1), out=distance)


def drawn_by_weight(weight: Tensor, valid: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """int64 []: a place drawn in proportion to weight [N], in whole numbers, by the 64 bits of two words; where no
    weight is above 0, one of those that are ``valid``."""
    bits = min(40, 62 - math.ceil(math.log2(len(weight))))
    most = weight.max()
    whole = torch.where(most > 0, (weight.double() / most.clamp_min(1e-300) * 2**bits).long(), valid.long())
    ends = whole.cumsum(0)
    return torch.searchsorted(ends, high_product(high, low, ends[-1]).view(1), right=True)[0].clamp_max(len(ends) - 1)
