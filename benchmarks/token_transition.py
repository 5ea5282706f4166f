"""Reverse steps of SEDD and MDLM beside the arithmetic that the published code runs, eager and ``torch.compile``.

256 rows of float32 with V = 50258, half of them masked. The scores add up to about 1, as at t = 1/2 of the loglinear
noise. The peers are written out in the published order of operations: one-hots in int64, float32 noise, argmax of the
quotient (:func:`sedd_step`, :func:`mdlm_step`; the tests hold ours to the same tokens from the same noise).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.published_tokens import backend_name
from benchmarks.rotation import pool

ENTRIES, SHAPE = 50258, (2, 128)
AMOUNT, STAY = 0.02, 0.98


def plans(settings: Settings) -> list[Plan]:
    """The cases of the op, for the settings' device."""
    device = settings.device
    shape = (2, 8, 1000) if settings.quick else (*SHAPE, ENTRIES)
    compiled = not settings.quick
    build = functools.partial(sedd_case, device, shape, compiled)
    return [
        Plan("SEDD analytic", functools.partial(build, "analytic", "absorb", 20)),
        Plan("SEDD euler", functools.partial(build, "euler", "absorb", 20)),
        Plan("SEDD denoise", functools.partial(build, "denoise", "absorb", 20)),
        Plan("SEDD uniform", functools.partial(build, "analytic", "uniform", None)),
        Plan("MDLM update", functools.partial(mdlm_case, device, shape, compiled, False)),
        Plan("MDLM cached", functools.partial(mdlm_case, device, shape, compiled, True)),
    ]


# --- the published arithmetic ----------------------------------------------------------------------------------------


def categorical(p: Tensor, noise: Tensor | None = None) -> Tensor:
    """A draw proportional to p, by Gumbel-max as both projects write it."""
    noise = torch.rand_like(p) if noise is None else noise
    return (p / (1e-10 - (noise + 1e-10).log())).argmax(-1)


def sedd_probabilities(x: Tensor, log_score: Tensor, amount: Tensor, graph: str, rule: str) -> Tensor:
    """p over the next token, not normalised and possibly negative; ``amount`` is [B, 1], the mask the last token."""
    score, size = log_score.exp(), log_score.shape[-1]
    own, amount = x[..., None], amount[..., None]
    masked = (x == size - 1)[..., None]
    if rule == "euler":
        if graph == "absorb":
            rate = -F.one_hot(x, size)
            rate[masked[..., 0]] += 1
        else:
            rate = (torch.ones_like(score) / size).scatter(-1, own, (1 - size) / size)
        rate = rate * score
        rate.scatter_(-1, own, 0.0)
        rate.scatter_(-1, own, -rate.sum(-1, keepdim=True))
        return F.one_hot(x, size).to(rate) + amount * rate
    if graph == "absorb":
        extra = (1 - amount.exp()) * score.sum(-1, keepdim=True)
        staggered = score * amount.exp()
        staggered[..., -1:] += extra
        back = (-amount).exp() * F.one_hot(x, size)
        back = back + torch.where(masked, 1 - (-amount).exp(), 0)
        p = staggered * back
        return p[..., :-1] if rule == "denoise" else p
    shrunk = (-amount).exp()
    staggered = (shrunk - 1) / (size * shrunk) * score.sum(-1, keepdim=True) + score / shrunk
    back = torch.ones_like(score) * (1 - shrunk) / size
    back = back.scatter(-1, own, 0.0)
    back = back.scatter(-1, own, 1 - back.sum(-1, keepdim=True))
    return staggered * back


def sedd_step(x, log_score, amount, graph, rule, noise=None) -> Tensor:
    """One reverse step of SEDD."""
    return categorical(sedd_probabilities(x, log_score, amount, graph, rule), noise)


