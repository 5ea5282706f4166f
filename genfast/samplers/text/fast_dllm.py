"""Fast-dLLM (arXiv:2505.22618): several tokens per step where the model is sure, and two kinds of KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genfast._registry import export
from genfast.samplers.progress import bar
from genfast.samplers.text.cache import cropped
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.llada import MASK_ID, block_steps, remasking_options
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run, TextSample, TextState, even_counts

CACHES = (None, "prefix", "dual")


@export("samplers")
@torch.no_grad()
def generate_fast_dllm(
    model: Callable,
    prompt: Tensor | Sequence[Tensor] | int,
    *,
    prompt_lengths: Tensor | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    cache: str | None = None,
    steps: int | None = None,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = MASK_ID,
    pad_id: int | None = None,
    eos_id: int | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    suppress_confidence: Sequence[int] | Tensor | None = None,
    head: Tensor | tuple[Tensor, Tensor | None] | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    offset: int = 0,
    progress: bool = False,
    callback: Callable[[TextState], None] | None = None,
) -> TextSample:
    """Text from a masked diffusion language model as Fast-dLLM writes it: parallel decoding and approximate KV caches.

    As :func:`generate_llada`, except that a step may unmask all positions that the model is sure of, and that the
    model may reuse keys and values. A row's text depends on its own prompt and draws alone, however many steps its
    neighbours need. (How many steps a block takes is known on the device: one number per step is copied to the host.)

    Args:
        model: as for :func:`generate_llada`. With a cache it is called in the published way: ``model(ids,
            use_cache=True)`` for all of x at the start of a block, and its answer's ``past_key_values``, per layer a
            tuple of tensors [B, heads, L, d] (or all in an object with ``crop``), come back to it: ``"prefix"``, those
            of the positions before the block with the ids from the block on; ``"dual"``, all of them with the block's
            ids and ``replace_position``, bool [B, L], the positions whose keys and values the model is to overwrite.
            ``attention_mask`` int64 [B, L] covers cached positions too; it comes only where prompts are padded.
        threshold: unmask all positions whose confidence is at least this, the most confident one in any case.
        factor: unmask the k most confident ones, the largest k with the k-th confidence >= 1 - factor / (k + 1), at
            least one.
        cache: None, ``"prefix"`` (keys and values of what comes before the block are kept for the block) or ``"dual"``
            (those after it too). Both are approximations.
        steps: without threshold and factor, as for :func:`generate_llada`; by default one token per step. With them
            the number of steps comes out by itself.
        remasking: as for :func:`generate_llada`, the confidence that ``threshold`` and ``factor`` look at;
            ``"sequential"`` goes with neither, ``"random"`` not with them and a head.
        prompt, prompt_lengths, gen_length, block_length, temperature, mask_id, pad_id, eos_id, suppress,
        suppress_confidence, head, seed, generator, offset, progress, callback: as for :func:`generate_llada`.

    Returns:
        :class:`TextSample`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or what the ops refuse.

    Source: Wu et al. 2025 (arXiv:2505.22618), algorithms 1 and 2.
    """
    sample, select = remasking_options(remasking)
    if threshold is not None and factor is not None:
        raise ValueError("threshold and factor exclude each other: give one rule")
    dynamic = threshold is not None or factor is not None
    if dynamic:
        if steps is not None:
            raise ValueError("steps goes with neither threshold nor factor, which decide how many there are")
        if remasking == "sequential":
            raise ValueError('remasking="sequential" goes with neither threshold nor factor, which need confidences')
        select = dict(strategy="factor", factor=factor)
        if threshold is not None:
            select = dict(strategy="threshold", threshold=threshold)
        if remasking == "random":
            sample = dict(confidence="random")
    if cache not in CACHES:
        raise ValueError(f'cache must be None, "prefix" or "dual"; got {cache!r}')
    per_block = block_steps(gen_length if steps is None else steps, gen_length, block_length)
    counts = [n for n in even_counts(block_length, per_block).tolist() if n]
    sample = dict(
        sample,
        temperature=temperature,
        mask_id=mask_id,
        suppress=suppress,
        suppress_confidence=suppress_confidence,
    )
    layout = Layout(
        prompt,
        gen_length,
        mask_id=mask_id,
        pad_id=pad_id,
        prompt_lengths=prompt_lengths,
        device=getattr(model, "device", None),
    )
    blocks = range(layout.start, layout.x.shape[1], block_length)
    with bar("generate_fast_dllm", None if dynamic else len(blocks) * len(counts), progress) as advance:
        run = Run(
            model,
            layout,
            mask_id=mask_id,
            eos_id=eos_id,
            seed=seed,
            generator=generator,
            offset=offset,
            head=head,
            callback=callback,
            advance=advance,
        )
        for first in blocks:
            last = first + block_length
            block = Block(run, first, last, cache)
            for i in range(block_length if dynamic else len(counts)):
                # A block has no more steps than columns: a stream of its own for each, however many steps
                # neighbours made before it.
                run.stream = first - layout.start + i
                n = 1 if dynamic else counts[i]
                run.unmask(block.evaluate(), first, last, n, sample=sample, select=select)
                if eos_id is not None and bool(run.end_rows(last).all()):
                    return run.result()
                if dynamic and not bool(run.masked(first, last).any()):
                    break
    return run.result()


class Block:
    """The model's outputs for one block, the columns [first, last): a full evaluation, then those with its cache."""

    def __init__(self, run: Run, first: int, last: int, cache: str | None):
        self.run, self.first, self.last, self.cache = run, first, last, cache
        self.past = None

    def evaluate(self) -> Output:
        run, first, last = self.run, self.first, self.last
        if self.cache is None:
            return run.evaluate()[0]
        if self.past is None:
            output, answer = run.evaluate(use_cache=True)
            self.past = answer.past_key_values
            if self.cache == "prefix":
                self.past = cropped(self.past, first)
            return output
        if self.cache == "prefix":
            output, _ = run.evaluate(run.x[:, first:], first=first, past_key_values=self.past, use_cache=True)
            if hasattr(self.past, "crop"):  # it may have grown
                self.past.crop(first)
            return output
        replace = torch.zeros_like(run.x, dtype=torch.bool)
        replace[:, first:last] = True
        return run.evaluate(
            run.x[:, first:last], first=first, past_key_values=self.past, use_cache=True, replace_position=replace
        )[0]
