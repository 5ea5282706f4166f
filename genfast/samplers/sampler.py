"""The public API and the one loop that runs every sampler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from genfast._registry import export
from genfast.ops.sampler_step import sampler_step
from genfast.samplers import corrector as correctors
from genfast.samplers import ode
from genfast.samplers.program import CORRECT, INPUT, Call, Program, is_history
from genfast.samplers.progress import bar
from genfast.samplers.schedules import NoiseSchedule, noise_schedule
from genfast.samplers.table import checked_row
from genfast.samplers.trajectory import Node, Trajectory
from genfast.step_table import PREDICTIONS, StepTable, x0_coefficients

INITIAL_STREAM = 2**32 - 1
"""The Philox stream of x_T. A run's draws use the streams from 0 (one per call) and from 2^31 (corrections)."""


class SamplerState:
    """What a callback sees after a step.

    Attributes:
        step, steps: the step just made, from 0, and how many there are (None if the sampler chooses its steps).
        time: the schedule's time at which the step's last evaluation was made.
        alpha, sigma: the level of ``x``, the step's target.
        x: the state after the step; the next step reads it, so do not write to it. It may be kept.
    """

    def __init__(self, step: int, steps: int | None, time: float, alpha: float, sigma: float, x: Tensor, estimate):
        self.step, self.steps, self.time, self.alpha, self.sigma, self.x = step, steps, time, alpha, sigma, x
        self._estimate = estimate

    @functools.cached_property
    def x0(self) -> Tensor:
        """The data estimate of the step's last evaluation, guided and clipped like the step's own; made on demand."""
        return self._estimate()


