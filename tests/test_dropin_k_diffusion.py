"""The drop-in for k-diffusion: whole loops of ours against whole loops of the installed package, from one seed."""

import inspect
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from k_diffusion_peer import sampling

import genfast
from genfast.dropin import k_diffusion as ours

theirs = sampling()
CHURN = ("sample_euler", "sample_heun", "sample_dpm_2")
ANCESTRAL = ("sample_euler_ancestral", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral")
SDE = ("sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde")
BY_LEVELS = (*CHURN, *ANCESTRAL, *SDE, "sample_lms", "sample_dpmpp_2m")
SOLVERS = ("sample_dpm_fast", "sample_dpm_adaptive")
HALVES = (torch.bfloat16, torch.float16)


def model(x, sigma, scale=1.0):
    """Bounded, smooth, different at every level: an error of a loop stays visible at its end."""
    s = sigma.double().view(-1, *[1] * (x.ndim - 1))
    y = torch.tanh(scale * x.double() / (1 + s)) * (1 + 0.1 * torch.sin(s))
    return y.to(x.dtype)


def run(module, name, shape, sigmas, dtype, options, channels_last=False, levels=None):
    torch.manual_seed(5)
    start = sigmas[0] if levels is None else levels[1]
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * float(start)).to(dtype)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    told = []
    options = dict(options, callback=lambda info: told.append(dict(info)), disable=True, extra_args={"scale": 0.7})
    if options.pop("brownian", False):
        options["noise_sampler"] = module.BrownianTreeNoiseSampler(x, 0.02, 15.0, seed=3)
    position = (sigmas,) if levels is None else levels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = getattr(module, name)(model, x, *position, **options)
    return result, told, torch.rand(())


def compare(name, shape, sigmas, dtype, options, channels_last=False, levels=None, ulps=64):
    mine, told, left = run(ours, name, shape, sigmas, dtype, options, channels_last, levels)
    peer, told_peer, left_peer = run(theirs, name, shape, sigmas, dtype, options, channels_last, levels)
    assert left == left_peer, "the draws differ in number"
    assert mine.dtype == peer.dtype and mine.shape == peer.shape
    assert len(told) == len(told_peer)
    largest = max([peer.abs().max().item(), 1.0, *(t["x"].float().abs().max().item() for t in told_peer)])
    half = dtype in HALVES
    if half and mine.dtype is torch.float32:
        # The model's first answer was a half: its roundings decide how far two loops drift apart.
        ulps = max(ulps, 4096)
    eps = torch.finfo(dtype if half else torch.float32 if sigmas is None else sigmas.dtype).eps
    eps = max(eps, torch.finfo(dtype).eps)
    for a, b in zip(told, told_peer):
        assert a.keys() == b.keys()
        for key in a:
            if isinstance(b[key], torch.Tensor):
                assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
                if not half:
                    torch.testing.assert_close(
                        a[key].double(),
                        b[key].double(),
                        rtol=1e-4,
                        atol=ulps * eps * largest,
                        msg=lambda m, k=key: f"{k}: {m}",
                    )
            elif not isinstance(b[key], float):
                assert a[key] == b[key], key
    if half:
        exact, _, _ = run(theirs, name, shape, sigmas, torch.float32, options, channels_last, levels)
        if name in (*CHURN, *ANCESTRAL, *SDE):
            return  # other draws in float32
        error, allowed = (mine.double() - exact).abs().max(), (peer.double() - exact).abs().max()
        assert error <= 2 * allowed + 4 * eps * largest
    else:
        error = (mine.double() - peer.double()).abs().max().item()
        assert error <= ulps * eps * largest, error / (eps * largest)


@st.composite
def levels(draw):
    n = draw(st.integers(1, 9))
    kind = draw(st.sampled_from(("karras", "exponential", "polyexponential", "vp")))
    low, high = draw(st.sampled_from(((0.03, 14.6), (0.1, 2.0), (0.002, 80.0))))
    sigmas = (
        theirs.get_sigmas_vp(max(n, 2)) if kind == "vp" else getattr(theirs, f"get_sigmas_{kind}")(max(n, 2), low, high)
    )
    return sigmas if draw(st.booleans()) else sigmas[:-1]


shapes = st.sampled_from(((1, 3, 4, 4), (2, 3, 5, 3), (3, 7), (1, 1), (2, 2, 3, 2, 3)))
dtypes = st.sampled_from((torch.float32, torch.float32, torch.float64, *HALVES))


