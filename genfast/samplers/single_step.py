"""Samplers that keep no history: ancestral, DDIM, Euler and Heun, consistency models, SDE predictors, fixed-step ODEs.

Every function gives the stages of step i of a trajectory; a prime in a comment is the step's target node.
"""

from __future__ import annotations

import math

from genfast.samplers.linear import NOISE, X0, ZERO, Linear, Stage, X, eps, tensor
from genfast.samplers.trajectory import Node, Trajectory

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def move(n: Node, m: Node) -> Linear:
    """alpha' x0 + sigma' eps: to another level along one data estimate. DDIM, Euler and first-order solvers alike."""
    return (m.sigma / n.sigma) * X + (m.alpha - n.alpha * m.sigma / n.sigma) * X0


# --- ancestral sampling and DDIM -------------------------------------------------------------------------------------


def ddpm(t: Trajectory, i: int, *, variance: str = "fixed_small") -> list[Stage]:
    # Also the ancestral predictors of Song et al. 2021: theirs for VE is fixed_small, theirs for VP fixed_large.
    # q(x' | x, x0) is normal: with r = alpha / alpha' and v = sigma^2 - r^2 sigma'^2 (the variance added between the
    # nodes), mean = r (sigma'^2 / sigma^2) x + alpha' (v / sigma^2) x0 and variance v sigma'^2 / sigma^2.
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}; got {variance!r}")
    n, m = t[i], t[i + 1]
    r = n.alpha / m.alpha
    v = n.sigma**2 - (r * m.sigma) ** 2
    small = v * m.sigma**2 / n.sigma**2
    mean = (r * m.sigma**2 / n.sigma**2) * X + (m.alpha * v / n.sigma**2) * X0
    if variance == "learned_range":
        # ln variance = (1 - f) ln small + f ln large, f = (1 + model's output) / 2 (Nichol and Dhariwal 2021)
        low, high = math.log(max(small, 1e-20)), math.log(v)
        noise = NOISE if m.sigma else ZERO
        return [Stage(mean + noise, n, log_std=((high + low) / 4, (high - low) / 4))]
    std = math.sqrt(small if variance == "fixed_small" else v)
    return [Stage(mean + std * NOISE if m.sigma else mean, n)]


def ddim(t: Trajectory, i: int, *, eta: float = 0.0) -> list[Stage]:
    n, m = t[i], t[i + 1]
    r = n.alpha / m.alpha
    std = eta * math.sqrt(max(m.sigma**2 / n.sigma**2 * (n.sigma**2 - (r * m.sigma) ** 2), 0.0))
    if std > m.sigma:
        raise ValueError(f"eta = {eta} asks for more noise at step {i} than the next level holds; it is at most 1")
    rest = math.sqrt(m.sigma**2 - std**2)
    return [Stage(move(n, Node(m.alpha, rest, m.time)) + std * NOISE, n)]


# --- Karras et al. 2022: integration in the noise level nu = sigma / alpha -------------------------------------------


def churn(t: Trajectory, i: int, s_churn, s_min, s_max, s_noise) -> tuple[Node, list[Stage]]:
    """Raise the noise level before the step (algorithm 2, lines 4 to 6): the raised node and the stage for it."""
    n = t[i]
    gamma = min(s_churn / len(t), math.sqrt(2) - 1) if s_min <= n.ratio <= s_max else 0.0
    if not gamma:
        return n, []
    if not n.alpha:
        raise ValueError("s_churn raises sigma / alpha, which is infinite already where alpha is 0: lower s_max")
    up = t.at_ratio(n.ratio * (1 + gamma))
    std = up.alpha * s_noise * math.sqrt(up.ratio**2 - n.ratio**2)
    return up, [Stage((up.alpha / n.alpha) * X + std * NOISE)]


def euler(
    t: Trajectory, i: int, *, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0
) -> list[Stage]:
    n, raised = churn(t, i, s_churn, s_min, s_max, s_noise)
    return [*raised, Stage(move(n, t[i + 1]), n)]


