"""MDLM: sampling from a masked diffusion language model with the SUBS parameterisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genfast._registry import export
from genfast.samplers.progress import bar
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.noise import find_noise, levels
from genfast.samplers.text.run import Run, TextSample, TextState
from genfast.samplers.text.transition import place, row_uniforms, transition

PREDICTORS = ("ddpm", "ddpm_cache", "first_hitting")


@export("samplers")
@torch.no_grad()
def generate_mdlm(
    model: Callable,
    prompt: Tensor | Sequence[Tensor] | int,
    *,
    length: int,
    mask_id: int,
    steps: int | None = None,
    predictor: str = "ddpm_cache",
    noise: str | Callable = "loglinear",
    temperature: float = 1.0,
    top_p: float | None = None,
    denoise: bool = True,
    eps: float = 1e-5,
    time_conditioning: bool = False,
    window: int | None = None,
    stride: int | None = None,
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
    """Text from a masked diffusion language model by ancestral or first-hitting sampling.

    In a step from time t to s every masked position stays masked with probability m(s) / m(t), m = 1 - exp(-sigma), and
    otherwise takes a token of the model's distribution, in one kernel over the masked positions.

    Args:
        model: ``model(x)`` with x int64 [B, L] answers with logits [B, L, V], an object with ``logits``, or a tuple
            that begins with them; ``model(x, sigma)``, sigma float32 [B], with ``time_conditioning``; both take
            ``attention_mask`` [B, L] where prompts are padded. The mask's own logit is not read.
        prompt: int64 [B, P], a list of int64 [P] of different lengths, or a number of rows without a prompt.
        length: how many tokens to generate.
        mask_id: the id of the mask token.
        steps: how many steps (of every window); needed but for ``"first_hitting"``, which takes one per position.
        predictor: ``"ddpm"``; ``"ddpm_cache"``, the same, but the model is called again only after a step that changed
            a token of the batch; ``"first_hitting"``: the positions are unmasked one at a time in random order, at the
            times at which the process would have done so (Zheng et al., arXiv:2409.02908): the law of infinitely many
            steps.
        noise: ``"loglinear"``, ``"geometric"``, or a schedule: ``noise(t)`` answers with (sigma, rate).
        temperature, top_p: of the tokens, see :func:`genfast.sample_tokens`.
        denoise: take the likeliest token for what is still masked at ``eps``; without it, masks may be left.
        eps: the time at which the steps end.
        time_conditioning: tell the model sigma, which excludes ``"ddpm_cache"``.
        window, stride: semi-autoregressive generation past the length that the model knows: the model sees ``window``
            columns, and when they are full the next ones begin ``stride`` columns further on. Not with padded prompts.
        given: int64 [B, length] or [length]: tokens of the generated part that are known, negative where none is.
        prompt_lengths, pad_id: see :class:`genfast.samplers.text.layout.Layout`.
        seed, generator, offset: see :class:`genfast.samplers.text.run.Run`.
        device: where to work, by default where the prompt is.
        progress: show a progress bar (needs tqdm).
        callback: called with a :class:`genfast.TextState` after every step.

    Returns:
        :class:`genfast.TextSample`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.

    Source: Sahoo et al., "Simple and effective masked diffusion language models" (arXiv:2406.07524).
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}; got {predictor!r}")
    hitting = predictor == "first_hitting"
    if hitting == (steps is not None):
        raise ValueError("steps goes with 'ddpm' and 'ddpm_cache', and only with them: first_hitting takes one each")
    if predictor == "ddpm_cache" and time_conditioning:
        raise ValueError("predictor 'ddpm_cache' reuses what a model says; it needs one without time_conditioning")
    table = None if hitting else levels(noise, steps, eps)
    schedule = find_noise(noise)
    layout = Layout(prompt, length, mask_id=mask_id, pad_id=pad_id, prompt_lengths=prompt_lengths, device=device)
    place(layout, given)
    spans = _windows(layout, window, stride)
    total = length if hitting else len(spans) * (steps + denoise)
    with bar("generate_mdlm", total, progress) as advance:
        run = Run(
            (lambda ids, sigma, **options: model(ids, sigma, **options)) if time_conditioning else model,
            layout,
            mask_id=mask_id,
            seed=seed,
            generator=generator,
            offset=offset,
            callback=callback,
            advance=advance,
        )
        draw = dict(temperature=temperature, top_p=top_p)
        for k, (first, start, last) in enumerate(spans):
            # Not the number of steps made: that depends on what the whole batch needed.
            run.stream = start - layout.start if hitting else k * (steps + denoise)
            view = _View(run, first, start, last, time_conditioning)
            if hitting:
                _first_hitting(view, schedule, draw)
            else:
                _ancestral(view, table, draw, predictor == "ddpm_cache", denoise)
    return run.result()


