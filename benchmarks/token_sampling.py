"""Token sampling beside the arithmetic that the published systems run, eager and under ``torch.compile``.

256 rows of bf16 logits with V = 126464 (LLaDA-8B's). The peers return (token, confidence) as LLaDA's and Dream's code
do: for a draw, Gumbel noise in float64; for top-p, a sort. Where a peer draws, its numbers are others, and ours is
judged by the tests; a row's error here is that of the confidence of the same tokens.
"""

from __future__ import annotations

import functools

import torch

import genfast
from benchmarks import token_generate, token_head, token_masking, token_transition
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.published_tokens import MASK_ID, backend_name, draw, greedy, nucleus
from benchmarks.rotation import pool

ENTRIES, ROWS, BLOCK, LENGTH = 126464, 256, 32, 1024


def plans(settings: Settings) -> list[Plan]:
    """The cases of the family, for the settings' device."""
    device, quick = settings.device, settings.quick
    rows, entries = (16, 4096) if quick else (ROWS, ENTRIES)
    build = functools.partial(op_case, device, rows, entries, not quick)
    return [
        Plan("greedy", functools.partial(build, "greedy", {}, greedy, 9, 7)),
        Plan("draw", functools.partial(build, "draw", dict(temperature=1.0), draw, 60, 15)),
        Plan(
            "draw guided", functools.partial(build, "draw guided", dict(temperature=1.0), draw, 60, None, guided=True)
        ),
        Plan(
            "top-p",
            functools.partial(
                build, "top-p", dict(temperature=1.0, top_p=0.95, confidence="tempered"), nucleus, 20, None
            ),
        ),
        Plan("step block", functools.partial(step_case, device, 64 if quick else LENGTH, entries, BLOCK, 500)),
        Plan(
            "step whole",
            functools.partial(step_case, device, *((64, entries, 64) if quick else (LENGTH, entries, LENGTH)), 50),
        ),
        Plan("select", functools.partial(select_case, device)),
        *token_masking.plans(settings),
        *token_generate.plans(settings),
        *token_transition.plans(settings),
        *token_head.plans(settings),
    ]


def op_case(device, rows, entries, compiled, name, options, peer, eager_bar, compiled_bar, guided=False) -> Case:
    """``sample_tokens`` on all rows."""
    logits = pool((rows, entries), torch.bfloat16, device)
    others = pool((rows, entries), torch.bfloat16, device, seed=1)
    on_cpu = device.type == "cpu"

    def ours(i):
        extra = dict(uncond=others[i], guidance=2.0) if guided else {}
        seed = dict(seed=i) if options.get("temperature") else {}
        return genfast.sample_tokens(logits[i], **options, **extra, **seed).confidence

    def of(function):
        def theirs(i):
            x = others[i] + 2.0 * (logits[i] - others[i]) if guided else logits[i]
            return function(x)[1]

        return theirs

    def exact():
        with genfast.backend("reference"):
            return ours(0)

    peers = [Peer("published arithmetic", torch.__version__, of(peer), check=exact, bars=_bar(eager_bar, on_cpu))]
    if compiled_bar and compiled:
        fast = torch.compile(peer)
        peers.append(Peer("torch.compile", torch.__version__, of(fast), check=exact, bars=_bar(compiled_bar, on_cpu)))
    return Case(
        name,
        (rows, entries),
        "bf16",
        run=ours,
        exact=exact,
        copy_dtype=torch.bfloat16,
        peers=peers,
        bytes=rows * entries * 2 * (2 if guided else 1),
        output_bytes=rows * 12,
        bars=(Bar("extra_bytes", at_most=2**20),) if on_cpu else (),
        backend=backend_name(device),
        allowed=1e-5,
    )


def step_case(device, length, entries, block, bar) -> Case:
    """A whole step of LLaDA at temperature 1 in one sequence: sample, select, commit; the peer reads all positions."""
    logits = pool((1, length, entries), torch.bfloat16, device, least=2)
    start = (length - block) // 2
    mask_id = min(MASK_ID, entries - 1)
    x = torch.zeros((1, length), dtype=torch.int64, device=device)
    x[:, start : start + block] = mask_id
    rows = torch.arange(start, start + block, device=device)
    places = torch.arange(length, device=device)

    def ours(i):
        state = x.clone()
        found = genfast.sample_tokens(logits[i], temperature=1.0, seed=i, rows=rows, mask_id=mask_id)
        inside = state[:, start : start + block]
        selected = genfast.select_transfer(found.confidence[None], inside == mask_id, 1)
        genfast.commit_(inside, found.tokens[None], selected, mask_id=mask_id)
        return (state != mask_id).sum()

    def theirs(i):
        state = x.clone()
        masked = state == mask_id
        tokens, confidence = draw(logits[i])
        confidence = torch.where(masked & (places < start + block), confidence, -torch.inf)
        tokens = torch.where(masked, tokens, state)
        transfer = torch.zeros_like(masked)
        for j in range(len(state)):
            transfer[j, confidence[j].topk(1).indices] = True
        state[transfer] = tokens[transfer]
        return (state != mask_id).sum()

    def exact():
        return torch.tensor(length - block + 1, device=device)

    return Case(
        f"LLaDA step, {block} of {length} positions",
        (1, length, entries),
        "bf16",
        run=ours,
        exact=exact,
        peers=[
            Peer("published arithmetic", torch.__version__, theirs, check=exact, bars=_bar(bar, device.type == "cpu"))
        ],
        backend=backend_name(device),
    )


def select_case(device) -> Case:
    """The n most confident masked positions of 8 rows of 1024."""
    confidence = pool((8, 1024), torch.float32, device, least=8)
    mask = torch.rand(8, 1024, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    counts = torch.arange(20, 28, device=device)

    def ours(i):
        return genfast.select_transfer(confidence[i], mask, counts)

    def theirs(i):
        left = torch.where(mask, confidence[i], -torch.inf)
        transfer = torch.zeros_like(mask)
        for j in range(len(left)):
            transfer[j, left[j].topk(k=counts[j]).indices] = True
        return transfer

    return Case(
        "select_transfer",
        (8, 1024),
        "fp32",
        run=ours,
        exact=lambda: theirs(0),
        peers=[Peer("loop over rows", torch.__version__, theirs, bars=_bar(10, device.type == "cpu"))],
        backend=backend_name(device),
    )


def _bar(ratio, on_cpu: bool) -> tuple[Bar, ...]:
    return (Bar("ratio", at_least=ratio),) if ratio and on_cpu else ()
