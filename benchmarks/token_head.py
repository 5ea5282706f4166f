"""The head's product and the draw in one, beside the product into stored logits and what is done with those.

LLaDA-8B's head, [126464, 4096] in bfloat16: 1 GiB of weights. The peers store the logits, in bfloat16, and take the
token from them: with ``sample_tokens``, or with the arithmetic that the published systems run. Tokens of stored logits
can differ, since those are rounded; a row's error here is that of its largest probability.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

import genfast
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from genfast import backends

ENTRIES, DEPTH = 126464, 4096
ROWS = (1, 16, 64, 256)


def plans(settings: Settings) -> list[Plan]:
    """The cases of this part of the family, for the settings' device."""
    device, quick = settings.device, settings.quick
    entries, depth = (2048, 256) if quick else (ENTRIES, DEPTH)
    found = []
    for rows in (4,) if quick else ROWS:
        for name, temperature in (("greedy", 0.0), ("draw", 1.0)):
            if name == "draw" or rows == ROWS[-1]:
                build = functools.partial(head_case, device, rows, entries, depth, name, temperature)
                found.append(Plan(f"head {name}, {rows} rows", build))
    return found


@functools.lru_cache(maxsize=1)
def head(entries: int, depth: int, device: torch.device) -> Tensor:
    """The weight. There is one: it is far larger than a cache."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(entries, depth, generator=generator, dtype=torch.bfloat16)
    return weight.mul_(4 / depth**0.5).to(device)


@functools.cache
def peak(device: torch.device) -> float:
    """Operations per second of torch's product of large bfloat16 matrices, the best of some."""
    a, b = (torch.randn(1024, 2048, device=device).bfloat16() for _ in range(2))
    seconds = [torch.inf]
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * 1024 * 1024 * 2048 / min(seconds)


def head_case(device, rows: int, entries: int, depth: int, name: str, temperature: float) -> Case:
    """``lm_head_sample``. The floor is the weight, read once; with many rows it is the product (``product_ms``)."""
    weight, hidden = head(entries, depth, device), pool((rows, depth), torch.bfloat16, device)
    hot = temperature > 0

    def ours(i):
        return genfast.lm_head_sample(
            hidden[i], weight, temperature=temperature, seed=i if hot else None
        ).confidence  # fmt: skip

    def two_calls(i):
        logits = torch.nn.functional.linear(hidden[i], weight)
        return genfast.sample_tokens(logits, temperature=temperature, seed=i if hot else None).confidence

    def published(i):
        logits = torch.nn.functional.linear(hidden[i], weight)
        if hot:
            wide = logits.double()
            tokens = (wide.exp() / (-torch.rand_like(wide).log()) ** temperature).argmax(-1)
        else:
            tokens = logits.argmax(-1)
        return logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def exact():
        with genfast.backend("reference"):
            return ours(0)

    def peers_error():
        """A peer's own draw has no counterpart: it is judged by the probability of our token in its logits."""
        logits = torch.nn.functional.linear(hidden[0], weight)
        tokens = genfast.lm_head_sample(hidden[0], weight, temperature=temperature, seed=0 if hot else None).tokens
        return logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]

    on_cpu = device.type == "cpu"
    backend = backends.choose("token_sampling", "lm_head_partials", device)[0]
    logits_bytes = rows * entries * 2
    return Case(
        f"head {name}",
        (rows, entries, depth),
        "bf16",
        run=ours,
        exact=exact,
        copy_dtype=torch.bfloat16,
        copy_shape=(entries, depth // 32),
        peers=[
            Peer(
                "linear + sample_tokens",
                torch.__version__,
                two_calls,
                check=peers_error,
                bars=(Bar("ratio", at_least=1),) if on_cpu else (),
            ),
            Peer("linear + published arithmetic", torch.__version__, published, check=peers_error),
        ],
        bytes=entries * depth * 2,
        output_bytes=rows * 12,
        bars=(Bar("extra_bytes", at_most=max(logits_bytes // 20, 2**20)),) if on_cpu else (),
        backend=f"{backend} {backends.cpu_isa()}" if on_cpu else backend,
        allowed=1e-5,
        counts=lambda: {"product_ms": 2 * rows * entries * depth / peak(device) * 1e3},
    )