class _View:
    """The columns [first, last) that the model sees, of which [start, last) are to be filled."""

    def __init__(self, run: Run, first: int, start: int, last: int, time_conditioning: bool):
        self.run, self.first, self.start, self.last, self.timed = run, first, start, last, time_conditioning

    def masked(self) -> Tensor:
        return self.run.masked(self.start, self.last)

    def evaluate(self, sigma):
        run, options = self.run, {}
        if self.timed:
            sigma = torch.as_tensor(sigma, dtype=torch.float32, device=run.x.device)
            options["sigma"] = sigma.expand(len(run.x)).contiguous()
        mask = run.layout.attention_mask
        mask = None if mask is None else mask[:, self.first : self.last]
        # A copy, so that a model may keep what it saw.
        ids = run.x[:, self.first : self.last].clone()
        return run.evaluate(ids, first=self.first, attention_mask=mask, **options)[0]


def _windows(layout: Layout, window: int | None, stride: int | None) -> list[tuple[int, int, int]]:
    """(first, start, last) of every window: the model sees [first, last), what is new begins at ``start``."""
    total, start = layout.x.shape[1], layout.start
    if window is None:
        if stride is not None:
            raise ValueError("stride goes with window")
        return [(0, start, total)]
    for name, value in (("window", window), ("stride", stride)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    if stride > window:
        raise ValueError(f"stride {stride} is more than the window of {window}: it would leave columns out")
    if layout.attention_mask is not None and total > window:
        raise ValueError("window needs prompts of one length: padding would shift what a row's windows see")
    spans = []
    last = min(total, max(window, start + stride))
    while True:
        spans.append((max(0, last - window), start, last))
        if last == total:
            return spans
        start, last = last, min(total, last + stride)


def _ancestral(view: _View, table, draw: dict, cache: bool, denoise: bool) -> None:
    run, output = view.run, None
    for sigma, stay in zip(table.sigma.tolist(), table.stay):
        if output is None:
            output = view.evaluate(sigma)
        logits = output.logits[:, view.start - view.first :]
        changed = transition(
            run,
            logits,
            stay,
            view.start,
            view.last,
            kind="logits",
            rule="posterior",
            mask_id=run.mask_id,
            **draw,
        )
        if not cache:
            output = None
        elif changed.any():
            output = None
            if not view.masked().any():
                return
    if denoise and view.masked().any():
        output = view.evaluate(table.sigma[-1]) if output is None else output
        count = view.last - view.start
        sample = dict(temperature=0.0, mask_id=run.mask_id)
        run.unmask(output, view.start, view.last, count, sample=sample, select=dict(strategy="sequential"))


def _first_hitting(view: _View, schedule: Callable, draw: dict) -> None:
    run = view.run
    left = view.masked().sum(1)
    time = torch.ones(len(run.x), dtype=torch.float64, device=run.x.device)
    for _ in range(int(left.max()) if left.numel() else 0):
        sigma = None
        if view.timed:
            time = time * row_uniforms(run) ** (1.0 / left.clamp_min(1))
            sigma = schedule(time)[0]
        output = view.evaluate(sigma)
        sample = dict(**draw, mask_id=run.mask_id)
        left, _ = run.unmask(output, view.start, view.last, 1, sample=sample, select=dict(strategy="random"))