def heun(
    t: Trajectory, i: int, *, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0
) -> list[Stage]:
    # In u = x / alpha: u' = u + h (eps + eps') / 2, h = nu' - nu, and the first Euler step y is u + h eps.
    n, raised = churn(t, i, s_churn, s_min, s_max, s_noise)
    m = t[i + 1]
    if not m.sigma:
        return [*raised, Stage(move(n, m), n)]
    y = tensor("y")
    h = m.ratio - n.ratio
    corrected = 0.5 * (m.alpha / n.alpha) * X + 0.5 * y + (0.5 * m.alpha * h) * eps(m, y)
    return [*raised, Stage(move(n, m), n, into="y"), Stage(corrected, m, at="y")]


def split_noise(n: Node, m: Node, eta: float) -> tuple[float, float]:
    """The noise level to step down to, and the one to add, so that together they make that of ``m``."""
    # nu_up^2 = eta^2 nu'^2 (nu^2 - nu'^2) / nu^2; nu may be infinite
    up = min(m.ratio, eta * m.ratio * math.sqrt(1 - (m.ratio / n.ratio) ** 2))
    return math.sqrt(m.ratio**2 - up**2), up


def euler_ancestral(t: Trajectory, i: int, *, eta: float = 1.0, s_noise: float = 1.0) -> list[Stage]:
    n, m = t[i], t[i + 1]
    down, up = split_noise(n, m, eta)
    return [Stage(move(n, Node(m.alpha, m.alpha * down, m.time)) + (m.alpha * up * s_noise) * NOISE, n)]


# --- consistency models ----------------------------------------------------------------------------------------------


def lcm(
    t: Trajectory, i: int, *, boundary: bool = True, boundary_sigma: float = 0.5, timestep_scaling: float = 10.0
) -> list[Stage]:
    # f = c_skip x + c_out x0 with the boundary condition f(x, 0) = x, then noise up to the next level.
    n, m = t[i], t[i + 1]
    f = X0
    if boundary:
        if t.schedule is None or not t.schedule.discrete:
            raise ValueError(
                "boundary: the scalings of a latent consistency model are functions of a discrete timestep, "
                "which this schedule does not have; pass boundary=False to use the data estimate itself"
            )
        s = n.time * timestep_scaling
        f = (boundary_sigma**2 / (s**2 + boundary_sigma**2)) * X + (s / math.hypot(s, boundary_sigma)) * X0
    return [Stage(m.alpha * f + m.sigma * NOISE, n)]


def tcd(t: Trajectory, i: int, *, eta: float = 0.3) -> list[Stage]:
    # Down to s = (1 - eta) t', then noise from s up to t'.
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    n, m = t[i], t[i + 1]
    if not m.sigma or eta == 0:
        return [Stage(move(n, m), n)]
    time = (1 - eta) * m.time
    s = t.at_time(math.floor(time) if t.schedule is not None and t.schedule.discrete else time)
    r = m.alpha / s.alpha
    std = math.sqrt(max(m.sigma**2 - (r * s.sigma) ** 2, 0.0))
    return [Stage(r * move(n, s) + std * NOISE, n)]


# --- reverse SDE (Song et al. 2021) ----------------------------------------------------------------------------------


def score(n: Node) -> Linear:
    return (n.alpha * X0 - X) / n.sigma**2


def euler_maruyama(t: Trajectory, i: int) -> list[Stage]:
    # dx = (f x - g^2 score) dt + g dw backwards in time; f = alpha' / alpha and g^2 = 2 sigma (sigma' - f sigma),
    # primes being rates here.
    n, m = t[i], t[i + 1]
    dt = m.time - n.time
    alpha_rate, sigma_rate = t.rates(n)
    f = alpha_rate / n.alpha
    g2 = 2 * n.sigma * (sigma_rate - f * n.sigma)
    mean = (1 + dt * f) * X - (dt * g2) * score(n)
    return [Stage(mean + math.sqrt(-dt * g2) * NOISE if m.sigma else mean, n)]


