"""A whole generation by LLaDA's sampler beside the published loop in eager PyTorch: same model, steps and batch.

The weights are random. On a GPU the model has LLaDA-8B's shape (bf16, 16 GB); on a CPU it has its vocabulary and two
narrow layers, so that what a sampler does beside the model can be seen.
"""

from __future__ import annotations

import functools
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks.harness import Case, Peer, Plan, Settings
from benchmarks.published_tokens import MASK_ID, backend_name, draw

SHAPES = {
    "LLaDA-8B": dict(layers=32, width=4096, heads=32, inner=12288, entries=126464),
    "2 layers, LLaDA's vocabulary": dict(layers=2, width=256, heads=4, inner=768, entries=126464),
    "quick": dict(layers=1, width=64, heads=2, inner=128, entries=4096),
}


def plans(settings: Settings) -> list[Plan]:
    """One case, for the settings' device."""
    shape, length, steps = ("2 layers, LLaDA's vocabulary", 32, 8)
    if settings.quick:
        shape, length, steps = "quick", 16, 4
    elif settings.device.type == "cuda":
        shape, length, steps = "LLaDA-8B", 128, 64
    return [Plan("generate", functools.partial(generate_case, settings.device, shape, length, steps))]


class RandomModel:
    """A bidirectional transformer with rotary positions and random weights."""

    def __init__(self, device, *, layers: int, width: int, heads: int, inner: int, entries: int):
        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) / math.sqrt(columns)

        torch.manual_seed(0)
        self.heads, self.embedding = heads, torch.randn(entries, width, device=device, dtype=torch.bfloat16)
        self.layers = [
            (matrix(3 * width, width), matrix(width, width), matrix(2 * inner, width), matrix(width, inner))
            for _ in range(layers)
        ]
        self.head = matrix(entries, width)

    def __call__(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embedding[ids]
        half = x.shape[-1] // self.heads // 2
        rates = 10000.0 ** -(torch.arange(half, device=x.device) / half)
        angles = torch.arange(length, device=x.device)[:, None] * rates
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def turned(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        for qkv, out, up, down in self.layers:
            q, k, v = (
                F.linear(_normed(x), qkv).view(batch, length, 3, self.heads, 2 * half).permute(2, 0, 3, 1, 4).unbind(0)
            )
            seen = F.scaled_dot_product_attention(turned(q), turned(k), v)
            x = x + F.linear(seen.transpose(1, 2).reshape(batch, length, -1), out)
            gate, value = F.linear(_normed(x), up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * value, down)
        return F.linear(_normed(x), self.head)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def published_loop(model, prompt: Tensor, steps: int, length: int, mask_id: int) -> Tensor:
    """LLaDA's ``generate`` at temperature 1 with one block: every step reads all positions and draws in float64."""
    x = F.pad(prompt, (0, length), value=mask_id)
    whole, more = divmod(length, steps)
    for step in range(steps):
        masked = x == mask_id
        tokens, confidence = draw(model(x))
        tokens = torch.where(masked, tokens, x)
        confidence = torch.where(masked, confidence, -torch.inf)
        chosen = torch.zeros_like(masked)
        for row in range(len(x)):
            chosen[row, confidence[row].topk(whole + (step < more)).indices] = True
        x[chosen] = tokens[chosen]
    return x


@torch.no_grad()
def generate_case(device, shape: str, length: int, steps: int) -> Case:
    """Temperature 1, one block."""
    options = SHAPES[shape]
    model = RandomModel(device, **options)
    draws = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, options["entries"] // 2, (8, 1, length), generator=draws).to(device)
    mask_id = min(MASK_ID, options["entries"] - 1)

    def ours(i):
        return genfast.generate_llada(
            model, prompts[i % 8], steps=steps, gen_length=length, block_length=length, temperature=1.0,
            mask_id=mask_id, seed=i,
        ).tokens  # fmt: skip

    def theirs(i):
        return published_loop(model, prompts[i % 8], steps, length, mask_id)

    def rate() -> dict[str, float]:
        begin = time.perf_counter()
        ours(0)[0, -1].item()
        return {"tokens_per_s": length / (time.perf_counter() - begin)}

    def exact():
        return ours(0)

    return Case(
        f"LLaDA generate, {length} tokens in {steps} steps: {shape}",
        (1, 2 * length, options["entries"]),
        "bf16",
        run=ours,
        exact=exact,
        peers=[Peer("published loop", torch.__version__, theirs, check=exact)],
        backend=backend_name(device),
        note="the model's share is in both",
        counts=rate,
    )