@settings(max_examples=130, deadline=None, derandomize=True)
@given(st.data())
def test_loops_over_levels(data):
    name = data.draw(st.sampled_from(BY_LEVELS))
    options = {}
    if name in CHURN and data.draw(st.booleans()):
        options = {
            "s_churn": data.draw(st.sampled_from((0.5, 4.0, 40.0))),
            "s_noise": 1.01,
            "s_tmin": 0.05,
            "s_tmax": 10.0,
        }
    if name in (*ANCESTRAL, *SDE):
        options = {
            "eta": data.draw(st.sampled_from((0.0, 0.4, 1.0))),
            "s_noise": data.draw(st.sampled_from((1.0, 0.9))),
        }
    if name in SDE and data.draw(st.booleans()):
        options["noise_sampler"] = lambda a, b: torch.full(SHAPE[0], 0.3, dtype=SHAPE[1]) * (a - b).to(SHAPE[1])
    if name == "sample_dpmpp_2m_sde":
        options["solver_type"] = data.draw(st.sampled_from(("heun", "midpoint")))
    if name == "sample_dpmpp_sde":
        options["r"] = data.draw(st.sampled_from((0.5, 0.3)))
    if name == "sample_lms":
        options["order"] = data.draw(st.integers(1, 5))
    shape, dtype, sigmas = data.draw(shapes), data.draw(dtypes), data.draw(levels())
    if len(sigmas) < 2:
        return
    SHAPE[:] = [shape, dtype]
    if name in SDE and "noise_sampler" not in options:
        options["brownian"] = True
        sigmas = sigmas.clamp(max=14.9)
        sigmas = torch.where(sigmas > 0, sigmas.clamp(min=0.03), sigmas).unique().flip(0)
        if len(sigmas) < 2:
            return
    # The peer integrates the weights of LMS in float32; the square of a step's ratio enters where steps are long.
    compare(name, shape, sigmas, dtype, options, data.draw(st.booleans()), ulps=4096 if name == "sample_lms" else 256)


SHAPE = [None, None]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_loops_of_the_solver(data):
    name = data.draw(st.sampled_from(SOLVERS))
    options = {"eta": data.draw(st.sampled_from((0.0, 0.5)))}
    if name == "sample_dpm_adaptive":
        options |= {"order": data.draw(st.sampled_from((2, 3))), "rtol": data.draw(st.sampled_from((0.05, 0.2)))}
        ends = (0.05, 5.0)
    else:
        ends = (0.05, 5.0, data.draw(st.integers(3, 14)))
    compare(name, data.draw(shapes), None, torch.float32, options, levels=ends, ulps=2048)


def test_adaptive_returns_its_counts():
    results = [
        run(module, "sample_dpm_adaptive", (2, 3), None, torch.float32, {"return_info": True}, levels=(0.05, 5.0))[0]
        for module in (ours, theirs)
    ]
    assert results[0][1] == results[1][1] and results[0][1]["n_accept"] > 0


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures_are_the_peers(name):
    mine, peer = getattr(ours, name), getattr(theirs, name)
    if inspect.isclass(peer):
        methods = [m for m, f in vars(peer).items() if callable(f) and (m == "__init__" or not m.startswith("_"))]
        pairs = [(getattr(mine, m), getattr(peer, m)) for m in methods]
    else:
        pairs = [(mine, peer)]
    for a, b in pairs:
        a, b = inspect.signature(a).parameters, inspect.signature(b).parameters
        assert set(a) - set(b) <= {"seed"} and list(a)[: len(b)] == list(b)
        for key in b:
            same = a[key].default == b[key].default
            assert same or (callable(a[key].default) and callable(b[key].default)) or str(b[key].default) == "cpu", key


def test_every_sampler_of_the_peer_is_here():
    public = {n for n, v in vars(theirs).items() if n.startswith("sample_") and callable(v)}
    assert public == set(ours.REPLACEMENTS)


@pytest.mark.parametrize("kind", ["karras", "exponential", "polyexponential", "vp"])
def test_schedules(kind):
    arguments = () if kind == "vp" else (0.03, 14.6)
    mine, peer = (getattr(m, f"get_sigmas_{kind}")(7, *arguments) for m in (ours, theirs))
    assert torch.equal(mine, peer)


