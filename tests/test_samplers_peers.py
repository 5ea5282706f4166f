"""Whole loops against the schedulers of diffusers, where the mathematics is the same, from the same starting noise."""

import numpy as np
import pytest
import torch

from genfast.samplers import Sampler, Trajectory, noise_schedule

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SHAPE = (2, 3, 6, 5)
VP = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def model(x, t):
    """Not a denoiser, but smooth, non-linear and different at every time: for schedules without a table."""
    time = t.to(torch.float32).view(-1, 1, 1, 1) / 500
    return torch.tanh(0.8 * x + 0.3 * torch.sin(time)) - 0.1 * x


def denoiser(schedule, prediction="epsilon"):
    """A model of a bounded data estimate, so that every error of a loop stays visible at its end."""

    def network(x, t):
        alpha, sigma = (torch.from_numpy(v).view(-1, 1, 1, 1) for v in schedule.alpha_sigma(t.double().numpy()))
        x = x.double()
        x0 = torch.tanh(1.5 * alpha * x + torch.sin(t.double().view(-1, 1, 1, 1) / 300))
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[prediction].float()

    return network


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def start():
    return torch.randn(SHAPE, generator=generator(1))


def run_peer(peer, x, step_options=None):
    """The peer's loop; the draws of its generator are those of ours."""
    network = denoiser_of(peer)
    x = x * peer.init_noise_sigma
    for t in peer.timesteps:
        seen = peer.scale_model_input(x, t)
        x = peer.step(network(seen, t.expand(SHAPE[0])), t, x, return_dict=False, **(step_options or {}))[0]
    return x


def denoiser_of(peer):
    return denoiser(schedule_of(peer), peer.config.prediction_type)


def schedule_of(peer):
    return noise_schedule("alphas_cumprod", alphas_cumprod=peer.alphas_cumprod.double().numpy())


def trajectory_of(peer, sigmas, timesteps):
    """Nodes at the peer's own noise levels sigma / alpha, which it keeps in float32."""
    ratio = np.asarray(sigmas, np.float64)
    alpha = 1 / np.sqrt(1 + ratio**2)
    return Trajectory(alpha, ratio * alpha, [*np.asarray(timesteps, np.float64), -1], schedule_of(peer))


def close(ours, theirs, tolerance=2e-5):
    """Within the rounding of a float32 loop, relative to the largest value (both sides round; see the module)."""
    assert theirs.isfinite().all() and theirs.abs().max() > 0.1
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().double()
    assert error <= tolerance, f"{float(error):.2e}"


PREDICTIONS = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(prediction, eta):
    peer = diffusers.DDIMScheduler(**VP, prediction_type=prediction, clip_sample=False, timestep_spacing="leading")
    peer.set_timesteps(20)
    ours = Sampler("ddim", schedule_of(peer), 20, spacing="leading", prediction=prediction, eta=eta)
    np.testing.assert_array_equal(ours.timesteps, peer.timesteps)
    got = ours(denoiser_of(peer), start(), generator=generator())
    close(got, run_peer(peer, start(), dict(eta=eta, generator=generator())))


def test_ddim_clipped_at_an_irregular_subsequence():
    times = [951, 800, 411, 390, 77, 3]
    x = ours = start()
    peer = diffusers.DDIMScheduler(**VP, clip_sample=True)
    network = denoiser_of(peer)
    # The peer takes its steps from a fixed stride, so the sub-sequence is written out from its own alphas.
    bar = peer.alphas_cumprod.double()
    theirs = x.double()
    for t, u in zip(times, [*times[1:], None]):
        a, a1 = bar[t].sqrt(), bar[u].sqrt() if u is not None else torch.tensor(1.0).double()
        s, s1 = (1 - a**2).sqrt(), (1 - a1**2).sqrt()
        x0 = ((theirs - s * network(theirs.float(), torch.full((2,), t)).double()) / a).clamp(-1, 1)
        theirs = a1 * x0 + s1 * (theirs - a * x0) / s
    ours = Sampler("ddim", schedule_of(peer), timesteps=times)(network, x, clip=1.0)
    close(ours, theirs)
    peer.set_timesteps(20)
    regular = Sampler("ddim", schedule_of(peer), 20, spacing="leading")(network, x, clip=1.0)
    close(regular, run_peer(peer, x, dict(use_clipped_model_output=True)))


