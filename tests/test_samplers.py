"""Samplers: exactness on Gaussian data, agreement between prediction types, noise, guidance, callbacks."""

import itertools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import genfast
import genfast.samplers.corrector as correctors
import genfast.samplers.sampler as module
from genfast.samplers import SAMPLERS, Sampler, Trajectory, noise_schedule, reflow_pairs, sample

MEAN, STD = 0.3, 0.5
SCHEDULES = ["linear", "scaled_linear", "cosine", "vp", "subvp", "ve", "edm", "flow"]
F64 = torch.float64


def levels(schedule, t, dims=2):
    alpha, sigma = schedule.alpha_sigma(t.double().numpy())
    shape = (-1, *[1] * (dims - 1))
    return torch.from_numpy(alpha).view(shape), torch.from_numpy(sigma).view(shape)


def gaussian(schedule, prediction="sample"):
    """The exact model of data N(MEAN, STD^2), in any prediction type; arithmetic in float64."""

    def network(x, t):
        alpha, sigma = levels(schedule, t, x.dim())
        dtype, x = x.dtype, x.double()
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return express(prediction, x, x0, alpha, sigma).to(dtype)

    return network


def nonlinear(schedule, prediction="sample"):
    """A bounded, time-dependent data estimate, in any prediction type."""

    def network(x, t):
        alpha, sigma = levels(schedule, t, x.dim())
        dtype, x = x.dtype, x.double()
        x0 = torch.tanh(1.5 * x / torch.hypot(alpha, sigma) + 0.3 * torch.sin(4 * torch.atan(sigma)))
        return express(prediction, x, x0, alpha, sigma).to(dtype)

    return network


def express(prediction, x, x0, alpha, sigma):
    eps = (x - alpha * x0) / sigma
    return {
        "sample": x0,
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
        "score": -eps / sigma,
    }[prediction]


def sampler_options(name, schedule):
    return {"boundary": schedule.discrete} if name == "lcm" else {}


def usable(name, schedule):
    return not (SAMPLERS[name].finite_ratio and not schedule.alpha_sigma(schedule.t_max)[0])


# --- exactness on Gaussian data --------------------------------------------------------------------------------------


def exact_flow(x, start, end):
    """The probability flow of Gaussian data, in closed form."""
    spread = [math.sqrt((n.alpha * STD) ** 2 + n.sigma**2) for n in (start, end)]
    return end.alpha * MEAN + spread[1] / spread[0] * (x - start.alpha * MEAN)


def error_at(name, schedule, steps, in_time, **options):
    if in_time:
        times = np.linspace(schedule.time_at(20.0), schedule.time_at(0.1), steps + 1)
    else:
        times = schedule.time_at(np.geomspace(20.0, 0.1, steps + 1))
    trajectory = Trajectory(*schedule.alpha_sigma(times), times, schedule)
    x = torch.linspace(-2, 2, 5, dtype=F64).view(1, 5)
    got = Sampler(name, trajectory, prediction="sample", **options)(gaussian(schedule), x)
    return float((got - exact_flow(x, trajectory[0], trajectory[steps])).abs().max())


ORDERS = [
    ("ddim", 1, {}),
    ("euler", 1, {}),
    ("heun", 2, {}),
    ("euler_ancestral", 1, dict(eta=0.0)),
    ("dpmpp_2m", 2, dict(lower_order_final=False)),
    ("dpmpp_2m", 2, dict(lower_order_final=False, solver="heun")),
    ("dpmpp_3m", 2, dict(lower_order_final=False)),
    ("dpmpp_2s", 2, {}),
    ("dpmpp_2s", 2, dict(r=0.3)),
    ("dpmpp_2m_sde", 2, dict(eta=0.0, lower_order_final=False)),
    ("dpmpp_3m_sde", 2, dict(eta=0.0, lower_order_final=False)),
    ("unipc", 2, dict(order=1, lower_order_final=False)),
    ("unipc", 3, dict(lower_order_final=False)),
    ("unipc", 3, dict(variant="bh1", lower_order_final=False)),
    ("unipc", 4, dict(order=3, lower_order_final=False)),
    ("lms", 2, dict(order=2)),
    ("lms", 3, dict(order=3)),
    ("lms", 4, {}),
    ("deis", 2, dict(order=2, lower_order_final=False)),
    ("deis", 3, dict(lower_order_final=False)),
    ("tcd", 1, dict(eta=0.0)),
]
TIME_ORDERS = [
    ("pndm", 2, {}),
    ("pndm", 2, dict(warmup="runge_kutta")),
    ("ode_euler", 1, {}),
    ("ode_heun", 2, {}),
    ("ode_rk4", 4, {}),
    ("flow_euler", 1, {}),
    ("flow_heun", 2, {}),
    ("flow_midpoint", 2, {}),
]


@pytest.mark.parametrize(
    "name, order, options, in_time", [(*c, False) for c in ORDERS] + [(*c, True) for c in TIME_ORDERS]
)
def test_order_of_convergence(name, order, options, in_time):
    # The slope over 32 to 128 steps is within 0.45 of the order, before start-up steps of a lower order take over.
    for schedule in ("vp", "flow"):
        schedule = noise_schedule(schedule)
        errors = [error_at(name, schedule, n, in_time, **options) for n in (32, 64, 128)]
        slope = math.log2(errors[0] / errors[2]) / 2
        assert slope > order - 0.45, (errors, slope)
        assert errors[2] < 0.05


