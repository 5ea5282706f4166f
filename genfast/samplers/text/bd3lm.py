"""BD3-LM: block diffusion, block after block with a cache of the finished ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genfast._registry import export
from genfast.samplers.progress import bar
from genfast.samplers.text.cache import Cached, Recomputed, block_causal, positions
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.noise import levels
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run, TextSample, TextState
from genfast.samplers.text.transition import transition


@export("samplers")
@torch.no_grad()
def generate_bd3lm(
    model: Callable,
    prompt: Tensor | Sequence[Tensor] | int,
    *,
    length: int,
    block_size: int,
    mask_id: int,
    first_hitting: bool = True,
    steps: int | None = None,
    nucleus_p: float = 1.0,
    temperature: float = 1.0,
    noise: str | Callable = "loglinear",
    cache: bool = True,
    context: int | None = None,
    eos_id: int | None = None,
    min_entropy: float | None = None,
    entropy_window: int = 256,
    prompt_lengths: Tensor | None = None,
    pad_id: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    offset: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    callback: Callable[[TextState], None] | None = None,
) -> TextSample:
    """Text from a block diffusion language model: autoregressive over blocks, diffusion within one.

    Blocks are counted from the first token of a row, the prompt included; a prompt that ends within a block is
    continued there. Rows with prompts of different lengths go through the blocks together, each with its own, so there
    is no padding for the model to leave out, and a row's text does not depend on its neighbours.

    Args:
        model: called as Hugging Face's models are, with ids int64 [B, n] (the text so far and the block in work),
            ``attention_mask`` bool [1, 1, n, columns], True where a query may see a key (its own block and those
            before), and ``position_ids``; answers with logits [B, n, V] as for the other text samplers. With ``cache``
            the ids are those of the block and of the one finished before it, and ``past_key_values`` and
            ``use_cache`` are given too; see ``genfast/samplers/text/cache.py``.
        prompt: int64 [B, P], a list of int64 [P] of different lengths, or a number of rows without a prompt. BD3-LM
            was trained on text that begins with its begin-of-sequence token: prompt with it.
        length: how many tokens to generate after each row's prompt.
        block_size: positions in a block.
        mask_id: the id of the mask token.
        first_hitting: unmask the positions of a block one at a time, in random order (Zheng et al.,
            arXiv:2409.02908): the law of infinitely many steps at block_size calls of the model.
        steps: without ``first_hitting``, the steps of a block, at even times from 1 to 0. The model is called again
            only after a step that changed a token; the last step leaves no mask.
        nucleus_p: draw among the likeliest tokens whose probabilities add up to at most this; the token with which the
            sum passes it goes. The likeliest always stays.
        temperature: of the draw.
        noise: without ``first_hitting``: ``"loglinear"``, ``"geometric"``, or a schedule ``noise(t)``.
        cache: keep the keys and values of finished blocks.
        context: without ``cache``: the model sees at most the last ``context`` columns.
        eos_id: the id that ends a sequence: a row with one in its generated part is done, what follows in it becomes
            ``eos_id``, and generation stops when all rows are done.
        min_entropy: goes with ``eos_id``: a row is done too, and its last window becomes ``eos_id``, when the empirical
            entropy (nats) of its last ``entropy_window`` tokens is below this: degenerate text (published: 4, of 256).
        prompt_lengths, pad_id: see :class:`genfast.samplers.text.layout.Layout`.
        seed, generator, offset: see :class:`genfast.samplers.text.run.Run`.
        device: where to work, by default where the prompt is.
        progress: show a progress bar (needs tqdm).
        callback: called with a :class:`genfast.TextState` after every step. Its rows begin with the prompt: padding is
            put before the shorter ones when all is done.

    Returns:
        :class:`genfast.TextSample`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range, or a model that answers without the cache
            that was asked for.

    Source: Arriola et al., "Block diffusion: interpolating between autoregressive and diffusion language models"
    (arXiv:2503.09573).
    """
    for name, value in (("block_size", block_size), ("entropy_window", entropy_window)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    if first_hitting == (steps is not None):
        raise ValueError("steps goes with first_hitting=False, and only with it: first hitting takes one per position")
    if min_entropy is not None and eos_id is None:
        raise ValueError("min_entropy needs eos_id, which fills a row that is done")
    if context is not None and (cache or context < block_size):
        raise ValueError(f"context needs cache=False and at least block_size = {block_size} columns, got {context}")
    stay = None if first_hitting else [*levels(noise, steps, 0.0).stay[:-1], 0.0]
    layout = _Blocks(prompt, length, block_size, mask_id, pad_id, prompt_lengths, device)
    total = layout.x.shape[1]
    rounds = total - layout.start if first_hitting else steps * -(-(total - layout.start) // block_size)
    with bar("generate_bd3lm", rounds, progress) as advance:
        run = Run(
            model,
            layout,
            mask_id=mask_id,
            seed=seed,
            generator=generator,
            offset=offset,
            callback=callback,
            advance=advance,
        )
        if context is not None:
            source = _Window(run, block_size, context)
        else:
            source = (Cached if cache else Recomputed)(run, block_size)
        draw = dict(temperature=temperature, top_p=nucleus_p, top_p_crossing=False)
        begin = layout.start // block_size * block_size
        for first in range(begin, total, block_size):
            last = first + block_size
            # Not the number of steps made: that depends on what the whole batch needed.
            run.stream = first if first_hitting else first // block_size * steps
            if first_hitting:
                _first_hitting(run, source, first, last, draw)
            else:
                _ancestral(run, source, first, last, stay, draw)
            if eos_id is not None and bool(_finish(run, last, eos_id, min_entropy, entropy_window).all()):
                break
    return layout.padded(run)


class _Blocks(Layout):
    """Prompts that all begin at column 0, the mask after them, up to the end of a block.

    Attributes:
        ends: int64 [B], where a row's prompt ends and its text begins; ``start`` is the first of them.
        last: int64 [B], where a row's last block ends; what lies behind belongs to rows with longer prompts.
    """

    def __init__(self, prompt, length, block_size, mask_id, pad_id, prompt_lengths, device):
        super().__init__(prompt, length, mask_id=mask_id, pad_id=pad_id, prompt_lengths=prompt_lengths, device=device)
        self.rows, self.shift, self.text = self.x, self.pad, self.start
        batch, columns = self.rows.shape
        self.ends = self.start - self.shift
        self.start = int(self.ends.min()) if batch else 0
        self.last = (self.ends + length + block_size - 1) // block_size * block_size
        self.pad, self.attention_mask = torch.zeros_like(self.shift), None
        places = torch.arange(-(-columns // block_size) * block_size, device=self.rows.device)
        moved = (places + self.shift[:, None]).clamp_max(max(columns - 1, 0))
        prompts = self.rows.gather(1, moved) if columns else self.rows
        self.x = torch.where(places < self.ends[:, None], prompts, mask_id)

    def padded(self, run: Run) -> TextSample:
        """The result, with padding before the shorter prompts."""
        places = torch.arange(self.rows.shape[1], device=self.rows.device) - self.shift[:, None]
        real, places = places >= 0, places.clamp_min(0)
        tokens = torch.where(real, run.x.gather(1, places), self.rows)
        order = torch.where(real, run.order.gather(1, places), 0)
        return TextSample(tokens, self.text, self.shift, order, run.step, run.evaluations)


class _Window(Recomputed):
    """Logits of a block from a pass over the last ``context`` columns up to its end, as if the text began there."""

    def __init__(self, run: Run, block_size: int, context: int):
        super().__init__(run, block_size)
        self.context = context

    def __call__(self, first: int, last: int) -> Output:
        run, begin = self.run, max(0, last - self.context)
        mask = block_causal(run.layout, begin, last, self.block_length)[..., begin:]
        places = positions(run.layout, begin, last) - begin
        return run.evaluate(run.x[:, begin:last], first=begin, attention_mask=mask, position_ids=places)[0]


def _first_hitting(run: Run, source: Recomputed, first: int, last: int, draw: dict) -> None:
    left = run.masked(first, last).sum(1)
    # When a position is unmasked does not matter to a model that is not told the time; the order does.
    for _ in range(int(left.max()) if left.numel() else 0):
        sample = dict(**draw, mask_id=run.mask_id)
        run.unmask(source(first, last), first, last, 1, sample=sample, select=dict(strategy="random"))


def _ancestral(run: Run, source: Recomputed, first: int, last: int, stay: list[float], draw: dict) -> None:
    output = None
    for probability in stay:
        if output is None:
            if not run.masked(first, last).any():
                return
            output = source(first, last)
        logits = output.logits[:, first - output.first :]
        options = dict(kind="logits", rule="posterior", mask_id=run.mask_id, **draw)
        if transition(run, logits, probability, first, last, **options).any():
            output = None


def _finish(run: Run, last: int, eos_id: int, min_entropy: float | None, window: int) -> Tensor:
    """bool [B]: rows that are done, of which all columns before ``last`` are text; the rest of them is filled."""
    ends, places = run.layout.ends[:, None], torch.arange(run.x.shape[1], device=run.x.device)
    text = run.x[:, :last]
    hits = (text == eos_id) & (places[:last] >= ends)
    cut = torch.where(hits, places[:last] + 1, run.x.shape[1]).amin(1)
    if min_entropy is not None and last > window:
        poor = entropy(text[:, -window:]) < min_entropy
        # A row that ended before is filled with one token, which is no sign of degenerate text.
        poor &= (cut > last) & (run.layout.ends <= last) & (last <= run.layout.last)
        cut = torch.where(poor, (last - window) * torch.ones_like(cut), cut).maximum(run.layout.ends)
    done = (cut < run.x.shape[1]) | (last >= run.layout.last)
    after = (places >= cut[:, None]) & (run.x != eos_id)
    run.order.masked_fill_(after, run.step)
    run.x.masked_fill_(after, eos_id)
    return done


def entropy(tokens: Tensor) -> Tensor:
    """Entropy in nats, float64 [B], of the frequencies of a row's tokens [B, n]."""
    counts = (tokens[:, :, None] == tokens[:, None, :]).sum(-1)
    return math.log(tokens.shape[1]) - counts.double().log().mean(1)