def reverse_diffusion(t: Trajectory, i: int) -> list[Stage]:
    # The forward step is x = r x' + G z; its reversal is discretised with the same f = (r - 1) x and G.
    n, m = t[i], t[i + 1]
    r = n.alpha / m.alpha
    g2 = n.sigma**2 - (r * m.sigma) ** 2
    mean = (2 - r) * X + g2 * score(n)
    return [Stage(mean + math.sqrt(g2) * NOISE if m.sigma else mean, n)]


# --- ordinary differential equations in the schedule's time ----------------------------------------------------------


def slope(t: Trajectory, n: Node, x: Linear = X) -> Linear:
    """dx/dt of the probability flow: alpha' x0 + sigma' eps, primes being rates."""
    alpha_rate, sigma_rate = t.rates(n)
    return alpha_rate * X0 + sigma_rate * eps(n, x)


def ode_euler(t: Trajectory, i: int) -> list[Stage]:
    n = t[i]
    return [Stage(X + (t[i + 1].time - n.time) * slope(t, n), n)]


def ode_heun(t: Trajectory, i: int) -> list[Stage]:
    n, m = t[i], t[i + 1]
    h, y = m.time - n.time, tensor("y")
    if not m.sigma:
        return [Stage(move(n, m), n)]
    return [
        Stage(X + h * slope(t, n), n, into="y"),
        Stage(0.5 * X + 0.5 * y + (0.5 * h) * slope(t, m, y), m, at="y"),
    ]


def ode_rk4(t: Trajectory, i: int) -> list[Stage]:
    n, m = t[i], t[i + 1]
    if not m.sigma:
        return [Stage(move(n, m), n)]
    h = m.time - n.time
    half = t.at_time(n.time + h / 2)
    y1, y2, y3 = (tensor(f"y{k}") for k in (1, 2, 3))
    # The three intermediate points carry their slopes: y1 = x + h k1 / 2, y2 = x + h k2 / 2, y3 = x + h k3.
    h_slopes = 2 * (y1 - X) + 4 * (y2 - X) + 2 * (y3 - X) + h * slope(t, m, y3)
    return [
        Stage(X + (h / 2) * slope(t, n), n, into="y1"),
        Stage(X + (h / 2) * slope(t, half, y1), half, at="y1", into="y2"),
        Stage(X + h * slope(t, half, y2), half, at="y2", into="y3"),
        Stage(X + h_slopes / 6, m, at="y3"),
    ]


# --- flow matching: integration along the path (alpha, sigma) --------------------------------------------------------


def path_change(n: Node, m: Node, at: Node, x: Linear = X) -> Linear:
    """x0 d alpha + eps d sigma, the estimates taken at ``at``; for a flow this is (t' - t) velocity."""
    return (m.alpha - n.alpha) * X0 + (m.sigma - n.sigma) * eps(at, x)


def flow_euler(t: Trajectory, i: int) -> list[Stage]:
    return [Stage(move(t[i], t[i + 1]), t[i])]


def flow_heun(t: Trajectory, i: int) -> list[Stage]:
    n, m, y = t[i], t[i + 1], tensor("y")
    if not m.sigma:
        return [Stage(move(n, m), n)]
    return [
        Stage(move(n, m), n, into="y"),
        Stage(0.5 * X + 0.5 * y + 0.5 * path_change(n, m, m, y), m, at="y"),
    ]


def flow_midpoint(t: Trajectory, i: int) -> list[Stage]:
    n, m, y = t[i], t[i + 1], tensor("y")
    middle = (n.time + m.time) / 2
    if t.schedule is not None and middle < t.schedule.t_min:
        # No model was trained between the schedule's least noisy time and none.
        return [Stage(move(n, m), n)]
    half = t.at_time(middle)
    return [Stage(move(n, half), n, into="y"), Stage(X + path_change(n, m, half, y), half, at="y")]
