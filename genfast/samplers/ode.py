"""The probability flow as an ordinary differential equation with adaptive steps: Dormand and Prince's Runge-Kutta 4(5).

dx/dt = alpha' x0 + sigma' eps, primes being rates of the schedule. Every stage is one call of the op that turns the
model's output into the stage's slope and the next stage's point. The controller reads one error norm per attempted step
on the host: this sampler cannot do without a synchronisation, because the next time depends on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast.ops.sampler_step import sampler_step
from genfast.samplers.linear import Linear, Stage, X, tensor
from genfast.samplers.program import input_scale
from genfast.samplers.schedules import NoiseSchedule
from genfast.samplers.single_step import slope
from genfast.samplers.trajectory import Node, Trajectory
from genfast.step_table import StepTable, x0_coefficients

# Dormand and Prince 1980: nodes, stage weights (the last row is the fifth-order result) and error weights.
C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
E = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0


def ode_rk45(t: Trajectory, i: int, *, rtol: float = 1e-5, atol: float = 1e-5) -> list[Stage]:
    # The step sizes are chosen while the sampler runs, so there is nothing to precompute.
    return []


def interval(schedule: NoiseSchedule, final: str) -> Trajectory:
    """From the schedule's noisiest to its least noisy time, and from there to the data if the end is to be clean."""
    if final == "sigma_min":
        return Trajectory.spaced(schedule, None, timesteps=[schedule.t_max], final=final)
    return Trajectory.spaced(schedule, None, timesteps=[schedule.t_max, schedule.t_min], final=final)


def integrate(run, advance) -> Tensor:
    """Integrate a run's trajectory to its last noisy node, then take the data estimate if it ends clean."""
    solver = _Solver(run)
    t = run.sampler.trajectory
    clean = not t[len(t)].sigma
    end = t[len(t) - 1] if clean else t[len(t)]
    if clean and len(t) == 1:
        raise ValueError("an adaptive sampler needs a trajectory with two noisy nodes to integrate between")
    y = solver.solve(t[0], end, advance)
    return solver.estimate(y, solver.k[0], end) if clean else y


