"""k-means of the family ``vector_quantize``: a loop over the nearest code and the sums of each code's vectors.

It has no kernels of its own, only those of ``vector_quantize`` and ``code_update``; its reference is the loop over
theirs, and its tests are with ``code_update``. Nor has it a benchmark: an iteration takes what ``nearest_code`` and
``ema_update_`` take, which have theirs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from genfast._registry import export
from genfast.ops._checks import check_counters, checked_seed
from genfast.ops._codes import check_vectors, checked_dim, grouped
from genfast.ops.code_update import checked_mask, code_sums, reject_nonfinite, run_on
from genfast.ops.vector_quantize import nearest_rows
from genfast.random import philox_words
from genfast.reference.code_update import SHORTEST, counter, drawn_by_weight

FAMILY = "vector_quantize"
METRICS = ("l2", "cosine")
INITS = ("kmeans++", "random")


@export(FAMILY)
def kmeans(
    z: Tensor,
    K: int,
    *,
    iterations: int = 10,
    seed: int | Tensor,
    dim: int = -1,
    init: str = "kmeans++",
    metric: str = "l2",
    mask: Tensor | None = None,
    groups: int | None = None,
    stream: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Centres of K clusters: a codebook to start from.

    Lloyd's iterations, each a :func:`nearest_code` and one sum of vectors per code: no matrix of vectors by centres,
    and the same result to the bit from run to run and for any number of threads. A cluster without vectors keeps its
    centre.

    Args:
        z: the vectors, with any dtype and strides, as in :func:`nearest_code`; a float32 copy is made.
        K: how many clusters. With fewer vectors than that, some are centres more than once.
        iterations: of Lloyd's; 0 returns the vectors that were drawn.
        seed, stream: an int or an int64 tensor [], the same on every rank, that draws the first centres.
        init: ``"kmeans++"``, each next centre in proportion to the squared distance from those before, or
            ``"random"``, any vectors.
        metric: ``"l2"``, or ``"cosine"``: vectors and centres are divided by their lengths.
        mask: bool of z's shape without ``dim``: False where a vector takes no part.
        groups: G, for a codebook per group; z's dimension ``dim`` then holds G D numbers.
        group: the ranks whose vectors are clustered together; see :func:`ema_update_`. ``"kmeans++"`` then takes two
            small all-reduces per centre.

    Returns:
        (centres float32 [K, D] or [G, K, D], int64 [K] or [G, K] how many vectors were nearest in the last iteration;
        zeros of no iterations).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range; a vector that is not
            finite (on the CPU); no vectors.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007 (k-means++).
    """
    check_vectors("z", z)
    if z.dim() == 0:
        raise ValueError("z is a single number; expected at least one dimension")
    dim = checked_dim(z, dim)
    for name, value, least in (("K", K, 1), ("iterations", iterations, 0), ("groups", groups or 1, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if z.numel() == 0 or z.shape[dim] % (groups or 1):
        raise ValueError(f"z is {list(z.shape)}; expected vectors, of {groups or 1} groups in dimension {dim}")
    for name, value, known in (("init", init, INITS), ("metric", metric, METRICS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    mask = checked_mask(mask, [n for d, n in enumerate(z.shape) if d != dim], z.device)
    check_counters(stream, 0)
    seed = checked_seed(seed, 1, z.device)

    rows = grouped(z.detach(), dim, groups or 1).flatten(0, 1)
    rows = rows.to(torch.float64 if z.dtype == torch.float64 else torch.float32).contiguous()  # [N, G, D]
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=-1, eps=SHORTEST)
    there = torch.ones(len(rows), dtype=torch.bool, device=z.device) if mask is None else mask.reshape(-1)
    start = _spread if init == "kmeans++" else _any
    draw = _Draws(seed, stream, z.device)
    centres = torch.stack([start(rows[:, g].contiguous(), there, K, g, draw, group) for g in range(rows.shape[1])])
    sizes = torch.zeros(centres.shape[:2], dtype=torch.int64, device=z.device)
    for _ in range(iterations):
        found = nearest_rows(rows[None], centres, metric, True)
        reject_nonfinite(found, there[None], "raise")
        found = found.masked_fill(~there[None, :, None], -1)
        sums, _ = code_sums(rows[None], found, K, False, False, (None, 0, 0, 0), group)
        count = sums[..., -1:]
        means = sums[..., :-1] / count.clamp_min(1)
        if metric == "cosine":
            means = torch.nn.functional.normalize(means, dim=-1, eps=SHORTEST)
        centres = torch.where(count > 0, means, centres)
        sizes = count[..., 0].long()
    return (centres, sizes) if groups is not None else (centres[0], sizes[0])


class _Draws:
    """64-bit numbers by (seed, stream): (high, low) words."""

    def __init__(self, seed: int | Tensor, stream: int, device):
        self._seed, self._stream = counter(seed, device), counter(stream, device)

    def __call__(self, blocks: Tensor, group: int) -> tuple[Tensor, Tensor]:
        high, low, *_ = philox_words(self._seed, blocks, counter(group, blocks.device), self._stream)
        return high, low


def _spread(rows: Tensor, there: Tensor, count: int, g: int, draw: _Draws, group) -> Tensor:
    """[count, D]: k-means++ of rows [N, D]. Block j draws centre j; with ranks, block j + 2^32 the rank."""
    distance = there.to(rows.dtype)  # the first centre: all that are there, alike
    numbers = torch.arange(count, device=rows.device)
    high, low = draw(numbers, g)
    at_rank = draw(numbers + (1 << 32), g)[0] if group is not None else None
    centres = rows.new_empty(count, rows.shape[1])
    update = run_on("min_distance_update", rows)[1]
    for j in range(count):
        at = drawn_by_weight(distance, there, high[j], low[j])
        centre = rows.index_select(0, at[None])
        if group is not None:
            centre = _of_a_rank(centre, distance, there, at_rank[j], group)
        centres[j] = centre[0]
        if j == 0:
            distance = torch.where(there, torch.inf, distance.new_zeros(()))
        update(rows, centre, distance)
    return centres


def _of_a_rank(centre: Tensor, distance: Tensor, there: Tensor, word: Tensor, group) -> Tensor:
    """The centre [1, D] of one of the ranks, drawn in proportion to their sums of ``distance``, where all are 0 to how
    many vectors they have."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    shares = torch.zeros(2, world, dtype=torch.float64, device=centre.device)
    shares[0, rank] = distance.sum(dtype=torch.float64)
    shares[1, rank] = there.sum()
    dist.all_reduce(shares, group=group)
    share = torch.where(shares[0].sum() > 0, shares[0], shares[1])
    ends = share.cumsum(0)
    owner = torch.searchsorted(ends, (ends[-1] * word.double() * 2.0**-32).view(1), right=True)[0]
    centre = torch.where(owner.clamp_max(world - 1) == rank, centre, 0)
    dist.all_reduce(centre, group=group)
    return centre


def _any(rows: Tensor, there: Tensor, count: int, g: int, draw: _Draws, group) -> Tensor:
    """[count, D]: rows in a random order, again from the first where they are too few; centre j of rank j % world."""
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    position = torch.arange(len(rows), device=rows.device)
    high, low = draw(position + (rank << 32), g)
    order = torch.where(there, (high << 31) | (low >> 1), torch.iinfo(torch.int64).max).sort(stable=True).indices
    numbers = torch.arange(count, device=rows.device)
    centres = rows[order[(numbers // world) % there.sum().clamp_min(1)]]
    if world > 1:
        centres = torch.where((numbers % world == rank)[:, None], centres, 0)
        dist.all_reduce(centres, group=group)
    return centres
