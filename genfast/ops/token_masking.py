"""The op of the family ``token_sampling`` that noises clean tokens for training: checks, choice of backend.

There is no CUDA C++: one pass over the elements is what Triton writes well. A measurement on a GPU may say otherwise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.ops._checks import check_counters, checked_seed, dense_rows, fresh_seed, row_numbers

FAMILY = "token_sampling"
SCHEDULES = {"linear": (0.0, 1.0), "loglinear": (1e-3, 1.0)}
"""Schedules of :func:`forward_mask`, and the range of times that each draws from by default."""


@export(FAMILY)
class MaskedBatch(NamedTuple):
    """What :func:`forward_mask` returns: noised tokens, and what their loss is weighed with."""

    x: Tensor
    """int64 [B, L], the noised tokens."""
    mask: Tensor
    """bool [B, L], the positions that were noised."""
    weight: Tensor | None
    """float32 [B, L], what the loss of a noised position is multiplied by, 0 elsewhere; None for uniform noise."""
    t: Tensor
    """float32 [B], or [B, blocks] with ``block_size``: times; with ``count``, the part that was masked."""


@export(FAMILY)
def forward_mask(
    x0: Tensor,
    *,
    mask_id: int | None = None,
    vocab_size: int | None = None,
    t: float | Tensor | None = None,
    schedule: str = "linear",
    eps: float | None = None,
    t_range: tuple[float, float] | None = None,
    block_size: int | None = None,
    antithetic: bool = False,
    global_batch: int | None = None,
    maskable: Tensor | None = None,
    count: int | Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
) -> MaskedBatch:
    """Noise clean tokens as a discrete diffusion language model is trained on: time, mask and loss weight in one pass.

    Every position is noised with the probability p of its sequence's (or block's) time t, independently of the others:
    it becomes ``mask_id`` (LLaDA, Dream, MDLM, BD3-LM, SEDD absorb) or a uniform token (SEDD uniform).

    Args:
        x0: int64 [B, L].
        mask_id: the id of the mask token; or else
        vocab_size: noise with uniform tokens of [0, vocab_size), which may be the clean one.
        t: times in [0, 1], a number or floating [B] or [B, blocks]; drawn by default. For any other schedule give its
            probabilities here, with ``eps=0``.
        schedule: ``"linear"``, p = (1 - eps) t + eps and weight 1 / p (LLaDA); ``"loglinear"``, p = (1 - eps) t and
            weight 1 / t (MDLM, SEDD; with ``eps=0`` BD3-LM).
        eps: 1e-3 by default.
        t_range: times are uniform in [low, high): by default [0, 1) for ``"linear"`` and [1e-3, 1) for ``"loglinear"``.
            BD3-LM's clipped schedules are ranges such as (0.3, 0.8).
        block_size: one time per block of so many positions (BD3-LM), instead of one per sequence.
        antithetic: one time from each of B equal parts of the range (times blocks), in order, which lowers the variance
            of the loss (MDLM, BD3-LM).
        global_batch: with ``antithetic``, the sequences that share the range, B by default: of a batch that is drawn in
            parts, sequences ``offset`` to ``offset + B - 1`` are here.
        maskable: bool [B, L] or [L], False for what stays clean (prompt, padding); everything may be noised by default.
        count: noise exactly so many positions of each sequence (all, where fewer are maskable), a number or int64 [B],
            in place of a time (LLaDA's likelihood); the weight is then maskable / count.
        seed, stream, offset: of the random numbers (Philox, :mod:`genfast.random`), as in :func:`sample_tokens`.
            Without a source of randomness, a seed is taken from torch's default generator.
        generator: draw times, then positions, then uniform tokens from it with ``torch.rand`` and ``torch.randint``, as
            the published code does: the same generator gives the same batch.

    Returns:
        :class:`MaskedBatch`, new tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, or one that another leaves
            without a use.

    Source: LLaDA (arXiv:2502.09992), MDLM (arXiv:2406.07524), Block Diffusion (arXiv:2503.09573), SEDD
    (arXiv:2310.16834). The algorithm, to the bit: ``genfast/reference/token_masking.py``.
    """
    if not isinstance(x0, Tensor) or x0.dtype != torch.int64 or x0.dim() != 2:
        raise TypeError("x0 must be an int64 tensor [B, L]")
    batch, length = x0.shape
    device = x0.device
    if (mask_id is None) == (vocab_size is None):
        raise ValueError("give one of mask_id, for an absorbing mask, and vocab_size, for uniform noise")
    given = mask_id if vocab_size is None else vocab_size
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"mask_id and vocab_size must be whole numbers, got {type(given).__name__}")
    if mask_id is not None and not -(2**63) <= mask_id < 2**63:
        raise ValueError(f"mask_id must fit in 64 bits, got {mask_id}")
    if vocab_size is not None and not 1 <= vocab_size < 2**31:
        raise ValueError(f"vocab_size must be in [1, 2^31), got {vocab_size}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if count is not None:
        others = dict(t=t, eps=eps, t_range=t_range, block_size=block_size, generator=generator)
        unused = [name for name, value in others.items() if value is not None]
        unused += ["schedule"] * (schedule != "linear") + ["antithetic"] * antithetic
        if unused:
            raise ValueError(f"count fixes how many are noised; it does not go with {', '.join(unused)}")
        count = row_numbers("count", count, batch, device)
    if t is not None and (t_range is not None or antithetic):
        raise ValueError("t is given; t_range and antithetic are for times that are drawn")
    if global_batch is not None and not antithetic:
        raise ValueError("global_batch is for antithetic times")
    eps = 1e-3 if eps is None else float(eps)
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")
    low, high = SCHEDULES[schedule] if t_range is None else map(float, t_range)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"t_range must be two numbers with 0 <= low <= high <= 1, got {t_range}")
    if block_size is not None and (isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1):
        raise ValueError(f"block_size must be a whole number of at least 1, got {block_size!r}")
    blocks = 1 if block_size is None else -(-length // block_size)
    if maskable is not None:
        if not isinstance(maskable, Tensor) or maskable.dtype != torch.bool:
            raise TypeError("maskable must be a bool tensor")
        if maskable.shape not in (x0.shape, x0.shape[1:]) or maskable.device != device:
            raise ValueError(
                f"maskable is {list(maskable.shape)} on {maskable.device}; expected {list(x0.shape)} on {device}"
            )
        maskable = dense_rows(maskable.expand(x0.shape))
    check_counters(stream, offset)
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other: give one source of randomness")
    strata = 0
    if antithetic:
        if isinstance(seed, Tensor) and seed.dim():
            raise ValueError("antithetic needs one seed for the batch, which its sequences share")
        sequences = batch if global_batch is None else global_batch
        if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < min(batch, 1):
            raise ValueError(f"global_batch must be a whole number of at least 1, got {sequences!r}")
        strata = sequences * blocks
    drawn, noise, tokens = t is None, None, None
    if t is not None:
        t = _times(t, batch, blocks, device)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        where = dict(generator=generator, device=generator.device)
        if drawn:
            t = torch.rand((batch, blocks), **where).to(device)
        noise = torch.rand((batch, length), **where).to(device)
        if vocab_size is not None:
            tokens = torch.randint(vocab_size, (batch, length), **where).to(device)
    elif seed is not None:
        seed = checked_seed(seed, batch, device)
    else:
        seed = fresh_seed()
    arguments = (
        dense_rows(x0),
        mask_id or 0,
        vocab_size or 0,
        t,
        drawn,
        low,
        high - low,
        1 - eps,
        eps if schedule == "linear" else 0.0,
        schedule == "loglinear",
        max(length, 1) if block_size is None else block_size,
        blocks,
        strata,
        maskable,
        count if isinstance(count, Tensor) else None,
        None if isinstance(count, Tensor) else count,
        noise,
        tokens,
        seed if isinstance(seed, Tensor) else None,
        seed if isinstance(seed, int) else None,
        stream,
        offset,
    )
    x, mask, weight, times = (_forward_op if torch.compiler.is_compiling() else _forward)(*arguments)
    return MaskedBatch(x, mask, None if vocab_size is not None else weight, times if block_size else times[:, 0])


# --- checks ----------------------------------------------------------------------------------------------------------


def _times(t, batch: int, blocks: int, device) -> Tensor:
    """float32 [B, blocks]."""
    if isinstance(t, Tensor):
        if not t.is_floating_point():
            raise TypeError(f"t must be a number or a floating tensor, got {t.dtype}")
        if t.shape not in ((), (batch,), (batch, blocks)) or t.device != device:
            raise ValueError(
                f"t is {list(t.shape)} on {t.device}; expected [{batch}] or [{batch}, {blocks}] on {device}"
            )
        t = t.detach().float()
        return (t[:, None] if t.dim() == 1 else t).expand(batch, blocks).contiguous()
    t = float(t)
    if not 0 <= t <= 1 or math.isnan(t):
        raise ValueError(f"t must be in [0, 1], got {t}")
    return torch.full((batch, blocks), t, device=device)


# --- torch.library ---------------------------------------------------------------------------------------------------


def _forward(
    x0, mask_id, vocab_size, t, drawn, low, spread, slope, floor, by_time, block_size, blocks, strata, maskable,
    counts, count, noise, tokens, seeds, seed, stream, offset,
) -> list[Tensor]:  # fmt: skip
    """x, mask, weight (empty with uniform noise), times [B, blocks]."""
    outputs = _allocate(x0, vocab_size, blocks)
    name, function = choose(FAMILY, "forward_mask", x0.device)
    with profiling.op_range(FAMILY, f"forward_mask[{name}]", *x0.shape):
        function(
            x0,
            mask_id=mask_id,
            t=t,
            drawn=drawn,
            low=low,
            spread=spread,
            slope=slope,
            floor=floor,
            by_time=by_time,
            block_size=block_size,
            strata=strata,
            maskable=maskable,
            count=count if counts is None else counts,
            vocab_size=vocab_size,
            noise=noise,
            tokens=tokens,
            seed=seed if seeds is None else seeds,
            stream=stream,
            offset=offset,
            x=outputs[0],
            mask=outputs[1],
            weight=None if vocab_size else outputs[2],
            times_out=outputs[3],
        )
    return outputs


def _allocate(x0, vocab_size: int, blocks: int) -> list[Tensor]:
    batch, length = x0.shape
    return [
        x0.new_empty((batch, length)),
        x0.new_empty((batch, length), dtype=torch.bool),
        x0.new_empty((0,) if vocab_size else (batch, length), dtype=torch.float32),
        x0.new_empty((batch, blocks), dtype=torch.float32),
    ]


_forward_op = torch.library.custom_op(
    "genfast::forward_mask",
    _forward,
    mutates_args=(),
    schema="(Tensor x0, int mask_id, int vocab_size, Tensor? t, bool drawn, float low, float spread, float slope, "
    "float floor, bool by_time, int block_size, int blocks, int strata, Tensor? maskable, Tensor? counts, int? count, "
    "Tensor? noise, Tensor? tokens, Tensor? seeds, int? seed, int stream, int offset) -> Tensor[]",
)


@_forward_op.register_fake
def _forward_fake(x0, mask_id, vocab_size, *arguments):
    return _allocate(x0, vocab_size, arguments[8])
