"""Cases of ``attention_cached``: ways to write, head counts and sizes, dtypes, pages, rotations, lengths per row.

The oracle lays every row's keys out one after another, rotates by complex numbers in float64, and runs the dense
softmax of ``checks/attention.py``; the same in the case's own dtype sets the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genfast.backends import backend
from genfast.checks import compare
from genfast.checks.attention import _laid_out, plain
from genfast.kv_cache import KVCache
from genfast.ops.attention_cached import attention_cached

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class CachedCase:
    """One call of ``attention_cached``; ``shape`` is (B, H, Hkv, n, cached, D, Dv), the longest row having ``cached``
    keys."""

    shape: tuple[int, int, int, int, int, int, int]
    dtype: torch.dtype = F32
    write: str | None = None
    block: bool = True
    """Whether there is an active block."""
    rope: str | None = None
    page_size: int | None = None
    layout: str = "BHLD"
    scale: float | None = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        extra = [self.write or ("leave" if self.block else "no block")] + ([f"rope {self.rope}"] if self.rope else [])
        extra += [f"pages of {self.page_size}"] * (self.page_size is not None) + [self.layout] * (self.layout != "BHLD")
        extra += [f"scale={self.scale}"] * (self.scale is not None)
        return " ".join(["cached", "x".join(map(str, self.shape)), dtype, *extra])

    def lengths(self) -> Tensor:
        """Uneven, from the longest; 0 is among them where nothing is rewritten."""
        batch, cached = self.shape[0], self.shape[4]
        found = torch.tensor([cached - cached * b // max(batch - 1, 1) for b in range(batch)], dtype=torch.int64)
        return found.clamp(min=self.shape[3]) if self.write == "rewrite" else found

    def start(self) -> Tensor | None:
        """Of the block, where it is rewritten: from the beginning of a row to its end."""
        if self.write != "rewrite":
            return None
        rooms = self.lengths() - self.shape[3]
        return rooms * torch.arange(self.shape[0]) // max(self.shape[0] - 1, 1)

    def tensors(self, device="cpu") -> dict[str, Tensor]:
        """q, k and v of the block, and all_k and all_v of the longest row."""
        batch, heads, kv_heads, n, cached, size, v_size = self.shape
        draw = torch.Generator().manual_seed(sum(self.shape))
        shapes = dict(
            q=(heads, n, size), k=(kv_heads, n, size), v=(kv_heads, n, v_size),
            all_k=(kv_heads, cached, size), all_v=(kv_heads, cached, v_size),
        )  # fmt: skip
        return {
            name: _laid_out(torch.randn((batch, *s), generator=draw).to(device, self.dtype), self.layout)
            for name, s in shapes.items()
        }

    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin, float32."""
        angles = torch.arange(self.shape[4] + self.shape[3])[:, None] * 0.7 ** torch.arange(self.shape[5] // 2)
        return angles.cos(), angles.sin()

    def cache(self, tensors: dict[str, Tensor], device="cpu") -> KVCache:
        """With the first ``lengths`` positions of all_k and all_v."""
        batch, _, kv_heads, n, cached, size, v_size = self.shape
        made = KVCache(
            batch, kv_heads, max(cached + n, 1), size, value_dim=v_size, dtype=self.dtype, device=device,
            page_size=self.page_size,
        )  # fmt: skip
        made.append(tensors["all_k"], tensors["all_v"], self.lengths().to(device))
        return made


_SMALL = (3, 4, 2, 5, 70, 40, 24)


def cases(quick: bool = False) -> list[CachedCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every fourth."""
    found = [
        CachedCase(_SMALL, dtype, write, rope=rope, page_size=page_size)
        for write in (None, "append", "rewrite")
        for rope in (None, "half", "interleaved")
        for page_size in (None, 16)
        for dtype in (F32, BF16)
    ]
    found += [CachedCase(_SMALL, F16, write, rope="half", page_size=1) for write in (None, "append", "rewrite")]
    found += [CachedCase(_SMALL, dtype, block=False, page_size=p) for dtype in (F32, BF16) for p in (None, 7)]
    # The keys in several parts; many rows of queries; one query.
    for shape in (
        (2, 8, 1, 7, 1500, 64, 64), (1, 32, 8, 32, 700, 128, 128), (2, 2, 2, 300, 90, 64, 80), (2, 8, 2, 1, 640, 64, 64)
    ):  # fmt: skip
        found += [CachedCase(shape, dtype, rope="half") for dtype in (F32, BF16, F16)]
    found += [CachedCase((2, 2, 1, 9, 65, size, size), dtype) for size in (1, 33, 96, 256) for dtype in (F32, BF16)]
    for layout in ("BLHD", "wide", "columns"):
        found += [
            CachedCase(_SMALL, dtype, write, rope="interleaved", layout=layout)
            for write in (None, "rewrite")
            for dtype in (F32, BF16)
        ]
    found += [CachedCase(_SMALL, BF16, scale=scale) for scale in (-0.3, 0.0)]
    for shape in ((0, 2, 1, 5, 5, 16, 16), (2, 2, 1, 0, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16), (1, 1, 1, 1, 1, 16, 16)):
        found.append(CachedCase(shape))
    return found[::4] if quick else found


def check(case: CachedCase, device) -> tuple[float, float]:
    """Error and what is allowed, of the result that comes nearest to its bound or exceeds it most.

    The error is infinite if the cache holds anything but what was stored.
    """
    t = case.tensors(device)
    cos, sin = case.tables()
    cache = case.cache(t, device)
    start = case.start()
    got = attention_cached(
        t["q"], cache, k=t["k"] if case.block else None, v=t["v"] if case.block else None, write=case.write,
        start=None if start is None else start.to(device), scale=case.scale,
        rope=None if case.rope is None else (cos.to(device), sin.to(device), case.rope), return_lse=True,
    )  # fmt: skip
    oracle, _, _ = expected(case, {name: x.double() for name, x in t.items()})
    with backend("reference"):
        theirs, k, v = expected(case, t)
    for b, length in enumerate(case.lengths().tolist()):
        length += case.shape[3] * (case.write == "append")
        if not near(cache.keys(b), k[b, :, :length]) or not torch.equal(cache.values(b), v[b, :, :length]):
            return float("inf"), 0.0
    found = [compare(*three) for three in zip(got, oracle, theirs) if three[0].numel()]
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[1] else pair[0], default=(0.0, 0.0))


def near(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of a rotation."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-6)


def expected(case: CachedCase, t: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """(output, log-sum-exp) and the rows' keys and values, with the block."""
    n, cached = case.shape[3], case.shape[4]
    lengths, start = case.lengths(), case.start()
    first = lengths if start is None else start
    q, k = t["q"], t["k"]
    if case.rope is not None:
        q, k = (turned(x, first, case.tables(), case.rope) for x in (q, k))
    keys, values = (torch.nn.functional.pad(t[name], (0, 0, 0, n)) for name in ("all_k", "all_v"))
    seen = torch.zeros(case.shape[0], 1, n, cached + n, dtype=torch.bool, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        if case.block:
            at = int(first[b])
            keys[b, :, at : at + n], values[b, :, at : at + n] = k[b], t["v"][b]
            length = max(length, at + n)
        seen[b, ..., :length] = True
    return plain(q, keys, values, seen, case.scale), keys, values


def turned(x: Tensor, first: Tensor, tables: tuple[Tensor, Tensor], style: str) -> Tensor:
    """x rotated: a pair is a complex number, its angle a complex factor."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    cos, sin = (table.to(x.device, wide.dtype) for table in tables)
    at = first.to(x.device)[:, None] + torch.arange(x.shape[2], device=x.device)
    factor = torch.complex(cos, sin)[at][:, None]
    half = x.shape[3] // 2
    pairs = (wide[..., :half], wide[..., half:]) if style == "half" else (wide[..., 0::2], wide[..., 1::2])
    product = torch.complex(*pairs) * factor
    parts = [product.real, product.imag]
    return (torch.cat(parts, -1) if style == "half" else torch.stack(parts, -1).flatten(-2)).to(x.dtype)
