"""ODE solvers of flow matching with fused steps: ``ODESolver`` as in flow_matching, ``NeuralODE`` as in torchcfm.

dx/dt = v(t, x) on a grid of times. A step of an explicit Runge-Kutta method is one kernel per stage,
x + dt sum_j a_j k_j, its coefficients made for the whole grid at once. Adaptive methods are torchdiffeq's.

Source: Lipman et al. 2023 (arXiv:2210.02747), Liu et al. 2023 (arXiv:2209.03003); Tong et al. 2024 (arXiv:2302.00482).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genfast.dropin.tensors import plain, promoted
from genfast.ops.sampler_step import sampler_step
from genfast.step_table import StepTable

__all__ = ["NeuralODE", "ODESolver"]


@dataclass(frozen=True)
class _Method:
    """A Runge-Kutta method: times of the stages after the first, their weights, and the weights of the step."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


FIXED = {
    "euler": _Method((), (), (1.0,)),
    "midpoint": _Method((1 / 2,), ((1 / 2,),), (0.0, 1.0)),
    "heun2": _Method((1.0,), ((1.0,),), (1 / 2, 1 / 2)),
    "heun3": _Method((1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    # The 3/8 rule, which is torchdiffeq's "rk4".
    "rk4": _Method((1 / 3, 2 / 3, 1.0), ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
CLASSIC_RK4 = _Method((1 / 2, 1 / 2, 1.0), ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def _torchdiffeq(method: str):
    try:
        import torchdiffeq
    except ImportError:
        raise ImportError(
            f"the method {method!r} is torchdiffeq's, which is not installed (`pip install torchdiffeq`); "
            f"without it there are {', '.join(FIXED)}"
        ) from None
    return torchdiffeq


def _walk(velocity: Callable, x: Tensor, grid: Tensor, method: _Method):
    """Yield x at every time of the grid [n], a tensor of the state's precision, increasing or decreasing."""
    yield x
    if len(grid) < 2:
        return
    host = grid.detach().to("cpu", torch.float64)
    t, dt = host[:-1], host[1:] - host[:-1]
    tables = []
    for weights in (*method.a, method.b):
        used = [j for j, w in enumerate(weights) if w]
        columns = torch.stack([torch.ones_like(dt), *(dt * weights[j] for j in used)], 1)
        tables.append((used, StepTable(columns).to(x.device), columns))
    times = [grid, *((t + c * dt).to(grid) for c in method.c)]
    for i in range(len(dt)):
        slopes, y = [], x
        for stage, (used, table, columns) in enumerate(tables):
            at = times[stage][i] if stage == 0 or method.c[stage - 1] != 1.0 else grid[i + 1]
            slopes.append(velocity(at, y))
            y = _combine([x, *(slopes[j] for j in used)], table, i, columns)
        x = y
        yield x


def _combine(inputs: list[Tensor], table: StepTable, row: int, columns: Tensor) -> Tensor:
    if plain(*inputs):
        return sampler_step(inputs, table, step=row, dtype=promoted(*inputs))
    return sum(c * t for c, t in zip(columns[row].tolist(), inputs))


def _grid(times: Tensor, step_size: float | None) -> Tensor:
    """Times of the steps: every ``step_size`` from the first on, and the last, to which the last step is cut."""
    if step_size is None:
        return times
    first, last = times[0], times[-1]
    sign = 1.0 if last >= first else -1.0
    count = int(torch.ceil((last - first) * sign / step_size + 1).item())
    grid = first + sign * step_size * torch.arange(count, dtype=times.dtype, device=times.device)
    grid[-1] = last
    return grid


def _solution(velocity, x: Tensor, times: Tensor, step_size: float | None, method: _Method, every: bool):
    """x at every one of ``times`` [T, ...], or at the last."""
    grid = _grid(times, step_size)
    if not every:
        return deque(_walk(velocity, x, grid, method), maxlen=1).pop()
    wanted, at = times.tolist(), grid.tolist()
    sign = 1.0 if wanted[-1] >= wanted[0] else -1.0
    found, k = [], 0
    before, t_before = None, None
    for t, y in zip(at, _walk(velocity, x, grid, method)):
        while k < len(wanted) and sign * wanted[k] <= sign * t:
            if wanted[k] == t or before is None:
                found.append(y)
            else:  # between two steps: on the straight line, as in torchdiffeq
                share = (wanted[k] - t_before) / (t - t_before)
                found.append(torch.lerp(before, y, share))
            k += 1
        before, t_before = y, t
    return torch.stack(found)


class ODESolver:
    """Solver of a trained flow, with the ``sample`` of flow_matching's ``ODESolver``.

    Args:
        velocity_model: called as ``velocity_model(x=..., t=..., **model_extras)``, t a 0-d tensor; returns v [B, ...].
    """

    def __init__(self, velocity_model: Callable):
        self.velocity_model = velocity_model

    def sample(
        self,
        x_init: Tensor,
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor | None = None,
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras,
    ) -> Tensor:
        """Solve dx/dt = v from the first time of the grid to the last.

        Args:
            x_init: the state at the first time, [B, ...].
            step_size: of fixed methods: steps of this length, the last one cut to end on the grid's end; None for one
                step between two times of the grid.
            method: ``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"``, fused; any other is torchdiffeq's.
            atol, rtol: of adaptive methods.
            time_grid: [T] times, increasing or decreasing; [0, 1] by default.
            return_intermediates: return the states at all times of the grid (those between two steps on a straight
                line).
            enable_grad: let gradients through.
            model_extras: passed on to the model.

        Returns:
            [B, ...], or [T, B, ...] with ``return_intermediates``.

        Raises:
            ValueError: ``step_size`` is not positive, or ``time_grid`` has fewer than two times.
            ImportError: the method is torchdiffeq's, which is not installed.
        """
        times = torch.tensor([0.0, 1.0]) if time_grid is None else time_grid
        times = _checked_times("time_grid", times).to(x_init.device)
        if step_size is not None and not step_size > 0:
            raise ValueError(f"step_size must be positive or None, got {step_size}")

        def velocity(t, x):
            return self.velocity_model(x=x, t=t, **model_extras)

        with torch.set_grad_enabled(enable_grad):
            if method in FIXED:
                return _solution(velocity, x_init, times, step_size, FIXED[method], return_intermediates)
            options = {} if step_size is None else {"step_size": step_size}
            odeint = _torchdiffeq(method).odeint
            states = odeint(velocity, x_init, times, method=method, options=options, atol=atol, rtol=rtol)
            return states if return_intermediates else states[-1]


class NeuralODE(nn.Module):
    """Solver of a vector field with the ``trajectory`` that torchcfm's examples call (torchdyn's ``NeuralODE``).

    Args:
        vector_field: called as ``vector_field(t, x)``, t a 0-d tensor; returns v [B, ...].
        solver: ``"euler"``, ``"midpoint"``, ``"rk4"`` (the classic one) or another fixed method of :class:`ODESolver`,
            fused, one step between two times; any other is torchdiffeq's.
        sensitivity: how gradients of an adaptive solver are taken: ``"adjoint"`` (needs a module) or ``"autograd"``.
            Through fixed steps they go by themselves.
        atol, rtol: of adaptive methods.

    Raises:
        ValueError: an unknown ``sensitivity``.
    """

    def __init__(
        self,
        vector_field: Callable,
        solver: str = "dopri5",
        sensitivity: str = "autograd",
        atol: float = 1e-3,
        rtol: float = 1e-3,
    ):
        super().__init__()
        if sensitivity not in ("adjoint", "autograd"):
            raise ValueError(f"sensitivity must be adjoint or autograd, got {sensitivity!r}")
        self.vector_field, self.solver, self.sensitivity = vector_field, solver, sensitivity
        self.atol, self.rtol = atol, rtol

    def trajectory(self, x: Tensor, t_span: Tensor) -> Tensor:
        """The states [T, B, ...] at the times ``t_span`` [T], from ``x`` at the first of them.

        Raises:
            ValueError: fewer than two times.
            ImportError: the solver is torchdiffeq's, which is not installed.
        """
        times = _checked_times("t_span", t_span).to(x.device)
        method = CLASSIC_RK4 if self.solver == "rk4" else FIXED.get(self.solver)
        if method is not None:
            return torch.stack(list(_walk(self.vector_field, x, times, method)))
        library = _torchdiffeq(self.solver)
        by_adjoint = (
            self.sensitivity == "adjoint" and torch.is_grad_enabled() and isinstance(self.vector_field, nn.Module)
        )
        odeint = library.odeint_adjoint if by_adjoint else library.odeint
        return odeint(self.vector_field, x, times, method=self.solver, atol=self.atol, rtol=self.rtol)

    def forward(self, x: Tensor, t_span: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(times, states), from 0 to 1 by default."""
        times = torch.tensor([0.0, 1.0]) if t_span is None else t_span
        return times, self.trajectory(x, times)


def _checked_times(name: str, times) -> Tensor:
    if not isinstance(times, Tensor) or times.dim() != 1 or len(times) < 2:
        raise ValueError(f"{name} must be a tensor of two or more times, got {times!r}")
    return times