@pytest.mark.parametrize(
    "variance, steps", [("fixed_small", 25), ("fixed_large", 25), ("learned_range", 25), ("learned_range", 1000)]
)
def test_ddpm(variance, steps):
    learned = variance == "learned_range"
    peer = diffusers.DDPMScheduler(variance_type=variance, clip_sample=True)
    peer.set_timesteps(steps)

    network = denoiser_of(peer)

    def both(x, t):
        return torch.cat([network(x, t), torch.sin(3 * x)], dim=1) if learned else network(x, t)

    x, noise = start(), generator()
    for t in peer.timesteps:
        x = peer.step(both(x, t.expand(2)), t, x, generator=noise, return_dict=False)[0]
    ours = Sampler("ddpm", schedule_of(peer), steps, spacing="leading", variance=variance)
    close(ours(both, start(), generator=generator(), clip=1.0), x, 2e-4 if steps == 1000 else 2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name, peer_class", [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_euler_and_heun(name, peer_class, spacing, prediction):
    peer = getattr(diffusers, peer_class)(**VP, prediction_type=prediction, timestep_spacing=spacing)
    peer.set_timesteps(12)
    # Heun's peer lists its inner nodes twice.
    stride = 2 if name == "heun" else 1
    levels, times = [*peer.sigmas[:-1:stride], 0.0], peer.timesteps[::stride]
    ours = Sampler(name, trajectory_of(peer, levels, times), prediction=prediction)
    x = start()
    theirs = run_peer(peer, x)
    # The peer's state is x / alpha; its x_T has standard deviation sigma / alpha.
    close(ours(denoiser_of(peer), x * peer.init_noise_sigma * ours.alphas[0]), theirs)


@pytest.mark.parametrize(
    "kind, option",
    [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas"), ("beta", "use_beta_sigmas")],
)
def test_spacings(kind, option):
    peer = diffusers.EulerDiscreteScheduler(**VP, **{option: True})
    peer.set_timesteps(10)
    ours = Sampler("euler", schedule_of(peer), 10, spacing=kind)
    np.testing.assert_allclose(ours.sigmas / ours.alphas, peer.sigmas, rtol=2e-6)
    np.testing.assert_allclose(ours.timesteps, peer.timesteps, rtol=1e-4, atol=1e-3)
    close(ours(denoiser_of(peer), start() * peer.init_noise_sigma * ours.alphas[0]), run_peer(peer, start()), 1e-4)


def test_euler_ancestral():
    peer = diffusers.EulerAncestralDiscreteScheduler(**VP, timestep_spacing="trailing")
    peer.set_timesteps(12)
    ours = Sampler("euler_ancestral", schedule_of(peer), 12)
    theirs = run_peer(peer, start(), dict(generator=generator()))
    close(ours(denoiser_of(peer), start() * peer.init_noise_sigma * ours.alphas[0], generator=generator()), theirs)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [9, 20])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize(
    "name, order, algorithm",
    [
        ("dpmpp_2m", 2, "dpmsolver++"),
        ("dpmpp_3m", 3, "dpmsolver++"),
        ("dpmpp_2m_sde", 2, "sde-dpmsolver++"),
    ],
)
def test_dpm_solver_multistep(name, order, algorithm, solver, steps, prediction):
    peer = diffusers.DPMSolverMultistepScheduler(
        **VP, prediction_type=prediction, solver_order=order, algorithm_type=algorithm, solver_type=solver
    )
    peer.set_timesteps(steps)
    ours = Sampler(name, trajectory_of(peer, peer.sigmas, peer.timesteps), prediction=prediction, solver=solver)
    theirs = run_peer(peer, start(), dict(generator=generator()))
    close(ours(denoiser_of(peer), start(), generator=generator()), theirs, 5e-5)


def test_dpm_solver_singlestep():
    peer = diffusers.DPMSolverSinglestepScheduler(
        **VP,
        solver_order=2,
        use_exponential_sigmas=True,
        lower_order_final=True,
        final_sigmas_type="sigma_min",
        algorithm_type="dpmsolver++",
    )
    peer.set_timesteps(11)
    # The peer spends two nodes on each step: orders 1, 2, 1, 2, .. The odd ones lie half-way in lambda on this spacing.
    pairs = (len(peer.timesteps) - 1) // 2 * 2
    peer_x, network = start(), denoiser_of(peer)
    for t in peer.timesteps[:pairs]:
        peer_x = peer.step(network(peer_x, t.expand(2)), t, peer_x, return_dict=False)[0]
    levels, times = peer.sigmas[: pairs + 1 : 2], peer.timesteps[: pairs + 1 : 2]
    ours = Sampler("dpmpp_2s", trajectory_of(peer, levels, times[:-1]), prediction="epsilon")

    def at_peer_times(x, t):
        # The peer rounds its times; ours are the schedule's.
        return network(x, t.round())

    close(ours(at_peer_times, start()), peer_x, 5e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, dict(disable_corrector=[0, 4]), dict(lower_order_final=False)])
