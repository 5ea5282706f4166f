"""SEDD: sampling from a model of the ratios of a discrete diffusion's marginals (score entropy)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genfast._registry import export
from genfast.samplers.progress import bar
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.noise import levels
from genfast.samplers.text.run import Run, TextSample, TextState
from genfast.samplers.text.transition import draw_start, place, transition

GRAPHS = ("absorb", "uniform")
PREDICTORS = ("analytic", "euler")


@export("samplers")
@torch.no_grad()
def generate_sedd(
    model: Callable,
    prompt: Tensor | Sequence[Tensor] | int,
    *,
    length: int,
    steps: int,
    mask_id: int | None = None,
    graph: str = "absorb",
    vocab_size: int | None = None,
    predictor: str = "analytic",
    noise: str | Callable = "loglinear",
    denoise: bool = True,
    eps: float = 1e-5,
    given: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    pad_id: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    offset: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    callback: Callable[[TextState], None] | None = None,
) -> TextSample:
    """Text from a model of log scores by SEDD's reverse process.

    Every step is one kernel over the log scores of the positions that can change; no tensor of the size of the scores
    is made.

    Args:
        model: ``model(x, sigma)`` with x int64 [B, L] and sigma float32 [B] answers with log scores [B, L, V],
            log p_sigma(y) / p_sigma(x) at every position (and takes ``attention_mask`` [B, L] where prompts are
            padded).
        prompt: int64 [B, P], a list of int64 [P] of different lengths, or a number of rows without a prompt.
        length: how many tokens to generate.
        steps: how many steps, each one call of the model; ``denoise`` is one more.
        mask_id: the id of the absorbing state (in SEDD the last one); goes with ``graph="absorb"``.
        graph: ``"absorb"``, tokens turn into the mask, or ``"uniform"``, into any token.
        vocab_size: V, needed with ``graph="uniform"``, which starts from random tokens.
        predictor: ``"analytic"`` (Tweedie tau-leaping) or ``"euler"``.
        noise: ``"loglinear"``, ``"geometric"``, or a schedule: ``noise(t)`` answers with (sigma, rate).
        denoise: end with a step that takes out the noise left at ``eps``; without it, masks may be left.
        eps: the time at which the steps end.
        given: int64 [B, length] or [length]: tokens of the generated part that are known, negative where none is. They
            are never changed (infilling).
        prompt_lengths, pad_id: see :class:`genfast.samplers.text.layout.Layout`; on the uniform graph padding is 0.
        seed, generator, offset: see :class:`genfast.samplers.text.run.Run`.
        device: where to work, by default where the prompt is.
        progress: show a progress bar (needs tqdm).
        callback: called with a :class:`genfast.TextState` after every step.

    Returns:
        :class:`genfast.TextSample`; ``order`` is the last step at which a position changed.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.

    Source: Lou, Meng, Ermon, "Discrete diffusion modeling by estimating the ratios of the data distribution"
    (arXiv:2310.16834), Algorithms 2 and 3.
    """
    if graph not in GRAPHS:
        raise ValueError(f"graph must be one of {', '.join(GRAPHS)}; got {graph!r}")
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}; got {predictor!r}")
    absorb = graph == "absorb"
    if absorb != (mask_id is not None):
        raise ValueError("mask_id goes with graph='absorb', and only with it")
    if not absorb and (isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1):
        raise ValueError(f"graph='uniform' needs vocab_size, a positive whole number; got {vocab_size!r}")
    if absorb and vocab_size is not None:
        raise ValueError("vocab_size goes with graph='uniform'")
    table = levels(noise, steps, eps)
    if predictor == "euler":
        amounts = (table.step * table.rate[:-1]).tolist()
    else:
        amounts = (table.sigma[:-1] - table.sigma[1:]).tolist()
    moves = [(predictor, amount, sigma) for amount, sigma in zip(amounts, table.sigma.tolist())]
    if denoise:
        moves.append(("denoise", float(table.sigma[-1]), float(table.sigma[-1])))

    layout = Layout(
        prompt,
        length,
        mask_id=mask_id if absorb else 0,
        pad_id=pad_id,
        prompt_lengths=prompt_lengths,
        device=device,
    )
    with bar("generate_sedd", len(moves), progress) as advance:
        run = Run(
            lambda ids, sigma, **options: model(ids, sigma, **options),
            layout,
            mask_id=mask_id if absorb else 0,
            seed=seed,
            generator=generator,
            offset=offset,
            callback=callback,
            advance=advance,
        )
        if not absorb:
            draw_start(run, vocab_size)
        active = place(layout, given)
        first, last = layout.start, run.x.shape[1]
        for rule, amount, sigma in moves:
            output, _ = run.evaluate(sigma=torch.full((len(run.x),), sigma, device=run.x.device))
            scores = output.logits[:, first:]
            transition(
                run, scores, amount, first, last, active, kind="log_score", graph=graph, rule=rule, mask_id=mask_id
            )
    return run.result()