def test_the_table_states_the_measured_orders():
    measured = {}
    for name, order, _ in [*ORDERS, *TIME_ORDERS]:
        measured.setdefault(name, []).append(order)
    for name, orders in measured.items():
        assert SAMPLERS[name].order in orders, name


def affine_law(sampler, schedule):
    """Mean and variance of a sampler's result on Gaussian data: every step is affine, so the law is exact.

    The stages are read as they stand, without step tables or kernels: an independent reading of what a row says.
    """
    draws = 2 + sum(2 * len(stages) for stages in sampler._stages)
    one = np.eye(draws)
    start = sampler.trajectory[0]
    prior = math.hypot(start.alpha * STD, start.sigma)
    tensors = {"x": one[0] * start.alpha * MEAN + one[1] * prior}  # x_T from the true marginal
    history, used = [], 2
    for stages in sampler._stages:
        for stage in stages:
            known = dict(tensors, **{f"h{k + 1}": h for k, h in enumerate(history)})
            if stage.node is not None:
                a, s = stage.node.alpha, stage.node.sigma
                gain = a * STD**2 / (a**2 * STD**2 + s**2)
                known["x0"] = gain * tensors[stage.at] + one[0] * MEAN * (1 - gain * a)
            if "noise" in stage.out.weights:
                known["noise"] = one[used]
                used += 1
            result = sum(w * known[k] for k, w in stage.out.weights.items())
            if stage.keep is not None:
                history.insert(0, sum(w * known[k] for k, w in stage.keep.weights.items()))
            tensors[stage.into] = result
    return tensors["x"][0], float((tensors["x"][1:] ** 2).sum())


STOCHASTIC = [
    ("ddpm", {}),
    ("ddpm", dict(variance="fixed_large")),
    ("ddim", dict(eta=1.0)),
    ("euler", dict(s_churn=20.0, s_noise=1.0)),
    ("heun", dict(s_churn=20.0, s_noise=1.0)),
    ("euler_ancestral", {}),
    ("dpmpp_2s", dict(eta=1.0)),
    ("euler_ancestral", dict(eta=0.5)),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", dict(eta=0.5)),
    ("dpmpp_3m_sde", {}),
    ("euler_maruyama", {}),
    ("reverse_diffusion", {}),
]


@pytest.mark.parametrize("name, options", STOCHASTIC)
@pytest.mark.parametrize("kind", ["linear", "vp", "edm"])
def test_sde_samplers_have_the_right_law(name, options, kind):
    schedule = noise_schedule(kind)
    spacing = "karras" if kind == "edm" else "linspace"
    errors = []
    for steps in (100, 400):
        sampler = Sampler(name, schedule, steps, spacing=spacing, prediction="sample", **options)
        mean, variance = affine_law(sampler, schedule)
        errors.append((abs(mean - MEAN), abs(variance / STD**2 - 1)))
    # The law of the discrete chain tends to the data's: at least half-order, and close at 400 steps. (DPM-Solver++ SDE
    # takes its one large last step, to no noise, deterministically.)
    assert errors[1][0] < 0.01 and errors[1][1] < 0.13, errors
    assert errors[1][1] < 0.6 * errors[0][1] or errors[1][1] < 0.01, errors

    # Samples follow that law: z-scores of mean and variance below 5, a false alarm in 1.7 million for each.
    sampler = Sampler(name, schedule, 40, spacing=spacing, prediction="sample", **options)
    mean, variance = affine_law(sampler, schedule)
    n, start = 300 * 64, sampler.trajectory[0]
    x = start.alpha * MEAN + math.hypot(start.alpha * STD, start.sigma) * genfast.randn(300, 64, seed=7, stream=2**30)
    got = sampler(gaussian(schedule), x, seed=7).double()
    assert abs(got.mean() - mean) / math.sqrt(variance / n) < 5
    assert abs(got.var() / variance - 1) / math.sqrt(2 / n) < 5


@pytest.mark.parametrize("name, options", STOCHASTIC)
def test_a_run_that_stops_half_way_has_the_law_of_that_level(name, options):
    # The last step draws its noise like any other unless it ends without noise: a run can be handed over in the middle.
    schedule, errors = noise_schedule("vp"), []
    for steps in (100, 400):
        times = np.linspace(1.0, schedule.time_at(0.5), steps + 1)
        trajectory = Trajectory(*schedule.alpha_sigma(times), times, schedule)
        mean, variance = affine_law(Sampler(name, trajectory, prediction="sample", **options), schedule)
        end = trajectory[steps]
        exact = (end.alpha * STD) ** 2 + end.sigma**2
        errors.append(abs(variance / exact - 1))
        assert abs(mean / (end.alpha * MEAN) - 1) < 0.02
    assert errors[1] < 0.02 and (errors[1] < 0.6 * errors[0] or errors[1] < 1e-3), errors


