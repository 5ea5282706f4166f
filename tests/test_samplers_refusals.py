"""What samplers refuse, and the sentence they refuse it with."""

import pytest
import torch

from genfast.samplers import Sampler, Trajectory, noise_schedule, reflow_pairs

ZERO_SNR = noise_schedule("scaled_linear", zero_terminal_snr=True)
REFUSED = [
    (("nonsense",), {}, "sampler must be one of ddpm, ddim"),
    (("ddim", "nonsense", 5), {}, "schedule must be one of"),
    (("ddim", "linear", 5), dict(prediction="noise"), "prediction must be one of"),
    (("ddim", "linear", 5), dict(variance="learned_range"), "'ddim' has no option 'variance'; its options are: eta"),
    (("heun", "edm", 5), dict(eta=1.0), "'heun' has no option 'eta'"),
    (("ddpm", "linear", 5), dict(variance="learned"), "variance must be one of fixed_small"),
    (("ddim", "linear", 5), dict(eta=1.5), "eta = 1.5 asks for more noise"),
    (("ddim", ZERO_SNR, 5), {}, "cannot give x0 where alpha is 0"),
    (("lms", ZERO_SNR, 5), dict(prediction="v_prediction"), "'lms' integrates in the noise level sigma / alpha"),
    (("heun", "flow", 5), dict(prediction="flow_prediction"), "infinite where alpha is 0"),
    (("euler", "flow", 5), dict(prediction="flow_prediction", s_churn=9.0), "s_churn raises sigma / alpha"),
    (("lcm", "flow", 5), dict(prediction="flow_prediction"), "pass boundary=False"),
    (("tcd", "linear", 5), dict(eta=2.0), "eta must be in"),
    (("unipc", "linear", 5), dict(order=4), "order must be an int from 1 to 3"),
    (("unipc", "linear", 5), dict(variant="bh3"), "variant must be"),
    (("lms", "linear", 5), dict(order=0), "order must be an int from 1 to 4"),
    (("pndm", "linear", 5), dict(warmup="none"), "warmup must be"),
    (("dpmpp_2m", "linear", 5), dict(solver="euler"), "solver must be"),
    (("dpmpp_2s", "linear", 5), dict(r=1.0), "r must be in"),
    (("dpmpp_2m_sde", "linear", 5), dict(eta=-1.0), "eta must not be negative"),
    (("ddim", "linear"), {}, "steps must be a positive int"),
    (("ddim", "linear", 0), {}, "steps must be a positive int"),
    (("ddim", "linear", 2000), {}, "only 1000 timesteps"),
    (("ddim", "linear", 5), dict(spacing="even"), "spacing must be one of"),
    (("ddim", "linear", 5), dict(spacing="karras", spacing_options=dict(base=2)), "no option 'base'; it has rho"),
    (("ddim", "linear", 5), dict(spacing="karras", spacing_options=dict(sigma_max=0.001)), "sigma_min < sigma_max"),
    (("ddim", "vp", 5), dict(spacing="leading", spacing_options=dict(steps_offset=1)), "time is continuous"),
    (("ddim", "linear", 60), dict(spacing="consistency"), "at most original_steps = 50"),
    (("ddim", "linear", 5), dict(final="one"), "final must be"),
    (("ddim", "linear", 5), dict(timesteps=[3, 2]), "steps is 5, but 2"),
    (("ddim", "linear"), dict(timesteps=[3, 5]), "must fall from node to node"),
    (("ddim", "linear"), dict(timesteps=[3, 2], sigmas=[1.0]), "timesteps and sigmas exclude"),
    (("ddim", "linear"), dict(timesteps=[3, 2], spacing="karras"), "no meaning beside timesteps"),
    (("ddim", "linear"), dict(timesteps=[1003, 2]), "timesteps must lie in"),
    (("ddim", Trajectory([0.1, 1], [1, 0], [5, 0]), 5), {}, "steps is given beside a trajectory"),
    (("heun", Trajectory([0.1, 1], [1, 0], [5, 0])), dict(s_churn=1.0), "give the trajectory its schedule"),
    (("ode_rk45", "vp", 5), {}, "chooses its own steps: leave steps out"),
    (("ddim", "linear", 5), dict(corrector="newton"), "corrector must be 'langevin'"),
    (("dpmpp_2m", "linear", 5), dict(corrector="langevin"), "keeps no history"),
    (("ddim", "linear", 5), dict(snr=0.1), "belong to corrector"),
    (("ddim", "linear", 5), dict(corrector="langevin", snr=0.0), "snr positive"),
]


@pytest.mark.parametrize("arguments, options, message", REFUSED)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError) as caught:
        Sampler(*arguments, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: noise_schedule("linear", beta_mid=1), "has no option 'beta_mid'"),
        (lambda: noise_schedule("betas"), "needs the array betas="),
        (lambda: noise_schedule("alphas_cumprod", alphas_cumprod=[0.5, 0.9]), "decreasing numbers"),
        (lambda: noise_schedule("vp", beta_min=3.0, beta_max=1.0), "beta_min < beta_max"),
        (lambda: noise_schedule("edm", sigma_min=0.0), "sigma_min < sigma_max"),
        (lambda: noise_schedule("flow", shift=-1.0), "shift must be positive"),
        (lambda: Trajectory([1.0], [1.0], [1.0]), "at least 2"),
        (lambda: Trajectory([1.0, 1.0], [1.0, float("nan")], [1.0, 0.0]), "finite"),
        (lambda: next(reflow_pairs(Sampler("ddpm", "linear", 3), None, (1, 2), 1)), "draws noise at its steps"),
    ],
)
def test_refusals_of_parts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refusals_of_a_call():
    sampler, x = Sampler("ddim", "linear", 3, eta=0.5), torch.zeros(2, 3)

    def model(x, t):
        return x

    for error, message, options in [
        (ValueError, "seed and generator exclude", dict(seed=1, generator=torch.Generator())),
        (ValueError, "offset is given without seed", dict(offset=1)),
        (ValueError, "uncond is given without guidance", dict(uncond=model)),
        (ValueError, "guidance_rescale is given without guidance", dict(guidance_rescale=0.5)),
        (TypeError, "model must return a pair", dict(guidance=2.0)),
        (ValueError, "clip and threshold exclude", dict(clip=1.0, threshold=(0.9, 1.0))),
    ]:
        with pytest.raises(error, match=message):
            sampler(model, x, **options)
    with pytest.raises(ValueError, match=r"model returned \[2, 4\]; expected a tensor of x's shape \[2, 3\]"):
        sampler(lambda x, t: torch.zeros(2, 4), x)
    with pytest.raises(ValueError, match="x must be a floating tensor"):
        sampler(model, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="rtol and atol must be positive"):
        Sampler("ode_rk45", "vp", rtol=0.0)(model, x)
    with pytest.raises(TypeError, match="x must be float32 or float64"):
        Sampler("ode_rk45", "vp")(model, x.half())
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampler("ode_rk45", "vp")(lambda x, t: x * float("nan"), x)
