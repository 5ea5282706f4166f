"""Block diffusion: blocks from left to right, each denoised given all before it (SDAR, LLaDA2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genfast._registry import export
from genfast.ops.token_sampling import TokenSample
from genfast.samplers.progress import bar
from genfast.samplers.text.cache import Cached, Recomputed
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run, TextSample, TextState, even_counts

REMASKING = {
    "sequential": (None, dict(strategy="sequential")),
    "random": (None, dict(strategy="random")),
    "low_confidence_static": ("tempered", dict(strategy="top")),
    "low_confidence_dynamic": ("tempered", dict(strategy="threshold", strict=True)),
    "entropy_bounded": ("entropy", dict(strategy="entropy_bound", inclusive=True)),
    "entropy_bounded_exclusive": ("entropy", dict(strategy="entropy_bound", inclusive=False)),
}
"""For each ``remasking``: the confidence, and the options of :func:`genfast.select_transfer`."""


@export("samplers")
@torch.no_grad()
def generate_block_diffusion(
    model: Callable,
    prompt,
    *,
    gen_length: int,
    prompt_lengths: Tensor | None = None,
    block_length: int = 32,
    steps: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    remasking: str = "low_confidence_dynamic",
    threshold: float = 0.9,
    eb_threshold: float = 0.35,
    num_to_transfer: int | None = None,
    editing_threshold: float | None = None,
    max_post_steps: int = 16,
    mask_id: int,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    cache: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    offset: int = 0,
    progress: bool = False,
    callback: Callable[[TextState], None] | None = None,
) -> TextSample:
    """Generate text with a block diffusion language model (SDAR, LLaDA2.x), with a cache of keys and values.

    Blocks of ``block_length`` tokens are counted from a row's first token, so that the rest of a prompt that does not
    fill a block shares it with the first tokens generated, as published. In a batch, rows are padded by whole blocks
    while they are generated, and by their prompts' lengths in the result. A step draws a token at every masked position
    of the block and keeps some; the mask itself is never drawn. With ``seed``, a row's tokens do not depend on its
    neighbours, nor on how a batch is split.

    Args:
        model: ``model(ids, attention_mask=, position_ids=)`` with ids int64 [B, n]; attention_mask bool [B or 1, 1, n,
            m], true where the query may see the key (the last n of m columns are those of ids); position_ids int64
            [B, n], counted from a row's first token. With ``cache`` also ``past_key_values``, the cache of the first
            m - n columns (None at first), and ``use_cache=True``; the answer then holds ``past_key_values`` of all m:
            an object with ``crop``, or a tuple of (keys, values). Those of the last block are dropped; an object need
            not hold them. Position i of the logits speaks of token i.
        prompt, prompt_lengths, pad_id: see :class:`~genfast.samplers.text.layout.Layout`; all is moved to
            ``model.device`` if there is one.
        gen_length: how many tokens to generate.
        steps: per block; ``block_length`` by default. They share a block evenly, the first ones taking the remainder.
        temperature, top_k, top_p: of the draw, see :func:`genfast.sample_tokens`.
        remasking: which positions a step keeps, at least its share n of them. ``"sequential"``, the first n;
            ``"random"``, any n; ``"low_confidence_static"``, the n of the largest probability;
            ``"low_confidence_dynamic"``, all whose probability exceeds ``threshold`` if those are n or more, else the
            same n; ``"entropy_bounded"``, those of the lowest entropy while their sum stays below ``eb_threshold``
            (JetEngine); ``"entropy_bounded_exclusive"``, while the sum before each is at most that (SGLang). Confidence
            is that of the tempered and filtered distribution.
        num_to_transfer: n at every step, in place of a share. It is 1 by default with an entropy bound.
        editing_threshold: also replace a token already kept in the active block, the prompt's apart, if the new one
            differs and its probability exceeds this (LLaDA2.1). A full block is then revised until nothing changes, at
            most ``max_post_steps`` times. By default tokens kept stay.
        eos_id: one or several that end a row's text, after the step that leaves no mask before one, or the block with
            editing; what follows becomes (the first of) them, and the run ends when every row has.
        cache: whether to keep keys and values of the decided blocks; else every step is a pass over the whole text.
        seed, generator, offset: see :class:`~genfast.samplers.text.run.Run`.
        progress, callback: a progress bar over blocks; called with a :class:`TextState` after every step, whose columns
            are those of the rows as padded by blocks.

    Returns:
        :class:`TextSample`. With the cache, the first step of a block also stores the block before it, so there are as
        many calls of the model as steps.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range; a model without a cache.

    Source: Cheng et al., "SDAR" (arXiv:2510.06303) and its generate.py; Bie et al., "LLaDA2.0" (arXiv:2512.15745) and
    "LLaDA2.1" (arXiv:2602.08676), and the ``generate`` of their models.
    """
    for name, value in (("block_length", block_length), ("steps", steps), ("num_to_transfer", num_to_transfer)):
        missing = value is None and name != "block_length"
        if not missing and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if editing_threshold is not None and remasking in ("sequential", "random"):
        raise ValueError(f"editing_threshold needs probabilities, which remasking={remasking!r} does not look at")
    if editing_threshold is not None and remasking.startswith("entropy"):
        raise ValueError("editing_threshold goes with probabilities, and entropy_bounded looks at entropies")
    asked = Layout(
        prompt,
        gen_length,
        mask_id=mask_id,
        pad_id=pad_id,
        prompt_lengths=prompt_lengths,
        device=getattr(model, "device", None),
    )
    layout, tails, blocks = block_layout(asked, block_length, mask_id, pad_id)
    run = Run(model, layout, mask_id=mask_id, seed=seed, generator=generator, offset=offset, callback=callback)
    confidence, select = strategy(remasking, threshold, eb_threshold)
    if num_to_transfer is None and "bound" in select:
        num_to_transfer = 1
    share = even_counts(block_length, steps or block_length).tolist()
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k, mask_id=mask_id, confidence=confidence)

    def draw(output: Output, first: int, last: int, where: Tensor) -> TokenSample:
        return run.sample(output, first, last, where, **options)

    decoder = Decoder(
        run,
        (Cached if cache else Recomputed)(run, block_length),
        draw,
        select,
        counts=share if num_to_transfer is None else [num_to_transfer],
        tails=tails,
        editing_threshold=editing_threshold,
        max_post_steps=max_post_steps,
        eos_ids=[] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id),
    )
    with bar("generate_block_diffusion", blocks, progress) as advance:
        for k in range(blocks):
            first = layout.start + k * block_length
            decoder.block(first, first + block_length, k)
            advance()
            if eos_id is not None and bool(decoder.ended.all()):
                break
    return gathered(run, asked)


def strategy(remasking: str, threshold: float, eb_threshold: float) -> tuple[str | None, dict]:
    """(confidence, options of ``select_transfer``) of a name in :data:`REMASKING`."""
    if remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {', '.join(REMASKING)}; got {remasking!r}")
    confidence, select = REMASKING[remasking]
    limit = {"threshold": dict(threshold=threshold), "entropy_bound": dict(bound=eb_threshold)}
    return confidence, {**select, **limit.get(select["strategy"], {})}


def block_layout(
    asked: Layout, block_length: int, mask_id: int, pad_id: int | None = None
) -> tuple[Layout, Tensor, int]:
    """(layout, tails int64 [B], blocks) in which every row begins at the first column of a block.

    The whole blocks of a prompt lie before column ``start``; its tail, which fills no block, and what is generated lie
    after it, in that many blocks.
    """
    batch, device = len(asked.x), asked.x.device
    pads = asked.pad.tolist()
    tails = [(asked.start - pad) % block_length for pad in pads]
    length, longest = asked.x.shape[1] - asked.start, max(tails, default=0)
    blocks = -(-(longest + length) // block_length) if length else 0
    heads = [asked.x[b, pads[b] : asked.start - tails[b]] for b in range(batch)]
    room = max(blocks * block_length, longest)
    layout = Layout(heads, room, mask_id=mask_id, pad_id=pad_id, device=device)
    for b, tail in enumerate(tails):
        layout.x[b, layout.start : layout.start + tail] = asked.x[b, asked.start - tail : asked.start]
    return layout, torch.tensor(tails, dtype=torch.int64, device=device), blocks


class Decoder:
    """The denoising of one block after another.

    Args:
        logits: ``logits(first, last)``, an :class:`Output` that covers the columns of the block.
        draw: ``draw(output, first, last, where)``, tokens and confidences at the positions of ``where``.
        select: options of :func:`genfast.select_transfer`.
        counts: the least number of positions to keep, step by step; the last one goes on.
        tails: int64 [B], how many columns of a row from the layout's start on are the prompt's.
        eos_ids: ids that end a row; none, for a caller that looks itself and sets ``ended``.
    """

    def __init__(
        self,
        run: Run,
        logits: Callable[[int, int], Output],
        draw: Callable[[Output, int, int, Tensor], TokenSample],
        select: dict,
        *,
        counts: list[int],
        tails: Tensor,
        editing_threshold: float | None = None,
        max_post_steps: int = 16,
        eos_ids: Sequence[int] = (),
    ):
        self.eos_ids = torch.tensor(list(eos_ids), dtype=torch.int64, device=run.x.device) if eos_ids else None
        self.run, self.logits, self.draw, self.select, self.counts = run, logits, draw, select, counts
        self.editing_threshold, self.max_post_steps = editing_threshold, max_post_steps
        self.own = torch.arange(run.x.shape[1], device=run.x.device) >= run.layout.start + tails[:, None]
        """bool [B, L]: columns after the prompt."""
        self.ended = torch.zeros(len(run.x), dtype=torch.bool, device=run.x.device)

    def block(self, first: int, last: int, index: int) -> None:
        """Denoise the columns [first, last), the block of that index."""
        run = self.run
        alive = ~self.ended
        extra = torch.zeros_like(alive, dtype=torch.int64)
        longest = (last - first) + len(self.counts) + (0 if self.editing_threshold is None else self.max_post_steps) + 1
        for step in range(longest):
            masked = run.masked(first, last)
            full = ~masked.any(1)
            if self.editing_threshold is None:
                alive &= ~(full | self.ended)
            else:
                extra += full
                alive &= extra <= self.max_post_steps
            if not bool(alive.any()):
                break
            # A row's numbers depend on its block and step, not on how many steps its neighbours took before.
            run.stream = index * longest + step
            edited = self.step(first, last, masked & alive[:, None], alive, step)
            if edited is not None:
                alive &= ~(full & ~edited.any(1))
            elif self.eos_ids is not None:
                self.end_rows(last)
        if self.editing_threshold is not None and self.eos_ids is not None:
            self.end_rows(last)

    def step(self, first: int, last: int, masked: Tensor, alive: Tensor, step: int) -> Tensor | None:
        """One pass over the block; where tokens were replaced, if that is done."""
        run, n = self.run, self.counts[min(step, len(self.counts) - 1)]
        output = self.logits(first, last)
        if self.select["strategy"] in ("sequential", "random"):
            chosen = run.select(masked.float(), masked, n, **self.select)
            run.commit(first, last, self.draw(output, first, last, chosen).tokens, chosen)
            return None
        if self.editing_threshold is None:
            found = self.draw(output, first, last, masked)
            run.commit(first, last, found.tokens, run.select(found.confidence, masked, n, **self.select))
            return None
        kept = ~run.masked(first, last) & self.own[:, first:last] & alive[:, None]
        found = self.draw(output, first, last, masked | kept)
        chosen = run.select(found.confidence, masked, n, **self.select)
        edited = kept & (found.confidence > self.editing_threshold) & (found.tokens != run.x[:, first:last])
        run.commit(first, last, found.tokens, chosen | edited)
        return edited

    def end_rows(self, last: int) -> None:
        """Rows end that hold one of ``eos_ids`` after the prompt and before column ``last``, and no mask before it.
        Everything after the first one becomes the first of them, at the step that has just been made."""
        run = self.run
        stops = torch.isin(run.x, self.eos_ids) & self.own
        stops[:, last:] = False
        after = stops.cumsum(1) > 0
        new = after.any(1) & ~self.ended & ~((run.x == run.mask_id) & self.own & ~after).any(1)
        after = after & new[:, None] & ((stops.cumsum(1) > 1) | ~stops)
        run.order.masked_fill_(after, run.step)
        run.x.masked_fill_(after, int(self.eos_ids[0]))
        self.ended |= new


def gathered(run: Run, asked: Layout) -> TextSample:
    """The result in the layout that was asked for: all prompts end at column ``start``."""
    columns = torch.arange(asked.x.shape[1], device=asked.x.device) - asked.pad[:, None]
    padding = columns < 0
    source = (columns + run.layout.pad[:, None]).clamp_min(0)
    tokens = torch.where(padding, asked.x, run.x.gather(1, source))
    order = torch.where(padding, 0, run.order.gather(1, source))
    return TextSample(tokens, asked.start, asked.pad, order, run.step, run.evaluations)