@pytest.mark.parametrize("name", [n for n in SAMPLERS if "s_noise" in SAMPLERS[n].options])
def test_s_noise_scales_the_noise_and_nothing_else(name):
    switch = "s_churn" if "s_churn" in SAMPLERS[name].options else "eta"
    plain, louder = (Sampler(name, "edm", 6, s_noise=k, **{switch: 1.0})._stages for k in (1.0, 1.3))
    drawn = 0
    for a, b in zip(itertools.chain(*plain), itertools.chain(*louder), strict=True):
        for part in a.out.weights:
            factor = 1.3 if part == "noise" else 1.0
            assert b.out.weights[part] == pytest.approx(factor * a.out.weights[part], rel=1e-12)
            drawn += part == "noise" and a.out.weights[part] > 0
    assert drawn >= 5


# --- against independent implementations -----------------------------------------------------------------------------


@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_edm_algorithm_2(churn):
    """Karras et al. 2022, algorithm 2 with their preconditioning, in float64 around a float32 network."""
    steps, low, high, rho, data = 12, 0.002, 80.0, 7, 0.5
    s_min, s_max, s_noise = 0.05, 50.0, 1.003

    def network(x, noise_condition):
        assert x.dtype == torch.float32
        return torch.tanh(x + noise_condition.to(x.dtype).view(-1, 1, 1))

    def denoise(x, sigma):
        skip = data**2 / (sigma**2 + data**2)
        out = sigma * data / math.sqrt(sigma**2 + data**2)
        scaled = (x / math.sqrt(sigma**2 + data**2)).to(torch.float32)
        condition = torch.full((x.shape[0],), math.log(sigma) / 4, dtype=F64)
        return skip * x + out * network(scaled, condition).to(F64)

    ramp = [i / (steps - 1) for i in range(steps)]
    sigmas = [(high ** (1 / rho) + r * (low ** (1 / rho) - high ** (1 / rho))) ** rho for r in ramp] + [0.0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, 5, dtype=F64, generator=generator) * sigmas[0]

    x, generator = start, torch.Generator().manual_seed(1)
    for now, then in itertools.pairwise(sigmas):
        gamma = min(churn / steps, math.sqrt(2) - 1) if s_min <= now <= s_max else 0.0
        raised = now * (1 + gamma)
        if gamma:
            x = x + math.sqrt(raised**2 - now**2) * s_noise * torch.randn(x.shape, dtype=F64, generator=generator)
        d = (x - denoise(x, raised)) / raised
        y = x + (then - raised) * d
        if then:
            y = x + (then - raised) * (d + (y - denoise(y, then)) / then) / 2
        x = y

    options = dict(s_churn=churn, s_min=s_min, s_max=s_max, s_noise=s_noise)
    sampler = Sampler("heun", "edm", steps, prediction="edm", **options)
    np.testing.assert_allclose(sampler.sigmas, sigmas, rtol=1e-12)
    got = sampler(network, start, generator=torch.Generator().manual_seed(1), model_dtype=torch.float32)
    assert got.dtype == F64
    # The float32 network turns rounding of its input into 1e-7; everything else is float64.
    assert (got - x).abs().max() < 2e-6


