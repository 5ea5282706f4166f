"""Training steps of a codebook beside vector-quantize-pytorch, and the parts after the lookup beside plain PyTorch.

Random normal vectors and codes, float32. A step is the forward pass with the rotation trick, the backward pass, and the
moving averages; the peer's module keeps its state, ours is what the ops make of the same one.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import genfast
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.published_tokens import backend_name

SHAPE = (4096, 16384, 256)


def plans(settings: Settings) -> list[Plan]:
    """The cases of the ops, for the settings' device."""
    shape = (128, 256, 16) if settings.quick else SHAPE
    build = functools.partial(functools.partial, device=settings.device, shape=shape)
    return [
        Plan("quantize forward", build(peer_case, training=False)),
        Plan("quantize train EMA", build(peer_case, training=True)),
        Plan("quantize after the lookup", build(after_lookup_case)),
        Plan("ema_update_", build(average_case)),
    ]


def _inputs(shape, device) -> tuple[torch.Tensor, torch.Tensor]:
    count, codes, size = shape
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, size, generator=generator).to(device) for n in (count, codes))


def _case(name, shape, device, ours, peers, exact, moved=0, bar=None) -> Case:
    bars = (Bar("ratio", at_least=bar),) if bar and device.type == "cpu" and shape == SHAPE else ()
    peers = [Peer(*peer, bars=bars) for peer in peers]
    return Case(
        name, shape, "fp32", run=ours, exact=exact, peers=peers, bytes=moved, backend=backend_name(device),
        copy_shape=(shape[0], shape[2]),
    )  # fmt: skip


def peer_case(*, device, shape, training: bool) -> Case:
    """The whole of ``VectorQuantize``: the lookup is most of it."""
    z, codebook = _inputs(shape, device)
    state = [codebook.clone(), torch.ones(shape[1], device=device), codebook.clone()]
    leaf = z.clone().requires_grad_(training)

    def ours(i):
        if not training:
            return genfast.quantize(z, codebook).z_q
        with torch.enable_grad():
            leaf.grad = None
            found = genfast.quantize(leaf, state[0], gradient="rotation", commitment_weight=1.0)
            genfast.ema_update_(*state, z, found.indices)
            (found.z_q.sum() + found.loss).backward()
        return found.z_q.detach()

    name = "quantize train EMA" if training else "quantize forward"
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        missing = Peer("vector-quantize-pytorch", missing=str(error))
        return Case(name, shape, "fp32", run=ours, exact=lambda: z, peers=[missing], backend=backend_name(device))
    peer = vector_quantize_pytorch.VectorQuantize(shape[2], shape[1]).to(device).train(training)
    for buffer in (peer._codebook.embed, peer._codebook.embed_avg):
        buffer.copy_(codebook)

    def theirs(i):
        with torch.set_grad_enabled(training):
            leaf.grad = None
            q, _, loss = peer(leaf[None])
            if training:
                (q.sum() + loss.sum()).backward()
        return q[0].detach()

    expected = genfast.quantize(z, codebook).z_q
    version = getattr(vector_quantize_pytorch, "__version__", "")
    return _case(
        name, shape, device, ours, [("vector-quantize-pytorch", version, theirs)], lambda: expected,
        bar=15 if training else 20,
    )  # fmt: skip


def after_lookup_case(*, device, shape) -> Case:
    """Gather, losses, usage and perplexity; the peer is PyTorch with no one-hot."""
    z, codebook = _inputs(shape, device)
    indices = torch.randint(0, shape[1], shape[:1], generator=torch.Generator().manual_seed(1)).to(device)

    def ours(i):
        return genfast.quantize(z, codebook, indices=indices).z_q

    def plain():
        rows = codebook[indices]
        share = torch.bincount(indices, minlength=shape[1]) / shape[0]
        return rows, F.mse_loss(rows, z), torch.special.entr(share).sum().exp()

    return _case(
        "quantize after the lookup", shape, device, ours, [("PyTorch", torch.__version__, lambda i: plain()[0])],
        lambda: codebook[indices], moved=3 * z.numel() * 4,
    )  # fmt: skip


def average_case(*, device, shape) -> Case:
    """Sums, averages, smoothing and the codebook; the peer is PyTorch with ``index_add_`` for the peer's one-hot."""
    z, codebook = _inputs(shape, device)
    indices = torch.randint(0, shape[1], shape[:1], generator=torch.Generator().manual_seed(1)).to(device)
    ones = torch.ones(len(z), device=device)
    start = [codebook, torch.ones(shape[1], device=device), codebook * 2]
    state = [t.clone() for t in start]

    def begin(i):
        """Call number 0 is the one whose result is judged."""
        for t, first in zip(state if i == 0 else (), start):
            t.copy_(first)
        return state

    def plain(i):
        code, sizes, average = begin(i)
        sizes.lerp_(torch.zeros_like(sizes).index_add_(0, indices, ones), 0.2)
        average.lerp_(torch.zeros_like(average).index_add_(0, indices, z), 0.2)
        total = sizes.sum()
        code.copy_(average / ((sizes + 1e-5) / (total + len(sizes) * 1e-5) * total)[:, None])
        return code

    def exact():
        wide = [t.double() for t in start]
        genfast.ema_update_(*wide, z, indices)
        return wide[0]

    def ours(i):
        genfast.ema_update_(*begin(i), z, indices)
        return state[0]

    return _case(
        "ema_update_", shape, device, ours, [("PyTorch index_add_", torch.__version__, plain)], exact,
        moved=(3 * codebook.numel() + z.numel()) * 4,
    )  # fmt: skip
