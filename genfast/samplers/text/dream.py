"""Dream: masked diffusion over the whole text at once, with logits that are shifted by one position."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from genfast._registry import export
from genfast.random import MASK, philox_words
from genfast.samplers.progress import bar
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.run import Run, TextSample, TextState

CONFIDENCES = {"origin": None, "maskgit_plus": "tempered", "topk_margin": "margin", "entropy": "entropy"}
"""The confidence by which each ``alg`` ranks positions, as :func:`genfast.sample_tokens` names it."""


@export("samplers")
@torch.no_grad()
def generate_dream(
    model: Callable,
    prompt,
    *,
    gen_length: int,
    prompt_lengths: Tensor | None = None,
    steps: int = 512,
    eps: float = 1e-3,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg: str = "origin",
    alg_temp: float | None = None,
    mask_id: int = 151666,
    eos_id: int | None = None,
    pad_id: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    offset: int = 0,
    progress: bool = False,
    callback: Callable[[TextState], None] | None = None,
) -> TextSample:
    """Generate text with a model of the Dream family.

    Time runs from 1 to ``eps`` in ``steps`` equal steps. A step from t to s unmasks int(masks (1 - s/t)) positions of a
    row, or each with probability 1 - s/t (``"origin"``); the last step unmasks the rest. A step that unmasks nothing
    does not call the model: one row takes at most ``gen_length`` calls. The mask itself is never drawn.

    Args:
        model: ``model(ids, attention_mask=...)``, the mask int64 [B, L] and given only where rows are padded; position
            i of its logits [B, L, V] speaks of token i + 1.
        prompt, prompt_lengths, pad_id: see :class:`~genfast.samplers.text.layout.Layout`; all is moved to
            ``model.device`` if there is one.
        gen_length: how many tokens to generate.
        temperature, top_p, top_k: of the draw, see :func:`genfast.sample_tokens`.
        alg: which positions a step unmasks: ``"origin"``, any; or those of the largest confidence in the tempered and
            filtered distribution: ``"maskgit_plus"``, of the drawn token's probability; ``"topk_margin"``, of the
            largest probability minus the second; ``"entropy"``, of sum p log p.
        alg_temp: above 0, draw positions from softmax(confidence / alg_temp) without replacement; not with
            ``"origin"``.
        eos_id: ends a row's text: after the step that leaves no mask before it, the rest of the row becomes it, and the
            run ends when every row has. By default all positions are generated.
        seed, generator, offset: see :class:`~genfast.samplers.text.run.Run`. With ``seed``, a row's tokens do not
            depend on its neighbours, nor on how a batch is split.
        progress, callback: a progress bar; called with a :class:`TextState` after every step.

    Returns:
        :class:`TextSample`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range, or a prompt without tokens among
            longer ones (its first logits would be those of padding).

    Source: Ye et al., "Dream 7B" (arXiv:2508.15487) and its generation_utils.py. The published loop takes the mean
    number of masks of the batch where this counts those of a row.
    """
    if alg not in CONFIDENCES:
        raise ValueError(f"alg must be one of {', '.join(CONFIDENCES)}; got {alg!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    if not 0 < eps < 1:
        raise ValueError(f"eps must be in (0, 1), got {eps}")
    if alg_temp is not None and (alg == "origin" or not alg_temp >= 0):
        raise ValueError(f"alg_temp must not be negative, and does nothing with alg='origin'; got {alg_temp}, {alg!r}")
    layout = Layout(
        prompt,
        gen_length,
        mask_id=mask_id,
        pad_id=pad_id,
        prompt_lengths=prompt_lengths,
        device=getattr(model, "device", None),
    )
    if layout.attention_mask is not None and bool((layout.pad == layout.start).any()):
        raise ValueError("a prompt is empty and others are not: its first token would be read from padding's logits")

    run = Run(
        model,
        layout,
        mask_id=mask_id,
        eos_id=eos_id,
        seed=seed,
        generator=generator,
        offset=offset,
        callback=callback,
    )
    first, last = layout.start, layout.x.shape[1]
    times = np.linspace(1, eps, steps + 1, dtype=np.float32)
    when = None
    if alg == "origin":
        when = unmasking_steps(run, first, last, times)
        plan = [(i, 0) for i in when.unique().tolist()]
    else:
        plan = [(i, n) for i, n in enumerate(transfer_counts(gen_length, times)) if n]
    sample = dict(temperature=temperature, top_p=top_p, top_k=top_k, mask_id=mask_id, confidence=CONFIDENCES[alg])
    select = dict(strategy="top", temperature=alg_temp or 0.0)
    with bar("generate_dream", len(plan), progress) as run.advance:
        for i, n in plan:
            run.stream = i
            output, _ = run.evaluate()
            output.shift = True
            if when is None:
                run.unmask(output, first, last, n, sample=sample, select=select)
            else:
                chosen = (when == i) & run.masked(first, last)
                run.commit(first, last, run.sample(output, first, last, chosen, **sample).tokens, chosen)
            if eos_id is not None and bool(run.end_rows(last).all()):
                break
    return run.result()


def transfer_counts(masks: int, times: np.ndarray) -> list[int]:
    """How many positions each step unmasks: the published float32 product, rounded down."""
    counts = []
    for t, s in itertools.pairwise(times[:-1]):
        counts.append(int(np.float32(masks) * (1 - s / t)))
        masks -= counts[-1]
    return [*counts, masks]


def unmasking_steps(run: Run, first: int, last: int, times: np.ndarray) -> Tensor:
    """The step at which each position is unmasked, int64 [B, last - first].

    A position is still masked at time t with probability t, whatever the model says, so one uniform number u per
    position tells: the first step after which time is at most u, or else the last.
    """
    shape, device = (len(run.x), last - first), run.x.device
    if run.generator is not None:
        u = torch.rand(shape, generator=run.generator, device=run.generator.device, dtype=torch.float64).to(device)
    else:
        u = uniforms(run.seed, run.ids(first, last), 0)
    rising = torch.tensor(times[1:-1][::-1].copy(), dtype=torch.float64, device=device)
    return len(rising) - torch.searchsorted(rising, u, right=True)


def uniforms(seed: int | Tensor, ids: Tensor, stream: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 [B, n], of positions by identity; a seed may be int64 [B]."""
    seed = torch.as_tensor(seed, device=ids.device)
    seed = seed[:, None] if seed.dim() else seed
    # Word 2, as for a random confidence: tokens are drawn with words 0 and 1.
    word = philox_words(seed, ids & MASK, (ids >> 32) & MASK, torch.tensor(stream, device=ids.device))[2]
    return (word.double() + 0.5) * 2.0**-32