@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama"])
def test_predictor_corrector(kind, predictor):
    """Song et al. 2021, algorithms 4 and 5, written out for a score model, with the Langevin corrector."""
    schedule, steps, snr = noise_schedule(kind), 7, 0.2
    score_of = nonlinear(schedule, "score")
    times = [*np.linspace(schedule.t_max, schedule.t_min, steps), 0.0]
    levels_ = [tuple(float(v) for v in schedule.alpha_sigma(t)) for t in times[:-1]] + [(1.0, 0.0)]
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * levels_[0][1]

    x, generator = start.double(), torch.Generator().manual_seed(1)

    def draw():
        return torch.randn(4, 6, generator=generator).double()

    for i in range(steps):
        (a, s), (a1, s1) = levels_[i : i + 2]
        t = torch.full((4,), times[i], dtype=F64)
        beta = 1 - (a / a1) ** 2
        for _ in range(2):
            z, score = draw(), score_of(x, t)
            size = (snr * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2 * 2 * (1 - beta)
            x = x + size * score + (2 * size).sqrt() * z
        score = score_of(x, t)
        if predictor == "euler_maruyama":
            dt = times[i + 1] - times[i]
            if kind == "vp":
                rate = 0.1 + times[i] * 19.9
                drift, g2 = -0.5 * rate * x, rate
            else:
                drift, g2 = 0 * x, s**2 * 2 * math.log(50 / 0.01)
            x, g = x + (drift - g2 * score) * dt, math.sqrt(-g2 * dt)
        elif kind == "ve":
            g2 = s**2 - s1**2
            x = x + g2 * score
            g = math.sqrt(g2) if predictor == "reverse_diffusion" else math.sqrt(s1**2 * g2 / s**2)
        elif predictor == "reverse_diffusion":
            x, g = 2 * x - math.sqrt(1 - beta) * x + beta * score, math.sqrt(beta)
        else:
            x, g = (x + beta * score) / math.sqrt(1 - beta), math.sqrt(beta)
        if i < steps - 1:
            x = x + g * draw()

    options = {}
    if predictor == "ancestral":
        predictor, options = "ddpm", dict(variance="fixed_large" if kind == "vp" else "fixed_small")
    sampler = Sampler(
        predictor,
        schedule,
        steps,
        spacing="linspace",
        prediction="score",
        corrector="langevin",
        corrector_steps=2,
        snr=snr,
        **options,
    )
    got = sampler(score_of, start, generator=torch.Generator().manual_seed(1)).double()
    scale = x.abs().max()
    assert (got - x).abs().max() < 3e-4 * scale


def test_corrections_see_the_fed_model_input():
    schedule = noise_schedule("ve")
    sampler = Sampler("reverse_diffusion", schedule, 5, prediction="score", corrector="langevin", corrector_steps=2)
    x = sampler.initial_noise((4, 6), seed=1)
    network, types = nonlinear(schedule, "score"), set()

    def watched(x, t):
        types.add(x.dtype)
        return network(x, t)

    fed = sampler(watched, x, seed=2, model_dtype=F64)
    assert types == {F64}
    torch.testing.assert_close(fed, sampler(network, x, seed=2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fed, sampler(network, x, seed=2, clip=1e6), rtol=1e-3, atol=1e-3)


def test_rk45_is_scipys():
    integrate = pytest.importorskip("scipy.integrate")
    schedule = noise_schedule("vp")
    network = nonlinear(schedule, "epsilon")
    x = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    calls = [0, 0]

    def counted(index):
        def call(x, t):
            calls[index] += 1
            return network(x, t)

        return call

    def slope(t, y):
        y = torch.from_numpy(y).view(3, 5)
        eps = counted(0)(y, torch.full((3,), t, dtype=F64))
        beta, sigma = 0.1 + 19.9 * t, math.sqrt(-math.expm1(-(0.1 * t + 19.9 * t * t / 2)))
        return (-0.5 * beta * y + 0.5 * beta * eps / sigma).flatten().numpy()

    theirs = integrate.solve_ivp(slope, (1.0, 1e-3), x.flatten().numpy(), method="RK45", rtol=1e-5, atol=1e-6)
    sampler = Sampler("ode_rk45", schedule, final="sigma_min", rtol=1e-5, atol=1e-6)
    got = sampler(counted(1), x)
    assert calls[0] == theirs.nfev == calls[1]
    np.testing.assert_allclose(got.flatten(), theirs.y[:, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind, tolerance", [("linear", 1e-5), ("vp", 1e-8), ("edm", 1e-8), ("flow", 1e-8)])
def test_rk45_reaches_its_tolerance(kind, tolerance):
    schedule = noise_schedule(kind)
    x = torch.linspace(-2, 2, 6, dtype=F64).view(2, 3)
    sampler = Sampler("ode_rk45", schedule, prediction="sample", rtol=tolerance, atol=tolerance)
    x = x * (sampler.sigmas[0] if kind == "edm" else 1)
    seen = []
    got = sampler(gaussian(schedule), x, callback=lambda state: seen.append((state.time, state.x0)))
    start, end = sampler.trajectory[0], sampler.trajectory[1]
    last = exact_flow(x, start, end)
    alpha, sigma = torch.tensor([end.alpha], dtype=F64), torch.tensor([end.sigma], dtype=F64)
    exact = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (last - alpha * MEAN)
    assert (got - exact).abs().max() < 1000 * tolerance
    assert [t for t, _ in seen] == sorted((t for t, _ in seen), reverse=True) and seen[-1][0] == end.time
    torch.testing.assert_close(seen[-1][1], got)


# --- one denoiser, every prediction type -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_prediction_types_agree(name):
    adaptive = SAMPLERS[name].adaptive
    for kind in ("vp", "edm", "flow") if adaptive else SCHEDULES:
        schedule = noise_schedule(kind)
        if not usable(name, schedule):
            continue
        options = dict(rtol=1e-3, atol=1e-3) if adaptive else sampler_options(name, schedule)
        results = {}
        for prediction in ("sample", "epsilon", "v_prediction", "flow_prediction", "score"):
            if kind == "flow" and prediction in ("epsilon", "score"):
                with pytest.raises(ValueError, match="cannot give x0 where alpha is 0"):
                    _one_run(name, schedule, prediction, options)
                continue
            results[prediction] = _one_run(name, schedule, prediction, options)
        expected = results.pop("sample")
        assert expected.isfinite().all() and expected.std() > 0.05
        for prediction, got in results.items():
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7, msg=f"{kind} {prediction}")


def _one_run(name, schedule, prediction, options):
    steps = None if SAMPLERS[name].adaptive else 8
    sampler = Sampler(name, schedule, steps, prediction=prediction, **options)
    x = sampler.initial_noise((3, 4), seed=1, dtype=F64)
    return sampler(nonlinear(schedule, prediction), x, seed=2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_edm_prediction_agrees(name):
    schedule, data = noise_schedule("edm"), 0.7

    def network(x, t):  # F from the denoiser, at its own scaled input and time
        sigma = (4 * t).exp()
        denoised = nonlinear(schedule)(x * (sigma**2 + data**2).sqrt().view(-1, 1), sigma)
        sigma = sigma.view(-1, 1)
        noisy = x * (sigma**2 + data**2).sqrt()
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
        return (denoised - skip * noisy) / out

    options = sampler_options(name, schedule)
    options |= {} if SAMPLERS[name].adaptive else dict(steps=8)
    raw = Sampler(name, schedule, prediction="edm", sigma_data=data, **options)
    wrapped = Sampler(name, schedule, prediction="sample", **options)
    x = raw.initial_noise((3, 4), seed=1, dtype=F64)
    torch.testing.assert_close(raw(network, x, seed=2), wrapped(nonlinear(schedule), x, seed=2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_wide_clip_changes_nothing_and_a_narrow_one_holds(name):
    schedule = noise_schedule("vp" if SAMPLERS[name].adaptive else "scaled_linear")
    sampler = Sampler(name, schedule, None if SAMPLERS[name].adaptive else 6)
    network, x = nonlinear(schedule, "epsilon"), sampler.initial_noise((3, 4), seed=1, dtype=F64)
    free = sampler(network, x, seed=2)
    torch.testing.assert_close(sampler(network, x, seed=2, clip=1e6), free, rtol=1e-8, atol=1e-8)
    narrow = sampler(network, x, seed=2, clip=(0.1, 0.2))
    assert not torch.allclose(narrow, free, atol=1e-2)
    if name in ("ddim", "ddpm", "dpmpp_2m", "unipc", "heun"):  # the last step ends on the clipped estimate itself
        assert narrow.min() >= 0.1 - 1e-9 and narrow.max() <= 0.2 + 1e-9


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SAMPLERS if SAMPLERS[n].noise != "never"])
def test_batches_can_be_split(name):
    schedule = noise_schedule("scaled_linear")
    options = {o: v for o, v in (("eta", 1.0), ("s_churn", 30.0)) if o in SAMPLERS[name].options}
    sampler = Sampler(name, schedule, 6, **options)
    assert sampler.stochastic
    network = nonlinear(schedule, "epsilon")
    x = sampler.initial_noise((5, 3, 4), seed=11)
    whole = sampler(network, x, seed=11)
    parts = [sampler.initial_noise((n, 3, 4), seed=11, offset=k) for k, n in ((0, 2), (2, 3))]
    assert torch.equal(torch.cat(parts), x)
    parts = [sampler(network, p, seed=11, offset=k) for p, k in zip(parts, (0, 2))]
    assert torch.equal(torch.cat(parts), whole)
    own = torch.full((5,), 11, dtype=torch.int64)
    alone = sampler(network, x, seed=own)
    assert torch.equal(alone[:1], whole[:1]) and not torch.equal(alone[1:], whole[1:])
    assert not torch.equal(sampler(network, x, seed=12), whole)


@pytest.mark.parametrize(
    "name, draws, options",
    [
        ("ddpm", 4 + 15, dict(corrector="langevin", corrector_steps=3)),
        ("heun", 5, dict(s_churn=30.0)),
        ("dpmpp_2m_sde", 4, {}),
        ("euler_maruyama", 4, {}),
    ],
)
def test_every_draw_of_a_run_has_its_own_stream(name, draws, options, monkeypatch):
    streams = []
    step, randn = module.sampler_step, correctors.randn

    def watched_step(inputs, table, *, step_=step, **kwargs):
        if "seed" in kwargs:
            streams.append(kwargs["stream"] + kwargs.get("step", 0))
        return step_(inputs, table, **kwargs)

    def watched_randn(*shape, **kwargs):
        streams.append(kwargs["stream"])
        return randn(*shape, **kwargs)

    monkeypatch.setattr(module, "sampler_step", watched_step)
    monkeypatch.setattr(correctors, "randn", watched_randn)
    for model_dtype in (None, F64):
        streams.clear()
        sampler = Sampler(name, "scaled_linear", 5, **options)
        sampler(lambda x, t: torch.tanh(x), (2, 3), seed=1, model_dtype=model_dtype)
        assert len(streams) == draws + 1 and len(set(streams)) == draws + 1  # one more: x_T
        assert all(0 <= s < 2**32 for s in streams)


def test_model_dtype_does_not_move_the_noise():
    schedule = noise_schedule("edm")
    sampler = Sampler("heun", schedule, 8, prediction="sample", s_churn=10.0)
    x = sampler.initial_noise((4, 6), seed=1)
    types = set()

    def network(x, t):
        types.add(x.dtype)
        return nonlinear(schedule)(x, t)

    plain = sampler(network, x, seed=3)
    fed = sampler(network, x, seed=3, model_dtype=torch.bfloat16)
    assert types == {torch.float32, torch.bfloat16} and fed.dtype == torch.float32
    assert 0 < (fed - plain).abs().max() < 0.1


def test_initial_noise():
    for kind, std in (("linear", 1.0), ("ve", 50.0), ("edm", 80.0), ("flow", 1.0)):
        sampler = Sampler("ddim", kind, 5, prediction="sample")
        x = sampler.initial_noise((400, 500), seed=2)
        assert abs(x.std() / std - 1) < 0.01
        generated = sampler.initial_noise((2, 3), generator=torch.Generator().manual_seed(4), dtype=F64)
        expected = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(4)) * std
        torch.testing.assert_close(generated, expected, rtol=1e-4, atol=0)
    network = nonlinear(noise_schedule("flow"))
    by_shape = sampler(network, (2, 3), seed=9)
    assert torch.equal(by_shape, sampler(network, sampler.initial_noise((2, 3), seed=9), seed=9))
    assert torch.equal(by_shape, sample("ddim", network, (2, 3), "flow", 5, prediction="sample", seed=9))


# --- guidance, thresholds, learned variance --------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "ode_rk45"])
def test_guidance(name, rescale):
    schedule = noise_schedule("vp" if name == "ode_rk45" else "scaled_linear")
    cond = nonlinear(schedule, "epsilon")

    def uncond(x, t):
        return 0.8 * cond(x, t) + 0.1

    def by_hand(x, t):
        c, u = cond(x, t), uncond(x, t)
        guided = u + 3.0 * (c - u)
        ratio = c.std(1, keepdim=True, correction=0) / guided.std(1, keepdim=True, correction=0)
        return guided * (rescale * ratio + 1 - rescale)

    sampler = Sampler(name, schedule, None if name == "ode_rk45" else 6)
    x = sampler.initial_noise((3, 8), seed=1, dtype=F64)
    expected = sampler(by_hand, x)
    options = dict(guidance=3.0, guidance_rescale=rescale)
    torch.testing.assert_close(sampler(cond, x, uncond=uncond, **options), expected)
    torch.testing.assert_close(sampler(lambda x, t: (cond(x, t), uncond(x, t)), x, **options), expected)
    per_sample = torch.full((3,), 3.0)
    torch.testing.assert_close(sampler(cond, x, uncond=uncond, guidance=per_sample, guidance_rescale=rescale), expected)


def test_learned_variance_with_guidance_and_thresholds():
    schedule = noise_schedule("linear")
    base = nonlinear(schedule, "epsilon")
    sampler = Sampler("ddpm", schedule, 5, variance="learned_range")

    def model(x, t):
        return torch.cat([base(x, t), torch.sin(x)], 1)

    def unconditional(x, t):
        return torch.cat([0.9 * base(x, t), torch.full_like(x, 7.0)], 1)

    def merged(x, t):
        c, u = base(x, t), 0.9 * base(x, t)
        return torch.cat([u + 2 * (c - u), torch.sin(x)], 1)

    x = sampler.initial_noise((2, 3, 4), seed=1, dtype=F64)
    got = sampler(model, x, seed=2, guidance=2.0, uncond=unconditional, threshold=(0.9, 2.0))
    torch.testing.assert_close(got, sampler(merged, x, seed=2, threshold=(0.9, 2.0)))
    assert not torch.allclose(got, sampler(merged, x, seed=2))
    with pytest.raises(ValueError, match="twice the channels"):
        sampler(base, x, seed=2)


# --- the loop: callbacks, buffers, gradients, progress ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "lms", "ode_rk4", "dpmpp_3m"])
def test_callback(name):
    schedule = noise_schedule("scaled_linear")
    network = nonlinear(schedule, "epsilon")
    sampler = Sampler(name, schedule, 6)
    x = sampler.initial_noise((2, 5), seed=1, dtype=F64)
    plain, states, evaluations = sampler(network, x), [], []

    def watched(x, t):
        evaluations.append((x.clone(), t))
        return network(x, t)

    def callback(state):
        seen, t = evaluations[-1]
        alpha, sigma = levels(schedule, t)
        expected = (seen - sigma * network(seen, t)) / alpha
        torch.testing.assert_close(state.x0, expected)
        assert state.time == t[0]
        states.append((state.step, state.steps, state.alpha, state.sigma, state.x, state.x.clone()))

    got = sampler(watched, x, callback=callback)
    torch.testing.assert_close(got, plain)
    assert [s[:2] for s in states] == [(k, 6) for k in range(6)]
    assert [s[2] for s in states] == list(sampler.alphas[1:]) and [s[3] for s in states] == list(sampler.sigmas[1:])
    for *_, kept, then in states:
        assert torch.equal(kept, then)  # a state may be kept
    assert torch.equal(states[-1][4], got)
    clipped = []
    sampler(network, x, clip=0.2, callback=lambda s: clipped.append(s.x0.abs().max()))
    assert max(clipped) <= 0.2


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_reuses_its_buffers_and_leaves_x_alone(name):
    schedule = noise_schedule("edm")
    sampler = Sampler(
        name, schedule, None if SAMPLERS[name].adaptive else 9, prediction="sample", **sampler_options(name, schedule)
    )
    x = sampler.initial_noise((2, 5), seed=1)
    before, places = x.clone(), []

    def network(x, t):
        assert t.shape == (2,) and t.device == x.device
        places.append(x.data_ptr())
        return nonlinear(schedule)(x, t)

    first = sampler(network, x, seed=3)
    assert torch.equal(x, before)
    if not SAMPLERS[name].adaptive:
        assert len(set(places)) <= 5  # x_T, the state, and three inner points at most
    assert torch.equal(sampler(network, x, seed=3), first)
    # An expanded or transposed start is read through its strides.
    strided = torch.empty(5, 2).t().copy_(x)
    torch.testing.assert_close(sampler(network, strided, seed=3), first)


def test_a_model_may_return_its_input():
    sampler = Sampler("ddim", "scaled_linear", 5)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampler(lambda x, t: x, x), sampler(lambda x, t: x.clone(), x))


@pytest.mark.parametrize(
    "name, prediction, calls",
    [
        ("ddim", "epsilon", 6),
        ("dpmpp_2m", "epsilon", 6),
        ("unipc", "epsilon", 6),
        ("heun", "epsilon", 11),
        ("ddpm", "epsilon", 6),
        ("ddim", "edm", 7),
        ("heun", "edm", 12),
        ("ode_rk4", "edm", 22),
    ],
)
def test_one_call_of_the_op_per_evaluation(name, prediction, calls, monkeypatch):
    made = []
    step = module.sampler_step
    monkeypatch.setattr(module, "sampler_step", lambda *a, **k: made.append(1) or step(*a, **k))
    Sampler(name, "edm", 6, prediction=prediction)(lambda x, t: torch.tanh(x), torch.randn(1, 3) * 80, seed=0)
    assert len(made) == calls


class Dispatched(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().removeprefix("aten::").split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in SAMPLERS if not SAMPLERS[n].adaptive])
def test_a_repeated_loop_neither_reads_from_the_device_nor_copies_to_it(name):
    # What a CUDA graph must not contain: reading a value on the host, or making a tensor from host data.
    schedule = noise_schedule("scaled_linear")
    sampler = Sampler(name, schedule, 5)
    x = sampler.initial_noise((2, 3), seed=1)

    def run():
        # Noise from the generator: the reference makes its Philox key from host data, the kernels do not.
        generator = torch.Generator().manual_seed(2)
        return sampler(lambda x, t: torch.tanh(x), x, generator=generator, model_dtype=torch.bfloat16, clip=1.0)

    first = run()
    with genfast.backend("reference"), Dispatched() as seen:
        again = run()
    torch.testing.assert_close(again, first, rtol=1e-2, atol=1e-2)
    assert "tanh" in seen.names
    assert not seen.names & {"_local_scalar_dense", "item", "nonzero", "lift_fresh", "is_nonzero", "equal"}


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "lms"])
def test_gradients_flow_when_asked(name):
    schedule = noise_schedule("edm")
    sampler = Sampler(name, schedule, 4, prediction="sample")
    weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
    x = sampler.initial_noise((2, 3), seed=1, dtype=F64)

    def loss(w):
        return sampler(lambda x, t: torch.tanh(w * x), x, grad=True).square().sum()

    assert torch.autograd.gradcheck(loss, (weight,))
    frozen = sampler(lambda x, t: torch.tanh(weight * x), x)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen.square().sum(), loss(weight).detach())


