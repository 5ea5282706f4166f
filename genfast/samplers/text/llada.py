"""LLaDA's sampler (arXiv:2502.09992): blocks from left to right, in each the most confident masks first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genfast._registry import export
from genfast.samplers.progress import bar
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run, TextSample, TextState, even_counts

MASK_ID = 126336
"""Of the published models LLaDA-8B."""

REMASKING = {
    "low_confidence": (dict(confidence="probability"), dict(strategy="top")),
    "tempered": (dict(confidence="tempered"), dict(strategy="top")),
    "margin": (dict(confidence="margin"), dict(strategy="top")),
    "entropy": (dict(confidence="entropy"), dict(strategy="top")),
    "random": (dict(confidence=None), dict(strategy="random")),
    "sequential": (dict(confidence=None), dict(strategy="sequential")),
}
"""Ways to choose which positions stay masked: options of ``sample_tokens`` and of ``select_transfer``."""


@export("samplers")
@torch.no_grad()
def generate_llada(
    model: Callable,
    prompt: Tensor | Sequence[Tensor] | int,
    *,
    prompt_lengths: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
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
    """Text from a masked diffusion language model as LLaDA writes it: semi-autoregressive blocks.

    Of a step's logits only the rows of masked positions in the active block are read. What a row becomes depends on its
    own prompt and draws alone, whatever else is in the batch.

    Args:
        model: ``model(ids)``, ids int64 [B, L], returns logits [B, L, V] (float32, bfloat16 or float16), an object with
            ``logits``, or a tuple that begins with them. Where prompts are padded it gets ``attention_mask`` int64
            [B, L] too, and with guidance 2 B rows.
        prompt, prompt_lengths: int64 [B, P], perhaps with lengths int64 [B]; a list of B tensors [P]; or B, for no
            prompt. Shorter prompts are padded on the left with ``pad_id`` (the mask by default). All is moved to
            ``model.device`` if there is one.
        steps: of the whole generation, divided evenly among the blocks; within a block, masks are divided evenly among
            steps, the remainder to the first ones. Steps that would unmask nothing are left out.
        gen_length, block_length: how many tokens to write, and in blocks of how many.
        temperature: 0 takes the likeliest token, otherwise a draw from softmax(logits / temperature).
        cfg_scale: w of classifier-free guidance, uncond + (w + 1) (cond - uncond), where uncond are the logits with the
            prompt masked; 0 for none.
        remasking: which masks go first: ``"low_confidence"``, those whose token has the largest probability (at
            temperature 1); ``"tempered"``, the same in the distribution drawn from; ``"margin"``, the largest minus the
            second largest probability; ``"entropy"``, the smallest entropy; ``"random"``; ``"sequential"``, from the
            left. The last two choose before they draw, and read no other rows.
        mask_id: the mask token's id; it is never drawn.
        eos_id: ends a row's text: after the step that leaves no mask before it, the rest of the row is filled with it,
            and the sampler stops when all rows have ended. (One number is then copied to the host per step.)
        suppress: ids that are never drawn and have no share in any probability.
        suppress_confidence: ids that may be drawn, but go last.
        head: weight [V, d] of the model's head, or (weight, bias [V]). The model then returns hidden states [B, L, d]
            (itself, as ``last_hidden_state``, or first in a tuple), and only the positions that are needed are
            projected (:func:`genfast.lm_head_sample`). Goes with ``"low_confidence"``, ``"tempered"``, ``"random"`` and
            ``"sequential"``, and with seeds.
        seed: an int, or int64 [B] with one per row; by default from torch's default generator.
        generator: draw by Gumbel-max with float64 noise of the size of the logits from it instead, as published.
        offset: row b draws as row ``offset + b``: a batch written in parts is the batch written whole.
        progress: show a progress bar (needs tqdm).
        callback: called after every step with a :class:`TextState`.

    Returns:
        :class:`TextSample`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or what the ops refuse.

    Source: Nie et al. 2025 (arXiv:2502.09992), section 2.4 and appendix A.
    """
    per_block = block_steps(steps, gen_length, block_length)
    sample, select = remasking_options(remasking)
    if cfg_scale < 0:
        raise ValueError(f"cfg_scale must not be negative, got {cfg_scale}")
    sample = dict(
        sample,
        temperature=temperature,
        mask_id=mask_id,
        suppress=suppress,
        suppress_confidence=suppress_confidence,
    )
    counts = [n for n in even_counts(block_length, per_block).tolist() if n]
    layout = Layout(
        prompt,
        gen_length,
        mask_id=mask_id,
        pad_id=pad_id,
        prompt_lengths=prompt_lengths,
        device=getattr(model, "device", None),
    )
    blocks = range(layout.start, layout.x.shape[1], block_length)
    with bar("generate_llada", len(blocks) * len(counts), progress) as advance:
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
        given = run.x != mask_id
        for first in blocks:
            last = first + block_length
            for n in counts:
                output = evaluate_guided(run, cfg_scale, given)
                run.unmask(output, first, last, n, sample=sample, select=select)
                if eos_id is not None and bool(run.end_rows(last).all()):
                    return run.result()
    return run.result()


def block_steps(steps: int, gen_length: int, block_length: int) -> int:
    """Steps per block, of numbers that divide one another as LLaDA asks."""
    for name, value in (("steps", steps), ("gen_length", gen_length), ("block_length", block_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if gen_length % block_length:
        raise ValueError(f"gen_length must be a multiple of block_length, got {gen_length} and {block_length}")
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"steps must be a multiple of the number of blocks, got {steps} for {blocks} blocks")
    return steps // blocks


def remasking_options(remasking: str) -> tuple[dict, dict]:
    if remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {', '.join(REMASKING)}; got {remasking!r}")
    return REMASKING[remasking]


def evaluate_guided(run: Run, cfg_scale: float, given: Tensor) -> Output:
    """The model's output for all of x, with classifier-free guidance: one call of twice the rows, the second half with
    the positions ``given`` (the prompt) masked."""
    if not cfg_scale > 0:
        return run.evaluate()[0]
    both = torch.cat([run.x, torch.where(given, run.mask_id, run.x)])
    mask = run.layout.attention_mask
    output, _ = run.evaluate(both, attention_mask=None if mask is None else torch.cat([mask, mask]))
    return output.guided(cfg_scale + 1)