class _Solver:
    def __init__(self, run):
        self.run, self.trajectory, self.sampler = run, run.sampler.trajectory, run.sampler
        if run.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"ode_rk45 measures its own error, so x must be float32 or float64; got {run.dtype}")
        options = run.sampler.options
        self.rtol, self.atol = options["rtol"], options["atol"]
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol and atol must be positive; got {self.rtol} and {self.atol}")
        self.k: list[Tensor | None] = [None] * 7

    def solve(self, start: Node, end: Node, advance) -> Tensor:
        y = self.run.x
        self.k[0], _ = self.evaluate(y, start, [], lambda slope: slope, keep_slope=False)
        time, span = start.time, start.time - end.time
        h = self.first_step(y, start, span)
        step = 0
        while time > end.time:
            least = 10 * abs(math.nextafter(time, -math.inf) - time)
            h = max(h, least)
            rejected = False
            while True:
                if h < least:
                    raise RuntimeError(
                        f"ode_rk45 cannot reach rtol={self.rtol:g}, atol={self.atol:g} at time {time:g}: the step has "
                        "shrunk to the spacing of floating-point numbers"
                    )
                target = max(time - h, end.time)
                h = time - target
                y_new, error = self.attempt(y, time, -h)
                norm = self.norm(error, torch.maximum(y.abs(), y_new.abs()))
                if not math.isfinite(norm):
                    raise FloatingPointError(f"ode_rk45 met a value that is not finite near time {time:g}")
                if norm < 1:
                    factor = GROW if norm == 0 else min(GROW, SAFETY * norm**-0.2)
                    h *= min(1.0, factor) if rejected else factor
                    break
                h *= max(SHRINK, SAFETY * norm**-0.2)
                rejected = True
            y, time = y_new, target
            self.k[0] = self.k[6]
            advance()
            if self.run.callback is not None:
                self.report(step, y, time)
            step += 1
        return y

    def attempt(self, y: Tensor, time: float, h: float) -> tuple[Tensor, Tensor]:
        """The fifth-order point and its error estimate."""
        coefficients = StepTable([1.0, h * A[1][0]], device=self.run.device)
        point = sampler_step([y, self.k[0]], coefficients)
        for s in range(1, 7):
            node = self.trajectory.at_time(time + C[s] * h)
            weights = A[s + 1] if s < 6 else E
            known = [(f"k{j}", self.k[j], h * weights[j]) for j in range(s) if weights[j]]
            if s < 6:
                known.insert(0, ("y", y, 1.0))
            else:
                y_new = point

            def combine(own: Linear, known=known, own_weight=h * weights[s]) -> Linear:
                return sum((w * tensor(name) for name, _, w in known), own_weight * own)

            point, self.k[s] = self.evaluate(point, node, known, combine)
        return y_new, point

    def evaluate(self, point: Tensor, node: Node, known, combine, keep_slope: bool = True):
        """Evaluate the model at a point: the combination of its slope with known tensors, and the slope."""
        run, sampler = self.run, self.sampler
        scale = input_scale(node, sampler.prediction, sampler.sigma_data)
        seen = point
        if scale != 1.0 or run.model_dtype != run.dtype:
            seen = sampler_step([point], [scale], dtype=run.model_dtype)
        inputs, options = [point], {**run.guide, **run.limits}
        run.evaluate(seen, run.model_times([node])[0], False, inputs, options)
        own = slope(self.trajectory, node, X)
        out = combine(own)
        names = ["x", "model", *(name for name, _, _ in known)]
        parts = dict(coefficients=[out.weights.get(n, 0.0) for n in names], x0=out.weights.get("x0", 0.0))
        if keep_slope:
            parts |= dict(second=[own.weights.get(n, 0.0) for n in names], second_x0=own.weights["x0"])
        to_x0 = x0_coefficients(sampler.prediction, node.alpha, node.sigma, sigma_data=sampler.sigma_data)
        table = StepTable(**parts, to_x0=to_x0, device=run.device)
        result = sampler_step([*inputs, *(t for _, t, _ in known)], table, **options)
        return result if keep_slope else (result, None)

    def first_step(self, y: Tensor, start: Node, span: float) -> float:
        """A step size from the scales of the state, its slope and its curvature (Hairer, Norsett and Wanner, II.4)."""
        d0, d1 = self.norm(y, y.abs()), self.norm(self.k[0], y.abs())
        h0 = min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, span)
        ahead = sampler_step([y, self.k[0]], [1.0, -h0])
        slope_ahead, _ = self.evaluate(
            ahead, self.trajectory.at_time(start.time - h0), [], lambda slope: slope, keep_slope=False
        )
        d2 = self.norm(slope_ahead - self.k[0], y.abs()) / h0
        h1 = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2
        return min(100 * h0, h1, span)

    def norm(self, value: Tensor, size: Tensor) -> float:
        """Root mean square over the whole batch, relative to the tolerance."""
        scaled = value / (self.atol + self.rtol * size)
        return float(scaled.to(torch.float64).square().mean().sqrt()) if value.numel() else 0.0

    def estimate(self, y: Tensor, slope_: Tensor, node: Node) -> Tensor:
        """x0 from the state and its slope: y = alpha x0 + sigma eps and dy/dt = alpha' x0 + sigma' eps."""
        alpha_rate, sigma_rate = self.trajectory.rates(node)
        determinant = sigma_rate * node.alpha - node.sigma * alpha_rate
        return sampler_step([y, slope_], [sigma_rate / determinant, -node.sigma / determinant])

    def report(self, step: int, y: Tensor, time: float) -> None:
        node, slope_ = self.trajectory.at_time(time), self.k[0]
        self.run.notify(step, None, time, node, y, lambda: self.estimate(y, slope_, node))
