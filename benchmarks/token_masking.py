"""The forward process of discrete diffusion beside the arithmetic of the published training code, in eager PyTorch.

A training batch of 16 sequences of 4096 tokens: time, mask, noised tokens and loss weight. The floor reads the tokens
and writes the three results; random numbers are drawn on the way. A peer draws other numbers; ours are compared
with the reference's, to which they must be equal.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import genfast
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from genfast import backends

BATCH, LENGTH, MASK_ID, BLOCK = 16, 4096, 126336, 16


def plans(settings: Settings) -> list[Plan]:
    """The cases of the op, for the settings' device."""
    shape = (4, 512) if settings.quick else (BATCH, LENGTH)
    build = functools.partial(case, settings.device, shape)
    return [
        Plan("mask", functools.partial(build, "forward_mask LLaDA", {}, llada, 2)),
        Plan(
            "mask blocks",
            functools.partial(
                build,
                f"forward_mask BD3-LM, blocks of {BLOCK}",
                dict(schedule="loglinear", eps=0.0, block_size=BLOCK, antithetic=True),
                block_diffusion,
                2,
            ),
        ),
        Plan(
            "mask count", functools.partial(build, "forward_mask, a fixed count", dict(count=shape[1] // 3), counted, 2)
        ),
        Plan(
            "noise uniform",
            functools.partial(
                build, "forward_mask SEDD uniform", dict(mask_id=None, vocab_size=50257, schedule="loglinear"), sedd, 2
            ),
        ),
    ]


def llada(x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One time per sequence, weight 1 / p."""
    t = torch.rand(len(x0), device=x0.device)
    p = ((1 - 1e-3) * t + 1e-3)[:, None].repeat(1, x0.shape[1])
    mask = torch.rand(x0.shape, device=x0.device) < p
    return torch.where(mask, MASK_ID, x0), mask, torch.where(mask, 1 / p, 0.0)


def block_diffusion(x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One stratified time per block, weight 1 / t."""
    batch, blocks = len(x0), x0.shape[1] // BLOCK
    u = torch.rand((batch, blocks), device=x0.device)
    parts = torch.arange(batch * blocks, device=x0.device) / (batch * blocks)
    t = (u / (batch * blocks) + parts.view(batch, blocks)) % 1 * (1 - 1e-3) + 1e-3
    t = t.repeat_interleave(BLOCK, dim=1)
    mask = torch.rand(x0.shape, device=x0.device) <= t
    return torch.where(mask, MASK_ID, x0), mask, torch.where(mask, 1 / t, 0.0)


def counted(x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A third of each sequence, shuffled row by row (LLaDA's likelihood)."""
    length = x0.shape[1]
    count = length // 3
    mask = (torch.arange(length, device=x0.device) < count).expand(x0.shape).clone()
    for row in mask:
        row.copy_(row[torch.randperm(length, device=x0.device)])
    return torch.where(mask, MASK_ID, x0), mask, torch.where(mask, length / count, 0.0)


def sedd(x0: Tensor) -> tuple[Tensor, Tensor, None]:
    """Uniform tokens at a log-linear time."""
    t = (1 - 1e-3) * torch.rand(len(x0), device=x0.device) + 1e-3
    moved = torch.rand(x0.shape, device=x0.device) < ((1 - 1e-3) * t)[:, None]
    return torch.where(moved, torch.randint_like(x0, 50257), x0), moved, None


def case(device, shape, name, options, peer, bar) -> Case:
    """One kind of noise on one batch shape."""
    draw = torch.Generator().manual_seed(0)
    x0 = [torch.randint(0, 50257, shape, generator=draw).to(device) for _ in range(4)]

    def ours(i):
        return genfast.forward_mask(x0[i % 4], **{"mask_id": MASK_ID, "seed": i, **options})

    def exact():
        with genfast.backend("reference"):
            return ours(0).x

    written = 13 if "vocab_size" not in options else 9
    name_of_backend = backends.choose("token_sampling", "forward_mask", device)[0]
    if name_of_backend == "cpu":
        name_of_backend += f" {backends.cpu_isa()}"
    return Case(
        name,
        shape,
        "int64",
        run=lambda i: ours(i).x,
        exact=exact,
        peers=[
            Peer(
                "published arithmetic",
                torch.__version__,
                lambda i: peer(x0[i % 4])[0],
                check=exact,
                bars=(Bar("ratio", at_least=bar),) if device.type == "cpu" else (),
            )
        ],
        bytes=shape[0] * shape[1] * (8 + written),
        output_bytes=shape[0] * shape[1] * written,
        backend=name_of_backend,
        allowed=1e-12,  # equal, that is: tokens are whole numbers
    )
