"""Cases of ``forward_mask``: schedules, blocks, counts, sources of randomness; results must be equal to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from genfast.backends import backend
from genfast.ops.token_masking import forward_mask


@dataclass(frozen=True)
class MaskCase:
    """One call of ``forward_mask``. ``tensors`` are made to fit: ``maskable``, ``row`` (maskable of one row), ``t``,
    ``counts``, ``seeds``, ``one_seed``, ``generator``."""

    shape: tuple[int, int]
    options: dict = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    strided: bool = False

    @property
    def name(self) -> str:
        options = [f"{k}={v}" for k, v in self.options.items()]
        return " ".join(["forward_mask", "x".join(map(str, self.shape)), *options, *self.tensors]) + (
            " strided" if self.strided else ""
        )

    def run(self, device) -> list[torch.Tensor]:
        """All that the call returns."""
        batch, length = self.shape
        draw = torch.Generator().manual_seed(length)
        x0 = torch.randint(0, 50, (batch, 2 * length), generator=draw).to(device)
        x0 = x0[:, ::2] if self.strided else x0[:, :length]
        allowed = (torch.rand(batch, length, generator=draw) < 0.7).to(device)
        if batch > 1:
            allowed[1] = False
        options = {} if "vocab_size" in self.options else {"mask_id": 99}
        options.update(self.options)
        size = self.options.get("block_size")
        blocks = (batch,) if size is None else (batch, -(-length // size))
        made = dict(
            maskable=("maskable", allowed),
            row=("maskable", allowed[0] if batch else allowed.new_ones(length)),
            t=("t", torch.rand(blocks, generator=draw).to(device)),
            counts=("count", torch.arange(batch, device=device) * 7 - 3),
            seeds=("seed", torch.arange(batch, device=device) - 2),
            one_seed=("seed", torch.tensor(2**40, device=device)),
            generator=("generator", torch.Generator().manual_seed(3)),
        )
        options.update(made[k] for k in self.tensors)
        if not {"seed", "generator"} & options.keys():
            options["seed"] = 7
        return [out for out in forward_mask(x0, **options) if out is not None]


_CASES = (
    (dict(), ()),
    (dict(mask_id=-5, stream=-1, offset=2**32 - 1), ()),
    (dict(schedule="loglinear"), ("maskable",)),
    (dict(schedule="loglinear", eps=0.0, t_range=(0.3, 0.8), block_size=16, antithetic=True), ()),
    (dict(block_size=1, antithetic=True, global_batch=9, offset=4), ("row",)),
    (dict(block_size=7, vocab_size=50257), ("maskable",)),
    (dict(vocab_size=3, t=1.0), ("one_seed",)),
    (dict(t=0.0, eps=0.0), ()),
    (dict(t=1.0, eps=0.0, block_size=4), ("maskable",)),
    (dict(block_size=100), ("t", "seeds")),
    (dict(), ("t", "seeds", "maskable")),
    (dict(count=5), ("maskable", "seeds")),
    (dict(stream=3), ("counts",)),
    (dict(vocab_size=2**31 - 1), ("counts", "maskable")),
    (dict(), ("generator", "maskable")),
    (dict(vocab_size=11, schedule="loglinear", block_size=8, antithetic=True), ("generator",)),
)


def cases(quick: bool = False) -> list[MaskCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found = [MaskCase(shape, *case) for shape in ((1, 1), (3, 70), (4, 1500)) for case in _CASES]
    found += [MaskCase(shape, *case) for shape in ((0, 5), (3, 0)) for case in _CASES[::4]]
    found += [MaskCase((3, 133), *case, strided=True) for case in _CASES[::5]]
    return found[::3] if quick else found


def check(case: MaskCase, device) -> tuple[float, float]:
    """0 where all is equal to what the reference does, otherwise infinity; and what is allowed."""
    got = case.run(device)
    with backend("reference"):
        expected = case.run(device)
    return 0.0 if all(map(torch.equal, got, expected)) else float("inf"), 0.0
