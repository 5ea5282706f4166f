"""Samplers that remember earlier evaluations: DPM-Solver++, UniPC, and the Adams-Bashforth family (LMS, DEIS, PNDM)."""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Polynomial

from genfast.samplers.linear import NOISE, X0, ZERO, Linear, Stage, X, eps, history, tensor
from genfast.samplers.single_step import move, split_noise
from genfast.samplers.trajectory import Node, Trajectory


def order_at(t: Trajectory, i: int, order: int, lower_order_final: bool) -> int:
    """The order that step i can have: limited by the history, by levels without noise or signal, and near the end."""
    order = min(order, i + 1)
    if lower_order_final:
        order = min(order, len(t) - i)
    usable = 0
    while usable < order and math.isfinite(t[i - usable].snr):
        usable += 1
    return max(1, usable if math.isfinite(t[i + 1].snr) else 1)


def checked_order(order: int, most: int) -> int:
    if order not in range(1, most + 1):
        raise ValueError(f"order must be an int from 1 to {most}, got {order!r}")
    return order


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum_j z^j / (j + k)!, the functions of exponential integrators: phi_0 = exp, phi_1 = (e^z - 1) / z."""
    if abs(z) < 1:
        return sum(z**j / math.factorial(j + k) for j in range(20))
    return math.exp(z) if k == 0 else (phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


# --- DPM-Solver++ (Lu et al. 2022) -----------------------------------------------------------------------------------


def dpmpp(t: Trajectory, i: int, order: int, eta: float, s_noise: float, solver: str, lower_order_final) -> list[Stage]:
    """Multistep DPM-Solver++ of any order up to 3, from its ODE (eta 0) to the reverse SDE (eta 1).

    With lambda = ln(alpha / sigma), h = lambda' - lambda and g = (1 + eta) h, the exact solution of the semi-linear
    equation with x0 = D0 + D1 u + D2 u^2 / 2, u = (l - lambda) / h, is
    x' = (sigma' / sigma) e^(-eta h) x + alpha' (g phi_1(-g) D0 + g phi_2(-g) D1 + g phi_3(-g) D2) + noise.
    D1 and D2 come from differences of the history. The published third-order method, followed here, takes for D2 the
    second divided difference, which is half of it, so that its measured order is 2 with a smaller constant.
    """
    if solver not in ("midpoint", "heun"):
        raise ValueError(f"solver must be 'midpoint' or 'heun'; got {solver!r}")
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    n, m = t[i], t[i + 1]
    # The short-run rule of the peers: the last two steps fall back to lower orders when there are few steps.
    order = order_at(t, i, order, len(t) < 15 if lower_order_final is None else lower_order_final)
    keep = X0
    h = m.snr - n.snr
    g = (1 + eta) * h
    std = m.sigma * s_noise * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
    out = (m.sigma / n.sigma * math.exp(-eta * h if eta else 0.0)) * X + std * NOISE
    if math.isinf(h):
        # From no signal, or to no noise: x0 is all that is left of the data.
        return [Stage(out + m.alpha * X0, n, keep=keep)]
    out = out + (-m.alpha * math.expm1(-g)) * X0
    if order >= 2:
        r0 = (n.snr - t[i - 1].snr) / h
        d = (X0 - history(1)) / r0
        if order == 2:
            weight = -math.expm1(-g) / 2 if solver == "midpoint" else g * phi(2, -g)
            out = out + (m.alpha * weight) * d
        else:
            r1 = (t[i - 1].snr - t[i - 2].snr) / h
            bend = (d - (history(1) - history(2)) / r1) / (r0 + r1)
            out = out + m.alpha * g * (phi(2, -g) * (d + r0 * bend) + phi(3, -g) * bend)
    return [Stage(out, n, keep=keep)]


def dpmpp_2m(t: Trajectory, i: int, *, solver: str = "midpoint", lower_order_final: bool | None = None) -> list[Stage]:
    return dpmpp(t, i, 2, 0.0, 1.0, solver, lower_order_final)


def dpmpp_3m(t: Trajectory, i: int, *, solver: str = "midpoint", lower_order_final: bool | None = None) -> list[Stage]:
    return dpmpp(t, i, 3, 0.0, 1.0, solver, lower_order_final)


def dpmpp_2m_sde(
    t: Trajectory,
    i: int,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
    lower_order_final: bool | None = None,
) -> list[Stage]:
    return dpmpp(t, i, 2, eta, s_noise, solver, lower_order_final)


def dpmpp_3m_sde(
    t: Trajectory,
    i: int,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "heun",
    lower_order_final: bool | None = None,
) -> list[Stage]:
    return dpmpp(t, i, 3, eta, s_noise, solver, lower_order_final)


def dpmpp_2s(t: Trajectory, i: int, *, r: float = 0.5, eta: float = 0.0, s_noise: float = 1.0) -> list[Stage]:
    """Single-step second order: a point a fraction r of the way in lambda, then x0 extrapolated from both."""
    if not 0 < r < 1:
        raise ValueError(f"r must be in (0, 1), got {r}")
    n, m = t[i], t[i + 1]
    down, up = split_noise(n, m, eta)
    std = m.alpha * up * s_noise
    if not down:
        return [Stage(m.alpha * X0 + std * NOISE, n)]
    middle, y = t.at_ratio(n.ratio ** (1 - r) * down**r), tensor("y")
    # In x / alpha the step is (nu_down / nu) u + (1 - nu_down / nu) (D0 + D1 / 2r), D1 = x0(middle) - x0(n); and x0(n)
    # is read back from y = (sigma_y / sigma) x + alpha_y (1 - nu_y / nu) x0(n).
    first = (y - (middle.sigma / n.sigma) * X) / (middle.alpha * (1 - middle.ratio / n.ratio))
    estimate = (1 / (2 * r)) * X0 + ((1 - 1 / (2 * r)) * first if r != 0.5 else ZERO)
    shrink = down / n.ratio
    out = m.alpha * ((shrink / n.alpha) * X + (1 - shrink) * estimate) + std * NOISE
    return [Stage(move(n, middle), n, into="y"), Stage(out, middle, at="y")]


# --- UniPC (Zhao et al. 2023) ----------------------------------------------------------------------------------------


def unipc(
    t: Trajectory,
    i: int,
    *,
    order: int = 2,
    variant: str = "bh2",
    disable_corrector: tuple[int, ...] = (),
    lower_order_final: bool = True,
) -> list[Stage]:
    """Correct the state with the new evaluation, then predict, in one combination.

    Predictor and corrector of the step into node i share the part that depends on the state before it, so the corrected
    state is the predicted one plus differences of data estimates: x and the history are all there is to keep.
    """
    checked_order(order, 3)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be 'bh1' or 'bh2'; got {variant!r}")
    n, m = t[i], t[i + 1]
    state = X
    if i > 0 and i - 1 not in disable_corrector:
        # The estimates before the new one are H1, H2, ..: seen from node i - 1 these are D0 and its predecessors.
        p, b, ratios, predict, correct = _unipc_weights(t, i - 1, order, variant, lower_order_final)
        for k in range(p - 1):
            state = state + (n.alpha * b * (predict[k] - correct[k]) / ratios[k]) * (history(k + 2) - history(1))
        state = state - (n.alpha * b * correct[-1]) * (X0 - history(1))
    p, b, ratios, predict, _ = _unipc_weights(t, i, order, variant, lower_order_final)
    out = (m.sigma / n.sigma) * state + (m.alpha - n.alpha * m.sigma / n.sigma) * X0
    for k in range(p - 1):
        out = out - (m.alpha * b * predict[k] / ratios[k]) * (history(k + 1) - X0)
    return [Stage(out, n, keep=X0)]


def _unipc_weights(t: Trajectory, i: int, order: int, variant: str, lower_order_final: bool):
    """Order, B(h), the ratios r_k and the weights of predictor and corrector for the step from node i to i + 1."""
    p = order_at(t, i, order, lower_order_final)
    h = t[i + 1].snr - t[i].snr
    if math.isinf(h):
        # No noise is left, or no signal was there: bh2's B(h) has a limit, and 1/2 is the corrector's weight.
        return 1, -1.0, [], [], [0.5]
    b = -h if variant == "bh1" else math.expm1(-h)
    ratios = [(t[i - k].snr - t[i].snr) / h for k in range(1, p)]
    matrix = np.array([[r**k for r in (*ratios, 1.0)] for k in range(p)])
    right = np.array([-h * phi(k + 1, -h) * math.factorial(k) / b for k in range(1, p + 1)])
    # The paper takes 1/2 where one weight is left.
    predict = [0.5] if p == 2 else np.linalg.solve(matrix[: p - 1, : p - 1], right[: p - 1]).tolist()
    correct = [0.5] if p == 1 else np.linalg.solve(matrix, right).tolist()
    return p, b, ratios, predict, correct


# --- Adams-Bashforth in the noise level: du = eps d nu, u = x / alpha ------------------------------------------------


def extrapolate(n: Node, m: Node, weights) -> Linear:
    """x' = alpha' (x / alpha + sum_k w_k eps_k), eps_0 new and the others from the history."""
    total = weights[0] * eps(n)
    for k, w in enumerate(weights[1:], 1):
        total = total + w * history(k)
    return (m.alpha / n.alpha) * X + m.alpha * total


def lagrange(points: list[float]) -> list[Polynomial]:
    """The polynomials that are 1 at one of the points and 0 at the others."""
    bases = []
    for j, own in enumerate(points):
        others = points[:j] + points[j + 1 :]
        bases.append(Polynomial.fromroots(others) / math.prod(own - p for p in others) if others else Polynomial([1.0]))
    return bases


def lms(t: Trajectory, i: int, *, order: int = 4) -> list[Stage]:
    # eps is a polynomial in nu: the weights are integrals of Lagrange polynomials, so closed forms.
    checked_order(order, 4)
    n, m = t[i], t[i + 1]
    # Polynomials in (nu - nu_i) / (nu_i - nu'), so that powers of large levels do not cancel.
    h = n.ratio - m.ratio
    points = [(t[i - k].ratio - n.ratio) / h for k in range(min(order, i + 1))]
    weights = [h * (p.integ()(-1.0) - p.integ()(0.0)) for p in lagrange(points)]
    return [Stage(extrapolate(n, m, weights), n, keep=eps(n))]


def deis(t: Trajectory, i: int, *, order: int = 3, lower_order_final: bool | None = None) -> list[Stage]:
    # eps is a polynomial P in l = ln nu: the integral of P(l) e^l dl is e^l (P - P' + P'' - ..).
    checked_order(order, 4)
    n, m = t[i], t[i + 1]
    p = order_at(t, i, order, len(t) < 15 if lower_order_final is None else lower_order_final)
    points = [n.snr - t[i - k].snr for k in range(p)]

    def antiderivative(poly: Polynomial, at: float) -> float:
        signed = (((-1) ** k) * (poly.deriv(k) if k else poly)(at) for k in range(len(points)))
        return n.ratio * math.exp(at) * sum(signed)

    end = n.snr - m.snr
    weights = [
        (antiderivative(poly, end) if math.isfinite(end) else 0.0) - antiderivative(poly, 0.0)
        for poly in lagrange(points)
    ]
    return [Stage(extrapolate(n, m, weights), n, keep=eps(n))]


ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(t: Trajectory, i: int, *, warmup: str = "heun") -> list[Stage]:
    """Pseudo linear multistep (Liu et al. 2022): Adams-Bashforth weights for eps, carried by the DDIM transfer.

    The first steps have no history. ``"runge_kutta"`` is the paper's warm-up, three steps of four evaluations;
    ``"heun"`` is latent diffusion's, a first step of two evaluations and then rising orders.
    """
    if warmup not in ("heun", "runge_kutta"):
        raise ValueError(f"warmup must be 'heun' or 'runge_kutta'; got {warmup!r}")
    n, m = t[i], t[i + 1]
    y = tensor("y1")
    if warmup == "runge_kutta" and i < 3 and m.sigma:
        half = t.at_time((n.time + m.time) / 2)
        y1, y2, y3 = (tensor(f"y{k}") for k in (1, 2, 3))
        e1, e2, e3 = _transferred(n, half, y1), _transferred(n, half, y2), _transferred(n, m, y3)
        return [
            Stage(_transfer(n, half, eps(n)), n, into="y1", keep=eps(n)),
            Stage(_transfer(n, half, eps(half, y1)), half, at="y1", into="y2"),
            Stage(_transfer(n, m, eps(half, y2)), half, at="y2", into="y3"),
            Stage(_transfer(n, m, (e1 + 2 * e2 + 2 * e3 + eps(m, y3)) / 6), m, at="y3"),
        ]
    if warmup == "heun" and i == 0 and m.sigma:
        mean = 0.5 * eps(m, y) + 0.5 * history(1)
        return [
            Stage(_transfer(n, m, eps(n)), n, into="y1", keep=eps(n)),
            Stage(_transfer(n, m, mean), m, at="y1"),
        ]
    weights = ADAMS[min(i, 3)]
    return [Stage(extrapolate(n, m, [w * (m.ratio - n.ratio) for w in weights]), n, keep=eps(n))]


def _transfer(n: Node, m: Node, direction: Linear) -> Linear:
    return (m.alpha / n.alpha) * X + (m.alpha * (m.ratio - n.ratio)) * direction


def _transferred(n: Node, m: Node, y: Linear) -> Linear:
    """The eps that the transfer from x to y was made with."""
    return (y - (m.alpha / n.alpha) * X) / (m.alpha * (m.ratio - n.ratio))