@export("samplers")
class Sampler:
    """A whole sampling loop over a model: a row of the sampler table on a noise schedule, ready to be called.

    Args:
        name: the sampler, see ``python -m genfast.samplers``.
        schedule: a :func:`genfast.noise_schedule`, its name, or a :class:`genfast.Trajectory` (its nodes are then taken
            as they are, and ``steps``, ``spacing`` and the others that place nodes are left out).
        steps: how many steps.
        spacing: where they are: ``"linspace"``, ``"leading"`` (option steps_offset), ``"trailing"`` and
            ``"consistency"`` (option original_steps) are even in time; ``"karras"`` (rho), ``"exponential"`` and
            ``"beta"`` (a, b) follow the noise level, with options sigma_min and sigma_max for sigma / alpha. The
            schedule's own by default.
        spacing_options: those options, a dict.
        timesteps, sigmas: instead of ``steps``: the times of the steps, falling, any sub-sequence of the schedule's, or
            their noise levels sigma / alpha. The final node is added.
        final: ``"zero"``: end without noise; ``"sigma_min"``: end at the schedule's least noisy level.
        prediction: what the model's output is, see :func:`genfast.x0_coefficients`: ``"epsilon"``, ``"sample"``,
            ``"v_prediction"``, ``"flow_prediction"``, ``"score"`` or ``"edm"`` (the raw network of Karras et al.: its
            input is scaled by c_in, and it is called with ln(sigma) / 4 on the ``edm`` schedule).
        sigma_data: the data's standard deviation, for ``"edm"``.
        corrector: ``"langevin"``: Langevin corrections before every step (Song et al. 2021, algorithms 4 and 5).
        corrector_steps, snr: how many, and their signal-to-noise ratio.
        options: the sampler's own options (``eta``, ``order``, ``s_churn``, ...).

    Attributes:
        trajectory: the nodes; timesteps [N], alphas [N + 1], sigmas [N + 1]: as numpy arrays.
        steps: N.
        stochastic: whether it draws noise.

    Raises:
        ValueError: an unknown name or option, or a combination that has no meaning; the message says which and why.
    """

    def __init__(
        self,
        name: str,
        schedule: NoiseSchedule | Trajectory | str = "linear",
        steps: int | None = None,
        *,
        spacing: str | None = None,
        spacing_options: dict | None = None,
        timesteps=None,
        sigmas=None,
        final: str | None = None,
        prediction: str = "epsilon",
        sigma_data: float = 0.5,
        corrector: str | None = None,
        corrector_steps: int | None = None,
        snr: float | None = None,
        **options,
    ):
        self.name, self.row, self.prediction, self.sigma_data = name, checked_row(name, options), prediction, sigma_data
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
        placing = dict(steps=steps, spacing=spacing, spacing_options=spacing_options, timesteps=timesteps)
        placing |= dict(sigmas=sigmas, final=final)
        if isinstance(schedule, Trajectory):
            given = [k for k, v in placing.items() if v is not None]
            if given:
                raise ValueError(f"{given[0]} is given beside a trajectory, which has its nodes already")
            self.trajectory = schedule
        elif self.row.adaptive:
            given = [k for k, v in placing.items() if v is not None and k != "final"]
            if given:
                raise ValueError(f"sampler {name!r} chooses its own steps: leave {given[0]} out")
            schedule = noise_schedule(schedule) if isinstance(schedule, str) else schedule
            self.trajectory = ode.interval(schedule, final or "zero")
        else:
            schedule = noise_schedule(schedule) if isinstance(schedule, str) else schedule
            self.trajectory = Trajectory.spaced(
                schedule,
                steps,
                spacing,
                timesteps=timesteps,
                sigmas=sigmas,
                final=final or "zero",
                **(spacing_options or {}),
            )
        t = self.trajectory
        self.timesteps, self.alphas, self.sigmas, self.steps = t.times[:-1], t.alphas, t.sigmas, len(t)
        if self.row.finite_ratio and not t.alphas[0]:
            raise ValueError(
                f"sampler {name!r} integrates in the noise level sigma / alpha, which is infinite where alpha is 0, at "
                "the start of this schedule; ddim, ddpm, dpmpp_2m, unipc and the flow samplers can start there"
            )
        if corrector is None and (snr is not None or corrector_steps is not None):
            raise ValueError("snr and corrector_steps belong to corrector='langevin'")
        self.corrector = correctors.checked(corrector, corrector_steps, snr, self.row)
        self.options = {**self.row.options, **options}
        self._programs: dict[tuple[bool, bool], Program] = {}
        self.stochastic = False
        if not self.row.adaptive:
            self._stages = [self.row.stages(t, i, **self.options) for i in range(len(t))]
            self.program(fold=True, feed=False)  # now, so that a refused prediction is refused here
            self.stochastic = any(call.noisy for call in self.program(fold=True, feed=False).calls)

    def __repr__(self) -> str:
        return f"Sampler({self.name!r}, {self.steps} steps, prediction={self.prediction!r})"

    def initial_noise(
        self,
        shape,
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        offset: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """x_T: noise of shape [B, ...] with the standard deviation of the schedule's start.

        That is sigma on variance-exploding and flow schedules, sqrt(alpha^2 + sigma^2) on variance-preserving ones,
        whose models know data of unit variance. ``seed``, ``generator`` and ``offset`` as in
        :func:`genfast.sampler_step`; with a generator the draw is ``torch.randn(shape, generator, dtype)``.
        """
        start = self.trajectory[0]
        unit = self.trajectory.schedule.unit_prior if self.trajectory.schedule is not None else start.alpha < 1
        std = (start.alpha**2 + start.sigma**2) ** 0.5 if unit else start.sigma
        if device is None:
            device = seed.device if isinstance(seed, Tensor) else "cpu" if generator is None else generator.device
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        source = _noise_source(seed, generator, offset)
        if seed is not None:
            source["stream"] = INITIAL_STREAM
        return sampler_step([], StepTable([[]], noise=std, device=out.device), out=out, **source)

    def __call__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        x: Tensor | tuple[int, ...],
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        offset: int = 0,
        guidance: float | Tensor | None = None,
        uncond: Callable[[Tensor, Tensor], Tensor] | None = None,
        guidance_rescale: float = 0.0,
        clip: float | tuple[float, float] | None = None,
        threshold: tuple[float, float] | None = None,
        model_dtype: torch.dtype | None = None,
        progress: bool = False,
        callback: Callable[[SamplerState], None] | None = None,
        grad: bool = False,
    ) -> Tensor:
        """Run the loop from x_T to the sample.

        Args:
            model: called as ``model(x, t)``, x [B, ...], t [B] on x's device, in the schedule's own time: int64 where
                all times of a run are whole timesteps, else float32 (float64 with a float64 state). With
                ``variance="learned_range"`` its output has twice the channels (dimension 1), the second half for the
                variance.
            x: x_T, float32 (or bfloat16, float16, float64: the state and the arithmetic's inputs keep that dtype), left
                as it is; or a shape, and :meth:`initial_noise` is drawn on the CPU, or on the device of ``seed`` or
                ``generator``.
            seed, generator, offset: the noise, where the sampler draws any, as in :func:`genfast.sampler_step`. With
                ``seed`` every draw of a run has a stream of its own, and sample b is the same in any batch that puts
                it at ``offset + b``; with neither, torch's default generator.
            guidance: scale of classifier-free guidance, a float or a tensor, 0-d or [B].
            uncond: the unconditional model, called as ``uncond(x, t)``. Without it, a guided ``model`` returns a pair
                (conditional output, unconditional output), for instance the halves of one batched call.
            guidance_rescale, clip, threshold: as in :func:`genfast.sampler_step`, at every evaluation.
            model_dtype: dtype of the model's input, where it differs from the state's (float32 for a float64 state, as
                in the published EDM code; bfloat16 for a bfloat16 model). Outputs may have any floating dtype.
            progress: show a tqdm bar.
            callback: called with a :class:`SamplerState` after every step.
            grad: let gradients flow through the loop (and keep all its intermediate tensors); otherwise it runs under
                ``torch.no_grad()``.

        Returns:
            The sample, [B, ...], in x's dtype.

        Raises:
            ValueError, TypeError: arguments that do not fit together, a model output of another shape.
        """
        if not isinstance(x, Tensor):
            x = self.initial_noise(x, seed=seed, generator=generator, offset=offset)
        if x.dim() == 0 or not x.is_floating_point():
            raise ValueError(f"x must be a floating tensor [B, ...]; got {x.dtype} with shape {list(x.shape)}")
        if uncond is not None and guidance is None:
            raise ValueError("uncond is given without guidance, the guidance scale")
        if guidance is None and guidance_rescale:
            raise ValueError("guidance_rescale is given without guidance")
        run = Run(
            self,
            model,
            x,
            source=_noise_source(seed, generator, offset),
            guide=dict(guidance=guidance, guidance_rescale=guidance_rescale) if guidance is not None else {},
            uncond=uncond,
            limits={k: v for k, v in (("clip", clip), ("threshold", threshold)) if v is not None},
            model_dtype=model_dtype or x.dtype,
            callback=callback,
            grad=grad,
        )
        with contextlib.ExitStack() as stack:
            if not grad:
                stack.enter_context(torch.no_grad())
            advance = stack.enter_context(bar(self.name, None if self.row.adaptive else self.steps, progress))
            return ode.integrate(run, advance) if self.row.adaptive else run.loop(advance)

    def program(self, fold: bool, feed: bool) -> Program:
        """The run's calls and tables, made once per form (see :class:`genfast.samplers.program.Program`)."""
        if (fold, feed) not in self._programs:
            self._programs[fold, feed] = Program(
                self._stages,
                self.trajectory.nodes[:-1],
                self.prediction,
                self.sigma_data,
                fold=fold,
                feed=feed,
                corrections=self.corrector.gains(self.trajectory) if self.corrector else None,
            )
        return self._programs[fold, feed]


