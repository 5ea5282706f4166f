"""Cases of ``pack_gradients``, ``reduce_chunks`` and ``unpack_gradients``: the bits of the reference on every wire."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genfast.backends import backend
from genfast.gradient_wire import WIRES, BucketLayout
from genfast.ops.gradient_bucket import pack_gradients, reduce_chunks, unpack_gradients

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
_SHAPES = {
    "small": ((3, 5), (), (0, 4), (257,), (1,)),
    "blocks": ((256,), (512, 2), (4096,), (5000,)),
    "many": tuple((k % 37,) for k in range(60)),
    "none": (),
}


@dataclass(frozen=True)
class BucketCase:
    """Gradients of every rank through the whole exchange, with all ranks played by one process."""

    wire: str
    ranks: int
    shapes: str
    dtype: torch.dtype = F32
    kind: str = "normal"
    """Or ``"odd"``: NaN, infinities, zeros, very large and very small blocks; ``"strided"``: not contiguous."""
    scale: float = 1.0
    residual: bool = False
    scale_tensor: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        extra = ["residual"] * self.residual + [f"x{self.scale:g}"] * (self.scale != 1) + ["tensor"] * self.scale_tensor
        return " ".join(["bucket", self.wire, f"{self.ranks} ranks", self.shapes, dtype, self.kind, *extra])

    def gradients(self, rank: int, device) -> list[torch.Tensor]:
        """One rank's tensors."""
        generator = torch.Generator().manual_seed(rank + 10 * len(self.name))
        found = []
        for k, shape in enumerate(_SHAPES[self.shapes]):
            t = torch.randn(shape, generator=generator) * 10.0 ** (k % 5 - 3)
            if self.kind == "odd" and t.numel() > 200:
                flat = t.view(-1)
                flat[rank] = torch.nan if k % 2 else torch.inf
                flat[200:] *= (0.0, 1e-38, 1e-33, 1e38)[k % 4]
            t = t.to(device, self.dtype)
            if self.kind == "strided" and t.dim():
                wide = torch.empty((*t.shape, 2), dtype=t.dtype, device=device).transpose(0, -2)
                t = wide[..., 0].transpose(0, -1).copy_(t) if t.dim() > 1 else torch.stack([t, t], 1)[:, 0]
            found.append(t)
        return found

    def run(self, device) -> list[torch.Tensor]:
        """Everything that the three ops write, rank by rank."""
        gradients = [self.gradients(rank, device) for rank in range(self.ranks)]
        layout = BucketLayout([t.numel() for t in gradients[0]], self.ranks, self.wire)
        generator = torch.Generator().manual_seed(3)

        def residual(numel):
            return (torch.randn(numel, generator=generator) * 1e-3).to(device) if self.residual else None

        def scale(value):
            return torch.tensor(value, device=device) if self.scale_tensor else value

        first = [residual(layout.numel) for _ in range(self.ranks)]
        second = [residual(layout.chunk) for _ in range(self.ranks)]
        out = torch.empty(layout.shape, dtype=torch.uint8, device=device)
        packed = [pack_gradients(g, layout, scale=scale(self.scale), residual=r) for g, r in zip(gradients, first)]
        for rank, kept in enumerate(second):
            received = torch.stack([p.wire[rank] for p in packed])
            reduce_chunks(received, layout, scale=scale(1 / self.ranks), residual=kept, out=out[rank])
        written = [torch.empty_like(t) for t in gradients[0]]
        square_norm, finite = unpack_gradients(out, layout, written, scale=scale(1 / self.scale))
        kept = [t for t in (*first, *second) if t is not None]
        wires = [*(p.wire for p in packed), out]
        if not layout.quantised and layout.chunk:  # as numbers, since the bits of NaN are the machine's
            wires = [t.view(WIRES[self.wire].dtype) for t in wires]
        return [*wires, *(p.finite for p in packed), *written, finite, *kept, square_norm]


def cases(quick: bool = False) -> list[BucketCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found = []
    for k, wire in enumerate(WIRES):
        dtype = (F32, BF16, F16)[k % 3]
        found += [
            BucketCase(wire, 1, "small"),
            BucketCase(wire, 3, "blocks", residual=True),
            BucketCase(wire, 2, "blocks", kind="odd", residual=True),
            BucketCase(wire, 2, "blocks", dtype, kind="strided", scale=0.125),
            BucketCase(wire, 4, "many", dtype, residual=True, scale=3.0, scale_tensor=True),
        ]
    found += [BucketCase("int8", 2, "none"), BucketCase("bf16", 2, "small", F16, kind="odd")]
    return found[::3] if quick else found


def check(case: BucketCase, device) -> tuple[float, float]:
    """0 where all that is written is what the reference writes and the squares agree, otherwise infinity."""
    *got, square_norm = case.run(device)
    with backend("reference"):
        *expected, exact = case.run(device)
    same = agree(got, expected)
    close = torch.allclose(square_norm, exact, rtol=1e-6, atol=0, equal_nan=True)
    return 0.0 if same and close else float("inf"), 0.0


def agree(got, expected) -> bool:
    """Whether tensors are the same to the bit, with NaN equal to NaN."""
    return all(a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in zip(got, expected, strict=True))


def _bits(t: torch.Tensor) -> torch.Tensor:
    """With NaN equal to NaN, whatever their bits."""
    if not t.is_floating_point():
        return t
    return torch.where(t.isnan(), torch.zeros_like(t), t).flatten().view(torch.uint8)