def test_unipc(order, variant, prediction, options):
    peer = diffusers.UniPCMultistepScheduler(
        **VP,
        solver_order=order,
        solver_type=variant,
        prediction_type=prediction,
        final_sigmas_type="sigma_min" if variant == "bh1" or "lower_order_final" in options else "zero",
        **options,
    )
    peer.set_timesteps(10)
    theirs = run_peer(peer, start())
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    ours = Sampler(
        "unipc",
        trajectory_of(peer, peer.sigmas, peer.timesteps),
        prediction=prediction,
        order=order,
        variant=variant,
        **options,
    )
    close(ours(denoiser_of(peer), start()), theirs, 5e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_lms(prediction):
    peer = diffusers.LMSDiscreteScheduler(**VP, prediction_type=prediction)
    peer.set_timesteps(10)
    ours = Sampler("lms", trajectory_of(peer, peer.sigmas, peer.timesteps), prediction=prediction)
    theirs = run_peer(peer, start())
    # The peer integrates numerically, to a relative 1e-4.
    close(ours(denoiser_of(peer), start() * peer.init_noise_sigma * ours.alphas[0]), theirs, 2e-4)


@pytest.mark.parametrize("steps", [10, 20])
def test_pndm(steps):
    # Only for epsilon: with v the peer extrapolates v, not the noise.
    peer = diffusers.PNDMScheduler(**VP, skip_prk_steps=True, set_alpha_to_one=True)
    peer.set_timesteps(steps)
    ours = Sampler("pndm", schedule_of(peer), steps, spacing="leading")
    close(ours(denoiser_of(peer), start()), run_peer(peer, start()), 5e-5)


def test_pndm_with_the_papers_warm_up():
    peer = diffusers.PNDMScheduler(**VP, skip_prk_steps=False, set_alpha_to_one=True)
    peer.set_timesteps(10)
    ours = Sampler("pndm", schedule_of(peer), 10, spacing="leading", warmup="runge_kutta")
    close(ours(denoiser_of(peer), start()), run_peer(peer, start()), 5e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [10, 20])
def test_deis(order, steps):
    peer = diffusers.DEISMultistepScheduler(**VP, solver_order=order)
    peer.set_timesteps(steps)
    ours = Sampler("deis", trajectory_of(peer, peer.sigmas, peer.timesteps), order=order)
    # The peer ends at its least noisy level, and ours must stay in the peer's coordinates there: both are x itself.
    close(ours(denoiser_of(peer), start()), run_peer(peer, start()), 1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lcm(prediction):
    peer = diffusers.LCMScheduler(prediction_type=prediction)
    peer.set_timesteps(4)
    ours = Sampler("lcm", schedule_of(peer), 4, spacing="consistency", prediction=prediction)
    np.testing.assert_array_equal(ours.timesteps, peer.timesteps)
    theirs = run_peer(peer, start(), dict(generator=generator()))
    close(ours(denoiser_of(peer), start(), generator=generator()), theirs)


def test_lcm_near_the_boundary():
    peer = diffusers.LCMScheduler(timestep_scaling=0.3)
    peer.set_timesteps(timesteps=[999, 339, 19, 1], original_inference_steps=1000)
    ours = Sampler("lcm", schedule_of(peer), timesteps=[999, 339, 19, 1], timestep_scaling=0.3)
    theirs = run_peer(peer, start(), dict(generator=generator()))
    close(ours(denoiser_of(peer), start(), generator=generator()), theirs)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd(eta):
    peer = diffusers.TCDScheduler()
    peer.set_timesteps(4)
    ours = Sampler("tcd", schedule_of(peer), 4, spacing="consistency", final="sigma_min", eta=eta)
    theirs = run_peer(peer, start(), dict(generator=generator(), eta=eta))
    close(ours(denoiser_of(peer), start(), generator=generator()), theirs)


@pytest.mark.parametrize("churn", [0.0, 6.0])
def test_edm_euler(churn):
    peer = diffusers.EDMEulerScheduler()
    peer.set_timesteps(10)
    options = dict(s_churn=churn, s_noise=1.1)
    ours = Sampler("euler", noise_schedule("edm"), 10, prediction="edm", s_min=0.05, s_max=50.0, **options)
    np.testing.assert_allclose(ours.sigmas, peer.sigmas, rtol=1e-6)

    # The peer adds its churn after the model has seen the state, ours before, as published: so the model must not look
    # at the state or the time for the two to agree. Without churn it may.
    def network(x, t):
        return torch.linspace(-1, 1, x.numel()).view(x.shape) if churn else model(x, 100 * t)

    theirs, noise = start() * ours.sigmas[0], generator()
    for t in peer.timesteps:
        seen = peer.scale_model_input(theirs, t)
        step = dict(s_churn=churn, s_tmin=0.05, s_tmax=50.0, s_noise=1.1, generator=noise, return_dict=False)
        theirs = peer.step(network(seen, t.expand(2)), t, theirs, **step)[0]
    close(ours(network, start() * ours.sigmas[0], generator=generator()), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=np.linspace(1.0, 0.1, 10))
    schedule = noise_schedule("flow", shift=shift)
    ours = Sampler("flow_euler", schedule, 10, prediction="flow_prediction")
    np.testing.assert_allclose(ours.sigmas, peer.sigmas, rtol=1e-6)
    theirs = start()
    for t in peer.timesteps:
        theirs = peer.step(model(theirs, t.expand(2)), t, theirs, return_dict=False)[0]
    close(ours(lambda x, t: model(x, 1000 * t), start()), theirs)


def test_zero_terminal_snr():
    peer = diffusers.DDIMScheduler(
        **VP,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    peer.set_timesteps(10)
    schedule = noise_schedule("scaled_linear", zero_terminal_snr=True)
    ours = Sampler("ddim", schedule, 10, prediction="v_prediction")
    assert ours.alphas[0] == 0 and ours.sigmas[0] == 1
    np.testing.assert_allclose(schedule.alphas**2, peer.alphas_cumprod, rtol=1e-3, atol=1e-7)
    network = denoiser(schedule, "v_prediction")
    theirs = start()
    for t in peer.timesteps:
        theirs = peer.step(network(theirs, t.expand(2)), t, theirs, return_dict=False)[0]
    close(ours(network, start()), theirs, 2e-4)
