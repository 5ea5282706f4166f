"""A codebook of vector-quantize-pytorch: which vectors it takes, its k-means and its moving averages without a matrix
of vectors by codes. Draws come from PyTorch's generator in the peer's order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from vector_quantize_pytorch import vector_quantize_pytorch as peer

from genfast.dropin.vector_quantize_pytorch.rows import FUSED_DTYPES
from genfast.ops._codes import grouped
from genfast.ops.code_update import code_sums, ema_update_
from genfast.ops.vector_quantize import nearest_rows

NO_DRAW = (None, 0, 0, 0)


def takes(book: peer.Codebook, x: Tensor) -> bool:
    """Whether the kernels take this tensor and the codebook's configuration."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.dtype not in FUSED_DTYPES or x.layout is not torch.strided:
        return False
    if x.device.type not in ("cpu", "cuda") or not x.numel() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if book.embed.dtype != torch.float32 or book.embed.device != x.device:
        return False
    return not book.affine_param and book.vq_bridge is None


def plain_training(book: peer.Codebook) -> bool:
    """Whether codes are chosen without noise, and nothing waits to be added to the moving averages."""
    drawn = any(book.gumbel_sample.keywords.values())
    return not drawn and book.cluster_size.grad is None and book.embed_avg.grad is None


def needs_init(book: peer.Codebook) -> bool:
    """Whether k-means is still to come; a GPU is waited for once, not in every call."""
    seen = book.__dict__.get("_initted_seen")
    if seen is not None and seen[0] is book.initted and seen[1] == book.initted._version:
        return False
    if not book.initted:
        return True
    book.__dict__["_initted_seen"] = (book.initted, book.initted._version)
    return False


def init_by_kmeans(book: peer.Codebook, samples: Tensor) -> None:
    """The peer's k-means of samples [G, N, D]: its first centres, its number of iterations."""
    if samples.shape[1] < book.codebook_size:
        peer.logger.warning(f"k-means of {samples.shape[1]} vectors for {book.codebook_size} codes: some will be equal")
    samples = samples.detach().float()
    means = book.sample_fn(samples, book.codebook_size)
    rows = samples.transpose(0, 1)[None]
    group = dist.group.WORLD if book.kmeans_all_reduce_fn is dist.all_reduce else None
    for _ in range(book.kmeans_iters):
        found = nearest_rows(rows, means, "dot" if book.use_cosine_sim else "l2", True)
        sums, _ = code_sums(rows, found, book.codebook_size, False, False, NO_DRAW, group)
        size = sums[..., -1]
        centres = sums[..., :-1] / size.clamp_min(1)[..., None]
        if book.use_cosine_sim:
            centres = peer.l2norm(centres)
        means = torch.where(size[..., None] > 0, centres, means)
    with torch.no_grad():
        book.embed_avg.copy_(means * size[..., None])
        book.cluster_size.copy_(size)
        book.update_ema()
        book.initted.fill_(True)


def update(book: peer.Codebook, rows: Tensor, found: Tensor, dim: int, mask: Tensor | None, samples) -> None:
    """Moving averages and dead codes after a training step.

    Args:
        rows, found: the vectors, in dimension ``dim``, and their codes.
        samples: () -> (float32 [G, N, D], mask [G, N] or None): the vectors in the peer's order, for dead codes.
    """
    if not book.ema_update and not book.has_dead_code_replacement:
        return
    group = dist.group.WORLD if book.use_ddp else None
    if book.ema_update and not book.manual_ema_update:
        state = [t if book.num_codebooks > 1 else t[0] for t in (book.embed, book.cluster_size, book.embed_avg)]
        ema_update_(
            *state, rows, found, decay=book.decay, eps=book.eps, dim=dim, mask=mask, group=group,
            metric="cosine" if book.use_cosine_sim else "l2",
        )  # fmt: skip
    else:
        vectors = grouped(rows.detach(), dim, book.num_codebooks)
        if mask is not None:
            found = found.masked_fill(~mask, -1)
        found = found.reshape(vectors.shape[:3])
        sums, _ = code_sums(vectors, found, book.codebook_size, False, False, NO_DRAW, group)
        with torch.no_grad():
            book.cluster_size.lerp_(sums[..., -1], 1 - book.decay)
            book.embed_avg.lerp_(sums[..., :-1], 1 - book.decay)
    if book.has_dead_code_replacement and (book.cluster_size < book.threshold_ema_dead_code).any():
        vectors, there = samples()
        book.expire_codes_(vectors, seq_mask=there)
