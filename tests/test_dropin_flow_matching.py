"""The flow solvers against torchdiffeq, and against a flow whose solution is known."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast.dropin.flow_matching import CLASSIC_RK4, FIXED, NeuralODE, ODESolver

torchdiffeq = pytest.importorskip("torchdiffeq")


def velocity(x, t, scale=1.0):
    return torch.tanh(scale * x) * torch.cos(3 * t) - 0.3 * x


def start(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    method=st.sampled_from((*FIXED, "dopri5")),
    step_size=st.sampled_from((None, 0.05, 0.13, 0.5, 2.0)),
    times=st.sampled_from(((0.0, 1.0), (1.0, 0.0), (0.0, 0.21, 0.5, 1.0), (0.3, 0.9), (0.9, 0.55, 0.1))),
    shape=st.sampled_from(((1, 1), (2, 3, 4, 5), (3, 7))),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    every=st.booleans(),
)
def test_sample_is_torchdiffeq_s(method, step_size, times, shape, dtype, every):
    grid, x = torch.tensor(times, dtype=dtype), start(shape, dtype)
    if method == "dopri5":
        step_size = None
    mine = ODESolver(velocity).sample(
        x, step_size, method, time_grid=grid, return_intermediates=every, scale=0.8, atol=1e-4, rtol=1e-4
    )
    options = {} if step_size is None else {"step_size": step_size}
    exact = torchdiffeq.odeint(
        lambda t, y: velocity(y, t, 0.8), x, grid, method=method, options=options, atol=1e-4, rtol=1e-4
    )
    exact = exact if every else exact[-1]
    assert mine.dtype == exact.dtype and mine.shape == exact.shape
    tolerance = 1e-11 if dtype is torch.float64 else 3e-6
    torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_as_near_as_torchdiffeq_s(dtype):
    x = start((4, 50), dtype)
    exact = ODESolver(velocity).sample(x.double(), 0.1, "midpoint")
    mine = ODESolver(velocity).sample(x, 0.1, "midpoint")
    peer = torchdiffeq.odeint(
        lambda t, y: velocity(y, t), x, torch.tensor([0.0, 1.0]), method="midpoint", options={"step_size": 0.1}
    )[-1]
    assert mine.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (mine.double() - exact).abs().max() <= 2 * (peer.double() - exact).abs().max() + eps * exact.abs().max()


@pytest.mark.parametrize("name, order", [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
def test_orders(name, order):
    x = start((5,), torch.float64)[None]

    def error(n):
        y = ODESolver(lambda x, t: x * torch.cos(t)).sample(x, 1 / n, name, time_grid=torch.tensor([0.0, 1.0]).double())
        return (y - x * torch.exp(torch.sin(torch.tensor(1.0).double()))).abs().max()

    assert torch.log2(error(16) / error(32)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5"])
def test_trajectory(solver):
    x, times = start((3, 4), torch.float64), torch.linspace(0, 1, 11, dtype=torch.float64)
    node = NeuralODE(lambda t, x: velocity(x, t), solver=solver, atol=1e-7, rtol=1e-7)
    states = node.trajectory(x, times)
    assert states.shape == (11, 3, 4) and torch.equal(states[0], x)
    fine = torchdiffeq.odeint(lambda t, y: velocity(y, t), x, times, method="dopri5", atol=1e-10, rtol=1e-10)
    limit = {"euler": 0.2, "midpoint": 5e-3, "rk4": 1e-5, "dopri5": 1e-5}[solver]
    torch.testing.assert_close(states, fine, rtol=0, atol=limit)
    assert torch.equal(node(x, times)[1], states)


def test_classic_rk4_step():
    x, dt = start((2, 3), torch.float64), 0.5

    def f(t, x):
        return velocity(x, torch.tensor(t, dtype=torch.float64))

    k1 = f(0.0, x)
    k2 = f(dt / 2, x + dt / 2 * k1)
    k3 = f(dt / 2, x + dt / 2 * k2)
    k4 = f(dt, x + dt * k3)
    exact = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    node = NeuralODE(lambda t, x: velocity(x, t), solver="rk4")
    mine = node.trajectory(x, torch.tensor([0.0, dt], dtype=torch.float64))[-1]
    torch.testing.assert_close(mine, exact)
    assert sum(CLASSIC_RK4.b) == pytest.approx(1)


def test_rectified_flow_of_gaussian_data():
    """From N(0, 1) to N(m, s^2) along (1 - t) z + t x, independent: the velocity is linear and its flow monotone, so
    that z goes to m + s z."""
    m, s = 1.5, 0.3

    def exact_velocity(x, t):
        spread = (1 - t) ** 2 + (t * s) ** 2
        return m + (t * s**2 - (1 - t)) / spread * (x - t * m)

    z = start((1, 4000), torch.float64)
    x = ODESolver(exact_velocity).sample(z, 0.005, "rk4", time_grid=torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(x, m + s * z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_gradients(method):
    x = start((2, 3), torch.float64).requires_grad_()
    assert not ODESolver(velocity).sample(x, 0.5 if method != "dopri5" else None, method).requires_grad
    y = ODESolver(velocity).sample(x, 0.5 if method != "dopri5" else None, method, enable_grad=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    exact = torchdiffeq.odeint(
        lambda t, y: velocity(y, t),
        x,
        torch.tensor([0.0, 1.0]),
        method=method,
        options={"step_size": 0.5} if method != "dopri5" else {},
        atol=1e-5,
        rtol=1e-5,
    )[-1]
    torch.testing.assert_close(grad, torch.autograd.grad(exact.sum(), x)[0])


def test_adjoint_and_autograd_agree():
    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, t, x):
            return self.weight * x

    grads = []
    for sensitivity in ("adjoint", "autograd"):
        field = Field()
        node = NeuralODE(field, sensitivity=sensitivity, atol=1e-9, rtol=1e-9)
        node.trajectory(torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.0, 1.0]).double())[-1].sum().backward()
        grads.append(field.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


def test_refusals(monkeypatch):
    solver = ODESolver(velocity)
    x = start((1, 2))
    with pytest.raises(ValueError, match="step_size must be positive or None, got 0"):
        solver.sample(x, 0)
    with pytest.raises(ValueError, match="time_grid must be a tensor of two or more times"):
        solver.sample(x, 0.1, time_grid=torch.tensor([0.0]))
    with pytest.raises(ValueError, match="sensitivity must be adjoint or autograd, got 'other'"):
        NeuralODE(velocity, sensitivity="other")
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"the method 'dopri5' is torchdiffeq's, which is not installed"):
        solver.sample(x, None, "dopri5")
    assert solver.sample(x, 0.1).shape == x.shape
