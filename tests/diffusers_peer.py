"""Whole loops of a drop-in scheduler against whole loops of the peer's own class, from the same seed."""

import contextlib
import sys
from dataclasses import dataclass, field
from unittest import mock

import diffusers
import torch

import genfast.dropin.diffusers as ours

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass
class Case:
    """One loop: a scheduler by name, its configuration and calls, and the tensors it works on."""

    name: str
    config: dict = field(default_factory=dict)
    timesteps: dict = field(default_factory=lambda: {"num_inference_steps": 7})
    options: dict = field(default_factory=dict)  # of step; "generator": a seed
    shape: tuple = (2, 3, 5, 4)
    dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype | None = None  # of the model; the sample's by default
    channels: int = 1  # the model's channels over the sample's
    channels_last: bool = False
    seed: int = 0
    begin: int | None = None  # start at this position, as an image-to-image run does
    advance: object = None  # (scheduler, output, t, x, options) -> what step returns, as a tuple

    def make(self, module):
        scheduler = getattr(module, self.name)(**self.config)
        scheduler.set_timesteps(**self.timesteps)
        return scheduler


def model(x, t, channels=1):
    """Smooth, bounded, different at every time, and no contraction: an error of a loop stays visible at its end."""
    t = float(t) / 300
    y = torch.tanh(0.8 * x.float() + 0.3 * torch.sin(torch.tensor(t))) - 0.2 * torch.cos(x.float() + t)
    if channels > 1:
        y = torch.cat([y] + [torch.sin(3 * x.float() + k) for k in range(1, channels)], dim=1)
    return y