def test_half_precision_state():
    schedule = noise_schedule("flow")
    for name in ("flow_euler", "dpmpp_2m"):
        sampler = Sampler(name, schedule, 6, prediction="sample")
        x = sampler.initial_noise((4, 6), seed=1)
        full = sampler(nonlinear(schedule), x)
        half = sampler(nonlinear(schedule), x.bfloat16())
        assert half.dtype == torch.bfloat16 and (half - full).abs().max() < 0.05


def test_progress(capsys, monkeypatch):
    sampler, x = Sampler("ddim", "linear", 3), torch.randn(1, 2)
    sampler(lambda x, t: x, x, progress=True)
    assert "ddim" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr("genfast.samplers.progress._bar_missing_said", False)
    with pytest.warns(UserWarning, match="needs tqdm"):
        sampler(lambda x, t: x, x, progress=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(lambda x, t: x, x, progress=True)  # said once


# --- schedules and trajectories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_consistent(kind):
    schedule = noise_schedule(kind)
    t = np.linspace(schedule.t_min, schedule.t_max, 41)[1:-1]
    t = np.rint(t) + 0.5 if schedule.discrete else t
    alpha, sigma = schedule.alpha_sigma(t)
    assert (np.diff(sigma / alpha) > 0).all()
    np.testing.assert_allclose(schedule.time_at(sigma / alpha), t, rtol=1e-9)
    np.testing.assert_allclose(schedule.at_ratio(sigma / alpha), (alpha, sigma), rtol=1e-9)
    h = 1e-5 * (schedule.t_max - schedule.t_min)
    for time in t[::10]:
        up, down = schedule.alpha_sigma(np.array([time + h, time - h])), 2 * h
        numeric = [(v[0] - v[1]) / down for v in up]
        np.testing.assert_allclose(schedule.rates(time), numeric, rtol=1e-5, atol=1e-9)


def test_zero_terminal_snr():
    schedule = noise_schedule("scaled_linear", zero_terminal_snr=True)
    assert schedule.alphas[-1] == 0 and schedule.sigmas[-1] == 1
    np.testing.assert_allclose(schedule.alphas[0], noise_schedule("scaled_linear").alphas[0])
    network = nonlinear(schedule, "v_prediction")
    for name in (
        "ddpm",
        "ddim",
        "euler",
        "euler_ancestral",
        "dpmpp_2m",
        "dpmpp_3m_sde",
        "unipc",
        "flow_heun",
        "tcd",
        "lcm",
    ):
        sampler = Sampler(name, schedule, 10, prediction="v_prediction")
        got = sampler(network, (2, 6), seed=1)
        assert got.isfinite().all() and got.std() > 0.1, name
        if SAMPLERS[name].keeps:
            continue
        # The same trajectory begun a hair below: the limit is continuous. (A history's reach in lambda is infinite.)
        t = sampler.trajectory
        alphas = t.alphas.copy()
        alphas[0] = 1e-7
        near = Sampler(name, Trajectory(alphas, t.sigmas, t.times, schedule), prediction="v_prediction")
        torch.testing.assert_close(
            near(network, sampler.initial_noise((2, 6), seed=1), seed=1), got, rtol=1e-3, atol=1e-3
        )


def test_subsequences_and_levels_can_be_listed():
    schedule = noise_schedule("linear")
    sampler = Sampler("ddim", schedule, timesteps=[900, 511, 3])
    np.testing.assert_array_equal(sampler.timesteps, [900, 511, 3])
    np.testing.assert_allclose(sampler.sigmas[:3], schedule.sigmas[[900, 511, 3]])
    listed = Sampler("heun", "edm", sigmas=[80.0, 10.0, 0.1], prediction="sample")
    np.testing.assert_allclose(listed.sigmas, [80, 10, 0.1, 0])
    times = []
    sampler(lambda x, t: times.append(t) or x, torch.zeros(2, 3))
    assert [t.tolist() for t in times] == [[900, 900], [511, 511], [3, 3]] and times[0].dtype == torch.int64
    last = Sampler("ddim", schedule, 10, spacing="linspace", final="sigma_min")
    assert last.sigmas[-1] == schedule.sigmas[0] and len(last.timesteps) == 10


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "consistency", "karras", "exponential", "beta"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_spacings_and_schedules_combine(kind, spacing, final):
    if kind == "flow" and spacing in ("karras", "exponential", "beta"):
        with pytest.raises(ValueError, match="infinite at this schedule's end"):
            Sampler("ddim", kind, 9, spacing=spacing)
        options = dict(sigma_max=50.0)
    else:
        options = {}
    if spacing == "beta":
        pytest.importorskip("scipy")
    schedule = noise_schedule(kind)
    sampler = Sampler("ddim", schedule, 9, spacing=spacing, spacing_options=options, final=final, prediction="sample")
    assert sampler.steps == 9 and (sampler.sigmas[-1] == 0) == (final == "zero")
    got = sampler(nonlinear(schedule), sampler.initial_noise((2, 3), seed=0))
    assert got.isfinite().all()


@pytest.mark.parametrize("name", [n for n in SAMPLERS if not SAMPLERS[n].adaptive])
def test_every_sampler_takes_every_spacing(name):
    for kind, spacing in itertools.product(("linear", "vp", "edm"), ("linspace", "leading", "trailing", "karras")):
        for final, steps in (("zero", 1), ("zero", 2), ("zero", 7), ("sigma_min", 7)):
            schedule = noise_schedule(kind)
            options = sampler_options(name, schedule)
            sampler = Sampler(name, schedule, steps, spacing=spacing, final=final, prediction="sample", **options)
            got = sampler(nonlinear(schedule), (2, 3), seed=1)
            # Finite and alive: a Runge-Kutta method may well be far off on so few, so uneven steps.
            assert got.isfinite().all() and got.std() > 0, (kind, spacing, final, steps)


def test_beta_spacing_says_that_it_needs_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match="spacing 'beta' needs scipy"):
        Sampler("ddim", "linear", 5, spacing="beta")


