"""Steps of a discrete diffusion on the state of a generation, and positions whose tokens are given."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.ops.token_transition import discrete_transition
from genfast.random import MASK, mul_hi_lo, philox_words, signed64
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.run import Run

INITIAL_STREAM = 2**32 - 1
"""The Philox stream of a start that is drawn; the steps' are counted from 0."""
NO_POSITION = 2**32 - 1
"""Where in a row's sequence the numbers lie that belong to no position."""


def place(layout: Layout, given: Tensor | None) -> Tensor | None:
    """Write the tokens that are given to the generated part; bool [B, length], where none is. None for everywhere."""
    if given is None:
        return None
    room = layout.x[:, layout.start :]
    if not isinstance(given, Tensor) or given.dtype != torch.int64:
        raise TypeError("given must be an int64 tensor, negative where no token is given")
    if given.shape not in (room.shape, room.shape[1:]):
        raise ValueError(f"given is {list(given.shape)}; expected {list(room.shape)} or {list(room.shape[1:])}")
    given = given.to(room.device).expand(room.shape)
    room.copy_(torch.where(given < 0, room, given))
    return given < 0


def transition(
    run: Run, logits: Tensor, amount: float | Tensor, first: int, last: int, active: Tensor | None = None, **options
) -> Tensor:
    """One :func:`genfast.discrete_transition` of columns [first, last), written to the state; bool [B]: rows changed.

    Args:
        logits: [B, last - first, V], of these columns.
        active: bool [B, last - first], the positions that may change; by default all that the op lets change.
        options: of the op.
    """
    block = run.x[:, first:last]
    found = discrete_transition(
        block,
        logits,
        amount,
        active=active,
        row_ids=None if run.generator is not None else run.ids(first, last),
        **options,
        **run.randomness,
    )
    run.step += 1
    run.stream += 1
    order = run.order[:, first:last]
    order.copy_(torch.where(found.x != block, run.step, order))
    block.copy_(found.x)
    run.end_step(first, last)
    return found.changed


def _words(seed: int | Tensor, ids: Tensor, stream: int) -> tuple[Tensor, ...]:
    seed = signed64(seed) if isinstance(seed, int) else seed
    seed = torch.as_tensor(seed, dtype=torch.int64, device=ids.device)
    return philox_words(seed.reshape(-1, 1), ids & MASK, ids >> 32, torch.tensor(stream, device=ids.device))


def uniform_tokens(seed: int | Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """Tokens uniform in [0, vocab_size) at the positions ``ids`` [B, n]: where the uniform graph starts."""
    high, low, *_ = _words(seed, ids, INITIAL_STREAM)
    # floor(u V / 2^64) of u = high 2^32 + low
    (above, rest), (carry, _) = mul_hi_lo(high, vocab_size), mul_hi_lo(low, vocab_size)
    return above + ((rest + carry) >> 32)


def draw_start(run: Run, vocab_size: int) -> None:
    """Tokens of the generated columns, uniform in [0, vocab_size)."""
    first, last = run.layout.start, run.x.shape[1]
    room = run.x[:, first:last]
    if run.generator is None:
        drawn = uniform_tokens(run.seed, run.ids(first, last), vocab_size)
    else:
        drawn = torch.randint(vocab_size, room.shape, generator=run.generator, device=run.generator.device)
    room.copy_(drawn)


def row_numbers(seed: int | Tensor, batch: int, offset: int, stream: int, device) -> Tensor:
    """One number in (0, 1) per row, float64 [B], that belongs to none of its positions."""
    per_row = isinstance(seed, Tensor) and seed.dim() == 1
    sample = torch.arange(batch, device=device) * (0 if per_row else 1) + offset
    high, low, *_ = _words(seed, ((sample << 32) | NO_POSITION)[:, None], stream)
    return (((high << 21) | (low >> 11)).double() + 0.5)[:, 0] * 2.0**-53


def row_uniforms(run: Run) -> Tensor:
    """One number in (0, 1) per row for this step, float64 [B]."""
    batch, device = len(run.x), run.x.device
    if run.generator is None:
        return row_numbers(run.seed, batch, run.offset, run.stream, device)
    drawn = torch.rand(batch, generator=run.generator, dtype=torch.float64, device=run.generator.device)
    return drawn.to(device).clamp_min(2.0**-54)