def subs(x: Tensor, logits: Tensor, mask_id: int) -> Tensor:
    """MDLM's log p(x0): no mask, and what is known stays."""
    logits = logits.clone()
    logits[:, :, mask_id] += -1e6
    logits = logits - logits.logsumexp(-1, keepdim=True)
    known = x != mask_id
    logits[known] = -1e6
    logits[known, x[known]] = 0
    return logits


def mdlm_step(x: Tensor, p: Tensor, now: Tensor, later: Tensor, mask_id: int, noise: Tensor | None = None) -> Tensor:
    """One reverse step of MDLM from p(x0); ``now`` and ``later`` are the chances of being masked, [B]."""
    q = p * (now - later)[:, None, None]
    q[:, :, mask_id] = later[:, None]
    known = (x != mask_id).to(x.dtype)
    return known * x + (1 - known) * categorical(q, noise)


# --- cases -----------------------------------------------------------------------------------------------------------


def _state(shape, device) -> Tensor:
    """Half of the positions masked."""
    *places, size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, size - 1, places, generator=generator)
    half = torch.rand(places, generator=generator).flatten().argsort()[: x.numel() // 2]
    x.view(-1)[half] = size - 1
    return x.to(device)


def _case(name, shape, ours, theirs, compiled, bar, device, moved_bytes) -> Case:
    on_cpu = device.type == "cpu"

    def exact():
        with genfast.backend("reference"):
            return ours(0)

    bars = (Bar("ratio", at_least=bar),) if bar and on_cpu else ()
    peers = [Peer("published arithmetic", torch.__version__, theirs(False), check=exact, bars=bars)]
    if compiled:
        peers.append(Peer("torch.compile", torch.__version__, theirs(True), check=exact))
    return Case(
        name,
        shape,
        "fp32",
        run=ours,
        exact=exact,
        peers=peers,
        bytes=moved_bytes,
        output_bytes=math.prod(shape[:2]) * 8,
        bars=(Bar("extra_bytes", at_most=2**20),) if on_cpu else (),
        backend=backend_name(device),
    )


def sedd_case(device, shape, compiled, rule, graph, bar) -> Case:
    """A step of SEDD: the rows that can change are read."""
    scores = pool(shape, torch.float32, device)
    x = _state(shape, device)
    level = math.log(shape[-1]) + 0.5  # of the mean of e^N(0, 1)
    scores = [t - level for t in scores.tensors]
    amount = torch.full((shape[0], 1), AMOUNT, device=device)

    def ours(i):
        score = scores[i % len(scores)]
        return genfast.discrete_transition(x, score, AMOUNT, graph=graph, rule=rule, seed=i).x

    def theirs(fast):
        step = torch.compile(sedd_step) if fast else sedd_step
        return lambda i: step(x, scores[i % len(scores)], amount, graph, rule)

    rows = x.numel() // (2 if graph == "absorb" else 1)
    return _case(f"SEDD {graph} {rule}", shape, ours, theirs, compiled, bar, device, rows * shape[-1] * 4)


def mdlm_case(device, shape, compiled, cached) -> Case:
    """A step of MDLM from logits, or, for the peer, from probabilities kept of the last step."""
    logits = pool(shape, torch.float32, device)
    x = _state(shape, device)
    mask_id = shape[-1] - 1
    now = torch.full((shape[0],), 0.5, device=device)
    later = now * STAY
    kept = [subs(x, t, mask_id).exp() for t in logits.tensors[:4]] if cached else None

    def ours(i):
        return genfast.discrete_transition(x, logits[i], STAY, kind="logits", rule="posterior", seed=i).x

    def theirs(fast):
        def update(x, given):
            return mdlm_step(x, given if cached else subs(x, given, mask_id).exp(), now, later, mask_id)

        step = torch.compile(update) if fast else update
        return lambda i: step(x, kept[i % 4] if cached else logits[i])

    return _case("MDLM cached" if cached else "MDLM update", shape, ours, theirs, compiled, None, device, 0)
