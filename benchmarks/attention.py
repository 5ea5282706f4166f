"""Attention under structured masks beside PyTorch's own: SDPA with the dense mask, and FlexAttention compiled.

The work is two products of 2 Lq Lk D operations each, over the pairs that the mask lets through (backward: five more).
"""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import genfast
from benchmarks import attention_cached
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from genfast import AttentionMask, backends

BLOCK = 32


def plans(settings: Settings) -> list[Plan]:
    """The cases of the family, for the settings' device."""
    device, quick = settings.device, settings.quick
    rows = 256 if quick else 2048
    half = dict(dtype=torch.bfloat16)
    diffusion = functools.partial(AttentionMask.block_diffusion, rows // 2, BLOCK, device=device)
    causal = functools.partial(AttentionMask.block_causal, 2 * rows, BLOCK, device=device)
    padded = functools.partial(padding, 8, rows, device)
    case = functools.partial(forward_case, device, not quick)
    return [
        Plan("diffusion bf16", functools.partial(case, "block diffusion", (1, 8, rows, 64), diffusion, 3.0, **half)),
        Plan("diffusion fp32", functools.partial(case, "block diffusion", (1, 8, rows, 64), diffusion, 2.5)),
        Plan("causal bf16", functools.partial(case, "block causal", (1, 16, 2 * rows, 128), causal, 1.7, **half)),
        Plan("padding bf16", functools.partial(case, "padding", (8, 8, rows, 64), padded, 2.0, flex=False, **half)),
        Plan("full bf16", functools.partial(case, "full", (1, 8, rows, 64), None, 0.95, flex=False, **half)),
        Plan("training fp32", functools.partial(training_case, device, (1, 8, rows, 64), diffusion)),
        Plan("training bf16", functools.partial(training_case, device, (1, 8, rows, 64), diffusion, **half)),
        Plan("building", functools.partial(building_case, device, 8 * rows)),
        *attention_cached.plans(settings),
    ]


def padding(batch: int, length: int, device) -> AttentionMask:
    """Lengths from a sixteenth of the longest up to it."""
    lengths = torch.linspace(length // 16, length, batch).long().to(device)
    return AttentionMask.padding(lengths, length)


def dense_of(mask: AttentionMask | None) -> Tensor | None:
    return None if mask is None else mask.to_dense()[:, None]


def names(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def backend_name(device: torch.device) -> str:
    name = backends.choose("attention", "attention", device)[0]
    return f"{name} {backends.cpu_isa()}" if name == "cpu" else name


def inputs(shape, dtype, device) -> list:
    return [pool(shape, dtype, device, seed=seed, least=2) for seed in range(3)]


def bars(ratio: float, device) -> tuple[Bar, ...]:
    return (Bar("ratio", at_least=ratio),) if device.type == "cpu" else ()


def forward_case(device, compiled, name, shape, make_mask, bar, *, dtype=torch.float32, flex=True) -> Case:
    mask = make_mask() if make_mask else None
    dense = dense_of(mask)
    q, k, v = inputs(shape, dtype, device)

    def ours(i):
        return genfast.attention(q[i], k[i], v[i], mask=mask)

    def dense_sdpa(i):
        return F.scaled_dot_product_attention(q[i], k[i], v[i], attn_mask=dense)

    def exact():
        wide = (t[0].double() for t in (q, k, v))
        return F.scaled_dot_product_attention(*wide, attn_mask=dense)

    version = torch.__version__
    peers = [Peer("SDPA, dense mask" if mask else "SDPA", version, dense_sdpa, bars=bars(bar, device))]
    if flex and compiled:
        block_mask = mask.to_block_mask()
        compiled_flex = torch.compile(flex_attention, dynamic=False)
        peers.append(
            Peer(
                "FlexAttention, compiled",
                version,
                lambda i: compiled_flex(q[i], k[i], v[i], block_mask=block_mask),
                bars=bars(bar, device),
            )
        )
    counts, own = None, ()
    if name == "block diffusion":
        # Time per pair that is seen, over the same of full attention.
        counts = functools.partial(of_density, ours, lambda i: genfast.attention(q[i], k[i], v[i]), mask.density)
        own = (Bar("of_density", at_most=1.3),) if device.type == "cpu" else ()
    return Case(
        name, shape, names(dtype), run=ours, exact=exact, copy_dtype=dtype, peers=peers, backend=backend_name(device),
        counts=counts, bars=own,
    )  # fmt: skip


def of_density(masked, full, density: float) -> dict[str, float]:
    """The least of some interleaved times each."""
    best = {}
    for i in range(12):
        for name, run in (("masked", masked), ("full", full)):
            begin = time.perf_counter()
            run(i)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
    return {"of_density": best["masked"] / best["full"] / density}


def training_case(device, shape, make_mask, *, dtype=torch.float32) -> Case:
    """Forward, and backward to q, k and v; the result compared is the gradient of q."""
    mask = make_mask()
    dense = dense_of(mask)
    tensors = [[t[i].clone().requires_grad_() for i in range(2)] for t in inputs(shape, dtype, device)]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(device, dtype)

    def step(attend, given, gradient):
        with torch.enable_grad():
            return torch.autograd.grad(attend(*given), given, gradient)[0]

    def ours(i):
        return step(lambda q, k, v: genfast.attention(q, k, v, mask=mask), [t[i % 2] for t in tensors], grad)

    def theirs(i):
        attend = functools.partial(F.scaled_dot_product_attention, attn_mask=dense)
        return step(attend, [t[i % 2] for t in tensors], grad)

    def exact():
        attend = functools.partial(F.scaled_dot_product_attention, attn_mask=dense)
        return step(attend, [t[0].detach().double().requires_grad_() for t in tensors], grad.double())

    return Case(
        "block diffusion, forward and backward", shape, names(dtype), run=ours, exact=exact, copy_dtype=dtype,
        peers=[Peer("SDPA, dense mask", torch.__version__, theirs, bars=bars(2.5, device))],
        backend=backend_name(device),
    )  # fmt: skip


def building_case(device, length: int) -> Case:
    """The mask of block diffusion training; the peer is told in FlexAttention's way, pair by pair."""
    tokens = length // 2

    def ours(i):
        return AttentionMask.block_diffusion(tokens, BLOCK, device=device).ranges

    def seen(b, h, q, k):
        clean_q, clean_k = q >= tokens, k >= tokens
        block_q, block_k = (torch.where(c, x - tokens, x) // BLOCK for c, x in ((clean_q, q), (clean_k, k)))
        own = (block_q == block_k) & (clean_q == clean_k)
        return own | (clean_k & ((block_q > block_k) | (clean_q & (block_q >= block_k))))

    def theirs(i):
        return create_block_mask(seen, None, None, length, length, device=device)

    def exact():
        return ours(0).double()

    return Case(
        "building the mask", (length, length), "int32", run=ours, exact=exact, allowed=1e-9,
        peers=[
            Peer("create_block_mask", torch.__version__, theirs, check=exact, bars=bars(1000, device)),
        ],
        backend="any",
        bars=(Bar("extra_bytes", at_most=200 * length),) if device.type == "cpu" else (),
    )  # fmt: skip
