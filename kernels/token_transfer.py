"""Which masked positions to unmask, and the write. ``genfast.reference.token_sampling`` is the specification.

Three launches: scores and stretches of a row, in order; the rank of every position, by counting those before it in the
ranking, tile against tile, so that nothing is sorted; and the decision. Sums of entropies are float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels.order_key import from_key, to_key
from genfast.kernels.philox import philox_words
from genfast.reference.token_transfer import STRATEGIES

TILE = 256
EXACT = {"num_warps": 4, "enable_fp_fusion": False}

_TOP, _THRESHOLD, _FACTOR, _BOUND, _HIERARCHY, _SEQUENTIAL, _RANDOM = (tl.constexpr(k) for k in range(len(STRATEGIES)))
_FAR = tl.constexpr(2**30)


@triton.jit(do_not_specialize=["length", "start", "end", "temperature", "seed_low", "seed_high", "stream", "offset"])
def score_kernel(
    confidence, confidence_stride, mask, mask_stride, length, starts, start, ends, end, temperature,
    seeds, seed_low, seed_high, stream, offset, keys, stretches,
    STRATEGY: tl.constexpr, NOISE: tl.constexpr, SEED: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Per position: the order key of its score, 0 for one that cannot be taken, and the number of such before it."""
    row = tl.program_id(0).to(tl.int64)
    first_place, last_place = start, end
    if STARTS:
        first_place = tl.load(starts + row)
    if ENDS:
        last_place = tl.load(ends + row)
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    if SEED > 1:
        seed = tl.load(seeds + (row if SEED == 3 else 0))
        k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    sample = offset.to(tl.int64)
    if SEED != 3:
        sample += row
    refused = tl.full((), 0, tl.int32)
    for first in range(0, length, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < length
        masked = tl.load(mask + row * mask_stride + at, mask=inside, other=0) != 0
        candidate = masked & inside & (at >= first_place) & (at < last_place)
        if STRATEGY == _SEQUENTIAL:
            score = -at.to(tl.float32)
        else:
            score = tl.load(confidence + row * confidence_stride + at, mask=inside, other=0.0)
            if NOISE:
                c0 = at.to(tl.uint32)
                zero = tl.zeros_like(c0)
                sample_word = (sample & 0xFFFFFFFF).to(tl.uint32) + zero
                _, _, _, word = philox_words(k0, k1, c0, zero, sample_word, stream.to(tl.uint32) + zero)
                if STRATEGY == _RANDOM:
                    score = (word >> 8).to(tl.float32)
                else:
                    u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
                    score = (score.to(tl.float64) / tl.full((), temperature, tl.float64) - tl.log(-tl.log(u))).to(
                        tl.float32
                    )
            score = tl.where(score == score, score, float("-inf"))
        tl.store(keys + row * length + at, tl.where(candidate, to_key(score), 0), mask=inside)
        no = tl.where(candidate, 0, 1)
        tl.store(stretches + row * length + at, refused + tl.cumsum(no, 0), mask=inside)
        refused += tl.sum(no, 0)


@triton.jit(do_not_specialize=["length"])
def rank_kernel(
    keys, stretches, length, ranks, sums, leaders,
    ENTROPY: tl.constexpr, STRETCH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Per position: how many rank before it, the sum of their entropies, whether none of its stretch does."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    key = tl.load(keys + row * length + at, mask=at < length, other=0)
    stretch = tl.load(stretches + row * length + at, mask=at < length, other=-1)
    rank = tl.zeros((TILE,), tl.int32)
    rivals = tl.zeros((TILE,), tl.int32)
    total = tl.zeros((TILE,), tl.float64)
    for first in range(0, length, TILE):
        other_at = first + tl.arange(0, TILE)
        other = tl.load(keys + row * length + other_at, mask=other_at < length, other=0)
        before = (other[None, :] > key[:, None]) | (
            (other[None, :] == key[:, None]) & (other_at[None, :] < at[:, None])
        )
        before = before & (other[None, :] > 0)
        rank += tl.sum(before.to(tl.int32), 1)
        if ENTROPY:
            entropy = -from_key(other).to(tl.float64)
            total += tl.sum(tl.where(before, entropy[None, :], 0.0), 1)
        if STRETCH:
            other_stretch = tl.load(stretches + row * length + other_at, mask=other_at < length, other=-2)
            rivals += tl.sum((before & (other_stretch[None, :] == stretch[:, None])).to(tl.int32), 1)
    tl.store(ranks + row * length + at, rank, mask=at < length)
    if ENTROPY:
        tl.store(sums + row * length + at, total, mask=at < length)
    if STRETCH:
        tl.store(leaders + row * length + at, tl.where(rivals == 0, 1, 0), mask=at < length)


@triton.jit(do_not_specialize=["length", "n", "threshold", "low_threshold", "slack", "factor", "bound"])
def decide_kernel(
    keys, ranks, sums, leaders, length, counts, n, threshold, low_threshold, slack, factor, bound, out,
    STRATEGY: tl.constexpr, COUNTS: tl.constexpr, SLACK: tl.constexpr, STRICT: tl.constexpr, ACCEPT_LAST: tl.constexpr,
    INCLUSIVE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    least = n
    if COUNTS:
        least = tl.load(counts + row)
    least = tl.full((), 0, tl.int64) + least
    if (STRATEGY == _FACTOR) or (STRATEGY == _BOUND):  # noqa: SIM109 (not in Triton)
        failing = tl.full((TILE,), _FAR, tl.int32)
        count = tl.full((), 0, tl.int32)
        for first in range(0, length, TILE):
            at = first + tl.arange(0, TILE)
            key = tl.load(keys + row * length + at, mask=at < length, other=0)
            rank = tl.load(ranks + row * length + at, mask=at < length, other=0)
            score = from_key(key)
            if STRATEGY == _FACTOR:
                wanted = (1.0 - tl.full((), factor, tl.float64) / (rank.to(tl.float64) + 2.0)).to(tl.float32)
                fails = (score < wanted) & (rank > 0)
            else:
                total = tl.load(sums + row * length + at, mask=at < length, other=0.0)
                if INCLUSIVE:
                    fails = (total - score.to(tl.float64) < tl.full((), bound, tl.float64)) == 0
                else:
                    fails = (total <= tl.full((), bound, tl.float64)) == 0
            failing = tl.where(fails & (key > 0), tl.minimum(failing, rank), failing)
            count += tl.sum(tl.where(key > 0, 1, 0), 0)
        reached = tl.minimum(tl.min(failing, 0), count)
        if ACCEPT_LAST:
            reached = tl.where(reached == count - 1, count, reached)
        least = tl.maximum(least, reached.to(tl.int64))
    limit = tl.full((), threshold, tl.float32)
    if SLACK:
        best = tl.zeros((TILE,), tl.int64)
        for first in range(0, length, TILE):
            at = first + tl.arange(0, TILE)
            best = tl.maximum(best, tl.load(keys + row * length + at, mask=at < length, other=0))
        top = tl.max(best, 0)
        lowest = tl.full((), -3.4028234663852886e38, tl.float32)
        within = tl.where(top > 0, from_key(top) - slack, lowest)
        limit = tl.minimum(tl.maximum(within, lowest), limit)
    for first in range(0, length, TILE):
        at = first + tl.arange(0, TILE)
        key = tl.load(keys + row * length + at, mask=at < length, other=0)
        chosen = tl.load(ranks + row * length + at, mask=at < length, other=0).to(tl.int64) < least
        if (STRATEGY == _THRESHOLD) or (STRATEGY == _HIERARCHY):  # noqa: SIM109
            score = from_key(key)
            if STRICT:
                chosen = chosen | (score > limit)
            else:
                chosen = chosen | (score >= limit)
            if STRATEGY == _HIERARCHY:
                leads = tl.load(leaders + row * length + at, mask=at < length, other=0) != 0
                if STRICT:
                    chosen = chosen | (leads & (score > low_threshold))
                else:
                    chosen = chosen | (leads & (score >= low_threshold))
        tl.store(out + row * length + at, (chosen & (key > 0)).to(tl.int8), mask=at < length)


@triton.jit(do_not_specialize=["length", "mask_id", "eos_id"])
def commit_kernel(
    x, x_stride, tokens, tokens_stride, selected, selected_stride, length, mask_id, eos_id, left, finished,
    EOS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    masks = tl.full((), 0, tl.int64)
    first_mask = tl.full((TILE,), _FAR, tl.int32)
    first_eos = tl.full((TILE,), _FAR, tl.int32)
    for first in range(0, length, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < length
        chosen = tl.load(selected + row * selected_stride + at, mask=inside, other=0) != 0
        value = tl.load(x + row * x_stride + at, mask=inside, other=0)
        value = tl.where(chosen, tl.load(tokens + row * tokens_stride + at, mask=inside & chosen, other=0), value)
        tl.store(x + row * x_stride + at, value, mask=chosen)
        masked = inside & (value == mask_id)
        masks += tl.sum(tl.where(masked, 1, 0).to(tl.int64), 0)
        first_mask = tl.where(masked, tl.minimum(first_mask, at), first_mask)
        if EOS:
            first_eos = tl.where(inside & (value == eos_id), tl.minimum(first_eos, at), first_eos)
    done = (masks == 0) | (tl.min(first_eos, 0) < tl.min(first_mask, 0))
    tl.store(left + row, masks)
    tl.store(finished + row, done.to(tl.int8))


def _number(value) -> int:
    return 0 if isinstance(value, Tensor) else value


def select_transfer(
    confidence: Tensor,
    mask: Tensor,
    *,
    n: int | Tensor,
    strategy: str,
    threshold: float,
    low_threshold: float,
    slack: float | None,
    strict: bool,
    factor: float,
    accept_last: bool,
    bound: float,
    inclusive: bool,
    start: int | Tensor,
    end: int | Tensor,
    temperature: float,
    seed: int | Tensor | None,
    stream: int,
    offset: int,
    out: Tensor,
) -> None:
    """See :func:`genfast.select_transfer`."""
    batch, length = confidence.shape
    if not batch or not length:
        return
    kind = STRATEGIES.index(strategy)
    ordered, stretched = strategy == "entropy_bound", strategy == "hierarchy"
    tensor = isinstance(seed, Tensor)
    number = _number(seed) or 0
    keys = torch.empty((batch, length), dtype=torch.int64, device=out.device)
    stretches, ranks, leaders = torch.empty((3, batch, length), dtype=torch.int32, device=out.device)
    sums = torch.empty((batch, length) if ordered else (1,), dtype=torch.float64, device=out.device)
    score_kernel[(batch,)](
        confidence,
        confidence.stride(0),
        mask.view(torch.int8),
        mask.stride(0),
        length,
        start if isinstance(start, Tensor) else keys,
        _number(start),
        end if isinstance(end, Tensor) else keys,
        _number(end),
        temperature,
        seed if tensor else keys,
        number & 0xFFFFFFFF,
        (number >> 32) & 0xFFFFFFFF,
        stream & 0xFFFFFFFF,
        offset,
        keys,
        stretches,
        STRATEGY=kind,
        NOISE=strategy == "random" or (temperature > 0 and strategy != "sequential"),
        SEED=0 if seed is None else 2 + seed.dim() if tensor else 1,
        STARTS=isinstance(start, Tensor),
        ENDS=isinstance(end, Tensor),
        TILE=TILE,
        **EXACT,
    )
    tile = 64
    rank_kernel[(batch, triton.cdiv(length, tile))](
        keys, stretches, length, ranks, sums, leaders, ENTROPY=ordered, STRETCH=stretched, TILE=tile, **EXACT
    )
    decide_kernel[(batch,)](
        keys,
        ranks,
        sums,
        leaders,
        length,
        n if isinstance(n, Tensor) else keys,
        _number(n),
        threshold,
        low_threshold,
        0.0 if slack is None else slack,
        factor,
        bound,
        out.view(torch.int8),
        STRATEGY=kind,
        COUNTS=isinstance(n, Tensor),
        SLACK=slack is not None,
        STRICT=strict,
        ACCEPT_LAST=accept_last,
        INCLUSIVE=inclusive,
        TILE=TILE,
        **EXACT,
    )


def commit_(
    x: Tensor, tokens: Tensor, selected: Tensor, *, mask_id: int, eos_id: int | None, left: Tensor, finished: Tensor
) -> None:
    """See :func:`genfast.commit_`."""
    if not x.shape[0]:
        return
    commit_kernel[(x.shape[0],)](
        x,
        x.stride(0),
        tokens,
        tokens.stride(0),
        selected.view(torch.int8),
        selected.stride(0),
        x.shape[1],
        mask_id,
        0 if eos_id is None else eos_id,
        left,
        finished.view(torch.int8),
        EOS=eos_id is not None,
        TILE=TILE,
        **EXACT,
    )