def run(case: Case, module, follow=None, dtype=None):
    """(outputs, inputs) of every step of a loop, lists of tuples of tensors.

    The sample of a step is the first output of the one before and the model is asked about it; with ``follow``, the
    inputs of another loop, every step gets these instead, in ``dtype``.
    """
    scheduler = case.make(module)
    draw = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.shape, generator=draw)
    x = (x * getattr(scheduler, "init_noise_sigma", 1.0)).to(case.dtype)
    if case.channels_last:
        x = x.to(memory_format=torch.channels_last)
    options = dict(case.options)
    if "generator" in options:
        seeds = options["generator"]
        options["generator"] = (
            [torch.Generator().manual_seed(s) for s in seeds]
            if isinstance(seeds, list)
            else torch.Generator().manual_seed(seeds)
        )
    timesteps = scheduler.timesteps
    if case.begin is not None:
        timesteps = timesteps[case.begin :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(case.begin)
    torch.manual_seed(case.seed + 1)
    outputs, inputs = [], []
    for i, t in enumerate(timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if follow is None:
            output = model(seen, t, case.channels).to(case.output_dtype or case.dtype)
        else:
            x, output = (v.to(dtype or v.dtype) for v in follow[i])
        inputs.append((x, output))
        if case.advance is not None:
            result = case.advance(scheduler, output, t, x, options)
        else:
            result = scheduler.step(output, t, x, return_dict=False, **options)
        outputs.append(tuple(result))
        x = result[0]
    return outputs, inputs


@contextlib.contextmanager
def noise(record: list | None = None, replay: list | None = None):
    """Keep every draw of every scheduler module, or hand out draws kept before, in the dtype asked for."""
    loaded = [m for name, m in list(sys.modules.items()) if name.startswith("diffusers.schedulers.")]
    real = diffusers.utils.torch_utils.randn_tensor
    kept = iter(replay or ())

    def draw(shape, generator=None, device=None, dtype=None, layout=None):
        if replay is not None:
            return next(kept).to(dtype)
        z = real(shape, generator=generator, device=device, dtype=dtype, layout=layout)
        record.append(z)
        return z

    with contextlib.ExitStack() as stack:
        for module in loaded:
            if hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


def compare(case: Case, ulps: float = 32):
    """Ours against theirs, step by step: draws, dtypes, shapes, strides, values, and where they are not finite.

    float32 and float64: two free loops, every output within ``ulps`` of the largest number so far. Halves: a rounding
    of the model's output that falls the other way would hide everything else, so ours follows the inputs of the peer's
    loop, and so does the peer in float32 (with the same noise): ours must not be further from that than twice the
    peer's own half loop, plus one unit in the last place (``ulps`` of them where a mix of dtypes gives float32).
    """
    half = {case.dtype, case.output_dtype or case.dtype} & {torch.bfloat16, torch.float16}
    drawn, ours_drawn = [], []
    with noise(record=drawn):
        theirs, inputs = run(case, diffusers)
    with noise(record=ours_drawn):
        mine, _ = run(case, ours, follow=inputs if half else None)
    assert len(drawn) == len(ours_drawn), f"{len(ours_drawn)} draws instead of {len(drawn)} in {case}"
    for a, b in zip(drawn, ours_drawn):
        assert a.dtype == b.dtype and torch.equal(a, b), f"a draw differs in {case}"
    if half:
        with noise(replay=drawn):
            truth, _ = run(case, diffusers, follow=inputs, dtype=torch.float32)
    largest = 1.0
    for i, (m, p) in enumerate(zip(mine, theirs)):
        assert len(m) == len(p)
        for k, (a, b) in enumerate(zip(m, p)):
            where = f"step {i}, output {k} of {case}"
            if b is None:
                assert a is None, where
                continue
            assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape, where)
            exact = truth[i][k].double() if half else b.double()
            finite = exact.isfinite()
            # A half that overflows within the peer's step may be fine in ours, never the other way round.
            assert a[finite & b.isfinite()].isfinite().all() and (half or torch.equal(a.isfinite(), finite)), where
            good = finite & b.isfinite()
            if not good.any():
                continue
            largest = max(largest, exact[good].abs().max().item(), *(v.double().abs().max().item() for v in inputs[i]))
            error = (a.double() - exact)[good].abs().max().item()
            if half:
                allowed = (b.double() - exact)[good].abs().max().item()
                limit = (
                    2 * allowed + (1 if b.dtype in (torch.bfloat16, torch.float16) else ulps) * EPS[b.dtype] * largest
                )
            else:
                # A product of a float32 output and a float32 coefficient is rounded to float32 in the peer.
                coarse = EPS[case.output_dtype] if case.output_dtype is torch.float32 else 0
                limit = ulps * max(EPS[b.dtype], coarse) * largest
            assert error <= limit, f"error {error:.3g} where {limit:.3g} is allowed: {where}"


def agree(case: Case, ulps: float = 32):
    """``compare``; a loop that the peer refuses is refused alike."""
    if not refused_alike(case):
        compare(case, ulps)


def refused_alike(case: Case) -> bool:
    """Whether the peer refuses a loop; ours must then raise an error of the same type."""
    try:
        with noise(record=[]):
            run(case, diffusers)
    except Exception as refusal:
        try:
            run(case, ours)
        except type(refusal):
            return True
        raise AssertionError(f"the peer raises {refusal!r}, ours nothing: {case}") from refusal
    return False


def no_less_exact(case: Case):
    """For formulas that amplify roundings: our step is no further from the peer's in float64 than twice the peer's own.

    Both follow the inputs of one loop of the peer in float32, which is not amplified from step to step then. A step
    that keeps what is computed in it (estimates, derivatives) is compared by what it makes of it.
    """
    assert case.dtype is torch.float32 and case.output_dtype is None
    if refused_alike(case):
        return
    drawn, ours_drawn = [], []
    with noise(record=drawn):
        theirs, inputs = run(case, diffusers)
    with noise(record=ours_drawn):
        mine, _ = run(case, ours, follow=inputs)
    assert len(drawn) == len(ours_drawn) and all(map(torch.equal, drawn, ours_drawn)), f"draws differ in {case}"
    with noise(replay=drawn):
        truth, _ = run(case, diffusers, follow=inputs, dtype=torch.float64)
    worst, largest = 0.0, 1.0
    for i, (m, p, t) in enumerate(zip(mine, theirs, truth)):
        assert m[0].dtype == p[0].dtype and m[0].shape == p[0].shape, f"step {i} of {case}"
        good = p[0].isfinite() & t[0].isfinite()
        assert m[0][good].isfinite().all() and torch.equal(m[0].isfinite(), p[0].isfinite()), f"step {i} of {case}"
        if good.any():
            known = [v for v in (*inputs[i], t[0]) if v.isfinite().all()]
            largest = max(largest, *(v.abs().max().item() for v in known))
            worst = max(worst, (p[0] - t[0])[good].abs().max().item())
            error = (m[0] - t[0])[good].abs().max().item()
            assert error <= 2 * worst + 32 * EPS[torch.float32] * largest, (error, worst, largest, i, case)
