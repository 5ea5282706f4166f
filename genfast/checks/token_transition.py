"""Cases of ``discrete_transition``: every law and option on rows of every odd kind; states must be equal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from genfast.backends import backend
from genfast.ops.token_transition import discrete_transition

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class TransitionCase:
    """One call of ``discrete_transition``. ``tensors`` are made to fit: ``active``, ``amounts``, ``row_ids``,
    ``seeds``, ``noise`` (float32), ``noise64``."""

    shape: tuple[int, int, int]
    amount: float
    options: dict = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    dtype: torch.dtype = F32
    odd: bool = False
    """Whether some rows are of -inf alone, of one finite entry, with NaN, with infinities, with ties."""
    strided: bool = False
    in_place: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        options = [k if v is True else f"{k}={v}" for k, v in self.options.items()]
        extra = ["odd rows"] * self.odd + ["strided"] * self.strided + ["in place"] * self.in_place
        shape = "x".join(map(str, self.shape))
        return " ".join(["transition", shape, dtype, f"{self.amount:g}", *options, *self.tensors, *extra])

    def arguments(self, device="cpu") -> tuple[torch.Tensor, torch.Tensor, float | torch.Tensor, dict]:
        """The state, the output, the amount and the options."""
        generator = torch.Generator().manual_seed(len(self.name))
        batch, length, size = self.shape
        absorbs = self.options.get("graph") != "uniform"
        output = torch.randn(self.shape, generator=generator) * 2 - (5 if absorbs else 2)
        mask = self.options.get("mask_id", size - 1)
        x = torch.randint(0, size, (batch, length), generator=generator)
        if absorbs:
            x[torch.rand(x.shape, generator=generator) < 0.7] = mask
        if self.options.get("kind") != "logits":
            output.scatter_(2, x[..., None], 0.0)
        if self.odd:
            flat, own = output.view(-1, size), x.view(-1)
            flat[0] = -torch.inf
            flat[1, : size - 1] = -torch.inf
            flat[2, size // 2] = torch.nan
            flat[3, size // 3] = torch.inf
            flat[4] = flat[4].round()
            flat[5, size // 2 :] = -torch.inf
            flat[6, own[6]] = torch.nan
            flat[7, 0] = 300.0
            flat[8] -= 2000.0
        output = output.to(device, self.dtype)
        x = x.to(device)
        if self.strided:
            wide = torch.full((batch, length, size + 3), torch.nan, device=device, dtype=self.dtype)
            wide[..., :size] = output
            output = wide[..., :size]
            x = x.T.contiguous().T
        width = size - (absorbs and self.options.get("rule") == "denoise" and mask == size - 1)
        made = dict(
            active=lambda: (torch.rand((batch, length), generator=generator) < 0.5).to(device),
            row_ids=lambda: torch.arange(batch * length, device=device) * 2**32 + 2**32 - 5,
            seeds=lambda: torch.arange(batch, device=device) - 2,
            noise=lambda: torch.rand((batch, length, width), generator=generator).to(device),
            noise64=lambda: torch.rand((batch, length, width), generator=generator, dtype=torch.float64).to(device),
        )
        names = dict(seeds="seed", noise64="noise")
        options = dict(self.options)
        options.update((names.get(k, k), made[k]()) for k in self.tensors if k != "amounts")
        if not {"seed", "noise"} & options.keys():
            options["seed"] = 7
        amount = self.amount
        if "amounts" in self.tensors:
            amount = torch.linspace(0, self.amount, batch, device=device)
        return x, output, amount, options

    def run(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """The next state and which rows have changed."""
        x, output, amount, options = self.arguments(device)
        return discrete_transition(x, output, amount, **options, **(dict(out=x) if self.in_place else {}))


_ODD = (3, 4, 777)
_LAWS = (
    (0.4, {}),
    (2.0, dict(rule="euler")),
    (1.0, dict(rule="denoise")),
    (0.7, dict(mask_id=400)),
    (0.5, dict(graph="uniform")),
    (3.0, dict(graph="uniform", rule="denoise")),
    (2.0, dict(graph="uniform", rule="euler")),
    (0.4, dict(kind="logits", rule="posterior")),
    (0.3, dict(kind="logits", rule="posterior", temperature=0.7, top_p=0.8)),
    (0.0, dict(kind="logits", rule="posterior", top_p=0.8, top_p_crossing=False, mask_id=3)),
)


def cases(quick: bool = False) -> list[TransitionCase]:
    """The list that ``genfast verify`` runs; ``quick`` keeps every third."""
    found = []
    for amount, options in _LAWS:
        found += [
            TransitionCase(_ODD, amount, options, odd=True),
            TransitionCase(_ODD, amount, options, ("amounts", "seeds", "active"), BF16),
            TransitionCase(_ODD, amount, options, ("noise",), odd=True),
            TransitionCase(_ODD, amount, options, dtype=F16, odd=True, strided=True, in_place=True),
        ]
    found += [TransitionCase(_ODD, 0.0, options) for options in ({}, dict(graph="uniform"))]
    found += [TransitionCase(_ODD, 1.0, options) for _, options in _LAWS[-3:]]
    found += [TransitionCase((2, 3, 1), 1.0, options) for _, options in (*_LAWS[:3], *_LAWS[4:8])]
    found += [TransitionCase((2, 3, 9000), amount, options) for amount, options in (*_LAWS[:3], *_LAWS[4:9])]
    found += [
        TransitionCase(_ODD, 0.0, dict(kind="logits", rule="posterior", temperature=0.0), odd=True),
        TransitionCase(_ODD, 0.4, dict(stream=-1, offset=2**32 - 1)),
        TransitionCase(_ODD, 0.4, {}, ("row_ids",)),
        TransitionCase(_ODD, 0.4, {}, ("noise64", "amounts")),
        TransitionCase(_ODD, 0.9, dict(kind="logits", rule="posterior"), ("noise64", "active"), BF16),
        TransitionCase((0, 4, 9), 0.4),
        TransitionCase((3, 0, 9), 0.4),
    ]
    return found[::3] if quick else found


def check(case: TransitionCase, device) -> tuple[float, float]:
    """0 where all is equal to what the reference does, otherwise infinity; and what is allowed."""
    got = case.run(device)
    with backend("reference"):
        expected = case.run(device)
    return 0.0 if all(map(torch.equal, got, expected)) else float("inf"), 0.0