def test_scalars():
    a, b = torch.tensor(3.0), torch.tensor(1.2)
    for eta in (0.0, 0.5, 1.0):
        assert ours.get_ancestral_step(a, b, eta) == theirs.get_ancestral_step(a, b, eta)
    levels = theirs.get_sigmas_karras(6, 0.1, 10.0).numpy()
    for order in (1, 2, 3, 4):
        for j in range(order):
            mine, peer = (m.linear_multistep_coeff(order, levels, 4, j) for m in (ours, theirs))
            assert mine == pytest.approx(peer, rel=1e-5)
    with pytest.raises(ValueError, match="Order 3 too high for step 1"):
        ours.linear_multistep_coeff(3, levels, 1, 0)
    x, d = torch.randn(2, 3), torch.randn(2, 3)
    sigma = torch.tensor([0.5, 2.0])
    assert torch.equal(ours.to_d(x, sigma, d), theirs.to_d(x, sigma, d))


def test_brownian_paths_are_the_peers():
    x = torch.zeros(2, 3)
    for seed in (4, [4, 5]):
        mine, peer = (m.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=seed) for m in (ours, theirs))
        for a, b in ((10.0, 3.0), (3.0, 0.2), (0.2, 3.0)):
            a, b = torch.tensor(a), torch.tensor(b)
            assert torch.equal(mine(a, b), peer(a, b))


def test_log_likelihood():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))

    def gaussian(x, sigma):
        return x / (1 + sigma.view(-1, 1) ** 2)

    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        results.append(module.log_likelihood(gaussian, x, 1e-3, 30.0))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    exact = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    torch.testing.assert_close(results[0][0], exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", [*CHURN, *ANCESTRAL, *SDE])
def test_seeded_noise(name):
    sigmas = theirs.get_sigmas_karras(6, 0.1, 10.0)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)) * 10
    options = {"s_churn": 20.0} if name in CHURN else {}
    sample = getattr(ours, name)
    state = torch.get_rng_state()
    first = sample(model, x, sigmas, disable=True, seed=3, **options)
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator was used"
    assert torch.equal(first, sample(model, x, sigmas, disable=True, seed=3, **options))
    assert not torch.equal(first, sample(model, x, sigmas, disable=True, seed=4, **options))
    if name not in CHURN:
        with pytest.raises(ValueError, match="seed and noise_sampler exclude each other"):
            sample(model, x, sigmas, seed=3, noise_sampler=lambda a, b: x)


def test_two_draws_of_a_step_are_not_the_same():
    """DPM-Solver++ SDE draws twice a step: with a model that says 0 the result is a sum of independent draws."""
    sigmas = torch.tensor([2.0, 1.0])
    x = torch.zeros(1, 200_000)
    result = ours.sample_dpmpp_sde(lambda x, s: 0 * x, x, sigmas, disable=True, seed=1)
    peer = theirs.sample_dpmpp_sde(
        lambda x, s: 0 * x, x, sigmas, disable=True, noise_sampler=lambda a, b: torch.randn_like(x)
    )
    assert result.std() == pytest.approx(peer.std().item(), rel=0.02)  # a false alarm is beyond 5 sigma


def test_refusals():
    x, sigmas = torch.ones(1, 2), torch.tensor([1.0, 0.5])
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="sigma_min and sigma_max must not be 0"):
            module.sample_dpm_fast(model, x, 0.0, 1.0, 4, disable=True)
        with pytest.raises(ValueError, match="order should be 2 or 3"):
            module.sample_dpm_adaptive(model, x, 0.1, 1.0, order=4, disable=True)
        with pytest.raises(ValueError, match="eta must be 0 for reverse sampling"):
            module.sample_dpm_fast(model, x, 1.0, 0.1, 4, eta=0.5, disable=True)
        with pytest.raises(ValueError, match="solver_type must be 'heun' or 'midpoint'"):
            module.sample_dpmpp_2m_sde(model, x, sigmas, solver_type="euler", disable=True)
    with pytest.raises(ValueError, match="order must be from 1 to 7, got 9"):
        ours.sample_lms(model, x, sigmas, order=9)


def test_models_that_broadcast():
    sigmas = theirs.get_sigmas_karras(4, 0.1, 3.0)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for module in (ours, theirs):
        results.append(module.sample_euler(lambda x, s: x.mean(1, keepdim=True), x, sigmas, disable=True))
    torch.testing.assert_close(*results)


def test_patch():
    before = theirs.sample_euler
    with genfast.patch("k_diffusion") as done:
        assert theirs.sample_euler is ours.sample_euler and set(done.names) == set(ours.REPLACEMENTS)
    assert theirs.sample_euler is before