def test_flow_shift():
    times = Sampler("flow_euler", noise_schedule("flow", shift=3.0), 4, prediction="sample").trajectory.times
    plain = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(times, 3 * plain / (1 + 2 * plain))


def test_reflow_pairs():
    schedule = noise_schedule("flow")
    network = nonlinear(schedule, "sample")
    sampler = Sampler("flow_heun", schedule, 4, prediction="sample")
    pairs = list(reflow_pairs(sampler, network, (2, 5), 3, seed=8))
    whole = next(iter(reflow_pairs(sampler, network, (6, 5), 1, seed=8)))
    for k in range(2):
        assert torch.equal(torch.cat([p[k] for p in pairs]), whole[k])
    # On the exact straight flow between the pairs, one Euler step maps the noise to the sample.
    noise, clean = whole
    one = Sampler("flow_euler", schedule, 1, prediction="flow_prediction")(lambda x, t: noise - clean, noise)
    torch.testing.assert_close(one, clean, rtol=0, atol=1e-6)


def test_the_table_is_printed():
    from genfast.samplers.table import markdown

    text = markdown()
    for name, row in SAMPLERS.items():
        line = next(x for x in text.splitlines() if x.startswith(f"| {name} |"))
        assert row.source in line and all(option in line for option in row.options)