@export("samplers")
def sample(
    name: str,
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor | tuple[int, ...],
    schedule: NoiseSchedule | Trajectory | str = "linear",
    steps: int | None = None,
    **options,
) -> Tensor:
    """One call: ``Sampler(name, schedule, steps, ...)(model, x, ...)``, the options of both together.

    Args:
        name, schedule, steps: as for :class:`Sampler`.
        model, x: as for calling it.
        options: any keyword of the two; the sampler's own options go to :class:`Sampler`.
    """
    run = {k: options.pop(k) for k in _RUN_OPTIONS & options.keys()}
    return Sampler(name, schedule, steps, **options)(model, x, **run)


_RUN_OPTIONS = set(Sampler.__call__.__annotations__) - {"model", "x", "return"}


class Run:
    """One call of a sampler: its model, its buffers and its noise."""

    def __init__(
        self, sampler: Sampler, model, x: Tensor, *, source, guide, uncond, limits, model_dtype, callback, grad
    ):
        self.sampler, self.model, self.uncond = sampler, model, uncond
        self.source, self.guide, self.limits = source, guide, limits
        self.model_dtype, self.callback, self.grad = model_dtype, callback, grad
        self.x, self.shape, self.dtype, self.device = x, x.shape, x.dtype, x.device
        # Half-precision states keep their history in float32, because it is differenced.
        self.history_dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        self.reuse = not grad and callback is None
        self._owned: dict[str, Tensor] = {}

    def loop(self, advance) -> Tensor:
        sampler = self.sampler
        program = sampler.program(fold=not self.limits, feed=self.model_dtype != self.dtype)
        tables = program.tables(self.device)
        # Kept from run to run: a repeated run copies nothing to the device, so that it can be captured in a CUDA graph.
        key = self.device, self.dtype == torch.float64, self.shape[0]
        if key not in program.model_times:
            program.model_times[key] = self.model_times(program.times)
        times = program.model_times[key]
        buffers, history = {"x": self.x}, []
        for call in program.calls:
            table, options = tables[call.table], {}
            inputs = [buffers[call.at]]
            if call.node is not None:
                options.update(self.guide)
                options.update(self.limits)
                self.evaluate(
                    buffers[INPUT if program.feed else call.at], times[call.time], call.learned, inputs, options
                )
            if call.action == CORRECT:
                buffers["x"] = sampler.corrector.apply(self, call, table, inputs, options)
                continue
            for name in call.others:
                inputs.append(history[int(name[1:]) - 1] if is_history(name) else buffers[name])
            if table.has_noise:
                options.update(self.source)
                if "seed" in options:
                    options["stream"] = call.draw - call.row
            else:
                options.pop("log_variance", None)

            dtype = self.model_dtype if call.into == INPUT else self.dtype
            second_dtype = self.history_dtype if call.keep else self.model_dtype
            if self.grad:
                result = sampler_step(inputs, table, step=call.row, dtype=dtype, **options)
                out, second = result if table.has_second else (result, None)
                second = second.to(second_dtype) if second is not None else None
            else:
                out, second = self.target(call.into, dtype), None
                if call.keep:
                    full = len(history) == program.history
                    second = history.pop() if full and self.reuse else torch.empty_like(self.x, dtype=second_dtype)
                elif call.feed:
                    second = self.target(INPUT, second_dtype)
                sampler_step(inputs, table, step=call.row, out=out, second_out=second, **options)
            buffers[call.into] = out
            if call.keep:
                history = [second, *history[: program.history - 1]]
            elif call.feed:
                buffers[INPUT] = second
            if call.last:
                advance()
                if self.callback is not None:
                    self.report(call, out, inputs[:2], options)
        return buffers["x"]

    def evaluate(self, x: Tensor, t: Tensor, learned: bool, inputs: list[Tensor], options: dict) -> None:
        """Call the model; its output goes to ``inputs``, unconditional output and variance to ``options``."""
        output = self.model(x, t)
        other = None
        if self.guide:
            if self.uncond is not None:
                other = self.uncond(x, t)
            elif isinstance(output, (tuple, list)) and len(output) == 2:
                output, other = output
            else:
                raise TypeError(
                    "guidance is given, so model must return a pair (conditional, unconditional), or uncond must be "
                    f"the unconditional model; model returned {type(output).__name__}"
                )
        if learned:
            output, options["log_variance"] = self._split("model", output)
        if other is not None:
            options["uncond"] = self._split("uncond", other)[0] if learned else other
        if not isinstance(output, Tensor) or output.shape != self.shape:
            what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"model returned {what}; expected a tensor of x's shape {list(self.shape)}")
        inputs.append(output)

    def _split(self, name: str, output: Tensor) -> tuple[Tensor, ...]:
        expected = [*self.shape[:1], 2 * self.shape[1], *self.shape[2:]]
        if not isinstance(output, Tensor) or list(output.shape) != expected:
            what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{name} returned {what}; a learned variance needs twice the channels, {expected}")
        return output.chunk(2, dim=1)

    def target(self, name: str, dtype: torch.dtype) -> Tensor:
        """Where a buffer is written: in place once it is ours, unless the old value is still wanted."""
        if not self.reuse:
            return torch.empty_like(self.x, dtype=dtype)
        if name not in self._owned:
            self._owned[name] = torch.empty_like(self.x, dtype=dtype)
        return self._owned[name]

    def model_times(self, nodes) -> tuple[Tensor, ...]:
        """The model's time argument at every node, [B] each: one transfer for the whole run."""
        schedule, prediction = self.sampler.trajectory.schedule, self.sampler.prediction
        values = [n.time if schedule is None else schedule.model_time(n.time, prediction) for n in nodes]
        whole = not self.sampler.row.adaptive and (schedule is None or schedule.discrete)
        if whole and all(v == int(v) for v in values):
            dtype = torch.int64
        else:
            dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        column = torch.tensor(values, dtype=torch.float64).to(dtype).to(self.device)
        return column[:, None].repeat(1, self.shape[0]).unbind(0)

    def report(self, call: Call, x: Tensor, inputs: list[Tensor], options: dict) -> None:
        sampler, nodes = self.sampler, self.sampler.trajectory
        guide = {
            k: v for k, v in options.items() if k in ("uncond", "guidance", "guidance_rescale", "clip", "threshold")
        }

        def estimate():
            k = x0_coefficients(sampler.prediction, call.node.alpha, call.node.sigma, sigma_data=sampler.sigma_data)
            return sampler_step(inputs, StepTable([0.0, 0.0], x0=1.0, to_x0=k, device=self.device), **guide)

        self.notify(call.step, len(nodes), call.node.time, nodes[call.step + 1], x, estimate)

    def notify(self, step: int, steps: int | None, time: float, reached: Node, x: Tensor, estimate) -> None:
        self.callback(SamplerState(step, steps, time, reached.alpha, reached.sigma, x, estimate))


def _noise_source(seed, generator, offset: int) -> dict:
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other: give one source of noise")
    if seed is not None:
        return dict(seed=seed, offset=offset)
    if offset:
        raise ValueError("offset is given without seed: it is a position in a seed's numbers")
    return dict(generator=generator) if generator is not None else {}
