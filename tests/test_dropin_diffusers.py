"""Whole loops of the fused schedulers against those of diffusers, over configurations that Hypothesis chooses."""

import random
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("genfast.dropin.diffusers", exc_type=ImportError)

from diffusers.utils import logging  # noqa: E402
from diffusers_peer import Case, compare, model, run  # noqa: E402

import genfast.dropin.diffusers as ours  # noqa: E402
from genfast.dropin.diffusers.base import Fused, peer_class  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("linspace", "leading", "trailing")
LIMITS = dict(
    clip_sample=(True, False),
    clip_sample_range=(1.0, 1.7),
    thresholding=(False, False, True),
    dynamic_thresholding_ratio=(0.995, 0.8),
    sample_max_value=(1.0, 2.5),
)
VP = dict(
    prediction_type=PREDICTIONS,
    timestep_spacing=SPACINGS,
    steps_offset=(0, 1),
    beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2"),
    rescale_betas_zero_snr=(False, False, True),
)
SIGMAS = dict(prediction_type=PREDICTIONS, timestep_spacing=SPACINGS, beta_schedule=("linear", "scaled_linear"))
KARRAS = dict(SIGMAS, schedule=(None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"))
DPM = dict(
    KARRAS,
    algorithm_type=("dpmsolver++", "dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
    solver_order=(1, 2, 3),
    solver_type=("midpoint", "heun"),
    lower_order_final=(True, False),
    thresholding=(False, False, True),
    sample_max_value=(2.0,),
    final_sigmas_type=("zero", "sigma_min"),
)
EDM = dict(sigma_schedule=("karras", "exponential"), final_sigmas_type=("zero", "sigma_min"))
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
DRAW = ({"generator": 3}, {"generator": [3, 4]}, {})
CHURN = ({}, {}, {"s_churn": 4.0, "s_noise": 0.9, "s_tmin": 0.05, "s_tmax": 60.0, "generator": 3})
ETA = (
    {},
    {"eta": 0.6, "generator": 3},
    {"eta": 1.0, "use_clipped_model_output": True, "generator": [3, 4]},
    {"use_clipped_model_output": True},
)
# name: (values of every option of the configuration, options of step)
SCHEDULERS = {
    "DDIM": (VP | LIMITS | {"set_alpha_to_one": (True, False)}, ETA),
    "DDIMParallel": (VP | LIMITS | {"set_alpha_to_one": (True, False)}, ETA),
    "DDIMInverse": (
        VP | {"clip_sample": (True, False), "timestep_spacing": SPACINGS[1:], "set_alpha_to_one": (True, False)},
        ({},),
    ),
    "DDPM": (VP | LIMITS | {"variance_type": VARIANCES}, DRAW),
    "DDPMParallel": (VP | LIMITS | {"variance_type": VARIANCES}, DRAW),
    "LCM": (VP | LIMITS | {"timestep_spacing": ("leading",), "set_alpha_to_one": (True, False)}, DRAW),
    "TCD": (
        VP | LIMITS | {"timestep_spacing": ("leading",)},
        ({"generator": 3}, {"eta": 0.0}, {"eta": 1.0, "generator": [3, 4]}),
    ),
    "EulerDiscrete": (
        KARRAS
        | {
            "interpolation_type": ("linear", "log_linear"),
            "timestep_type": ("discrete", "continuous"),
            "rescale_betas_zero_snr": (False, True),
            "final_sigmas_type": ("zero", "sigma_min"),
        },
        CHURN,
    ),
    "EulerAncestralDiscrete": (SIGMAS | {"rescale_betas_zero_snr": (False, True)}, DRAW),
    "HeunDiscrete": (KARRAS | {"clip_sample": (True, False), "clip_sample_range": (1.0, 3.0)}, ({},)),
    "KDPM2Discrete": (KARRAS, ({},)),
    "KDPM2AncestralDiscrete": (KARRAS, DRAW),
    "EDMEuler": (EDM | {"prediction_type": PREDICTIONS[::2]}, CHURN),
    "FlowMatchEulerDiscrete": (
        dict(
            shift=(1.0, 3.0),
            schedule=(None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
            invert_sigmas=(False, False, True),
            shift_terminal=(None, 0.1),
            stochastic_sampling=(False, True),
        ),
        DRAW,
    ),
    "FlowMatchHeunDiscrete": (dict(shift=(1.0, 3.0)), CHURN),
    "CMStochasticIterative": (dict(clip_denoised=(True, False), s_noise=(1.0, 0.9)), DRAW),
    "UnCLIP": (
        dict(
            variance_type=("fixed_small_log", "learned_range"),
            clip_sample=(True, False),
            clip_sample_range=(1.0, 5.0),
            prediction_type=PREDICTIONS[:2],
        ),
        DRAW,
    ),
    "DPMSolverMultistep": (DPM | {"euler_at_final": (False, True)}, DRAW),
    "DPMSolverMultistepInverse": (DPM | {"euler_at_final": (False, True), "final_sigmas_type": (None,)}, DRAW),
    "DPMSolverSinglestep": (DPM | {"algorithm_type": DPM["algorithm_type"][:4], "timestep_spacing": (None,)}, DRAW),
    "DEISMultistep": (DPM | dict.fromkeys(("algorithm_type", "solver_type", "final_sigmas_type"), (None,)), ({},)),
    "EDMDPMSolverMultistep": (
        EDM
        | {k: DPM[k] for k in ("solver_order", "solver_type", "lower_order_final", "thresholding", "sample_max_value")}
        | {"prediction_type": PREDICTIONS[::2], "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
        DRAW,
    ),
}
ALL = [name + "Scheduler" for name in SCHEDULERS]


def drawn_case(data, name):
    """A case, or None where the peer itself refuses it."""
    options, calls = SCHEDULERS[name.removesuffix("Scheduler")]
    config = {key: data.draw(st.sampled_from(values), key) for key, values in options.items()}
    schedule = config.pop("schedule", None)
    if schedule:
        config[schedule] = True
    config = {key: value for key, value in config.items() if value is not None}
    case = Case(
        name,
        config,
        {"num_inference_steps": data.draw(st.sampled_from((1, 2, 3, 6, 11, 16)), "steps")},
        dict(data.draw(st.sampled_from(calls), "options")),
        shape=data.draw(st.sampled_from(((2, 3, 5, 4), (2, 4, 1, 7), (2, 3, 4))), "shape"),
        dtype=data.draw(
            st.sampled_from((torch.float32,) * 3 + (torch.float64, torch.bfloat16, torch.float16)), "dtype"
        ),
        output_dtype=data.draw(st.sampled_from((None, None, torch.bfloat16, torch.float32)), "output dtype"),
        channels=2 if str(config.get("variance_type", "")).startswith("learned") else 1,
        channels_last=data.draw(st.booleans(), "channels last"),
        begin=data.draw(st.sampled_from((None, None, 1)), "begin"),
    )
    if len(case.shape) != 4:
        case.channels_last = False
    try:
        run(case, diffusers)
    except Exception as refusal:
        with pytest.raises(type(refusal)):
            run(case, ours)
        return None
    return case


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=22, deadline=None, derandomize=True)
@given(data=st.data())
def test_loops(name, data):
    case = drawn_case(data, name)
    if case is not None:
        # Few steps are long steps, which multiply a rounding by the ratio of their levels.
        compare(case, ulps=64 if case.timesteps["num_inference_steps"] > 3 else 2048)


# PNDM's step is the peer's: it chooses between two that are not.
FUSED = [c for _, c in ours.replacements() if issubclass(c, Fused)]
STEPPING = [c for c in FUSED if hasattr(c, "step") and c.__name__ != "PNDMScheduler"]


@pytest.mark.parametrize("cls", STEPPING, ids=lambda c: c.__name__)
def test_plain_loops_never_fall_to_the_peer(cls):
    peer = peer_class(cls)
    advance = None
    if cls.__name__ == "RePaintScheduler":
        advance = repaint
    case = Case(cls.__name__, {}, {"num_inference_steps": 6}, advance=advance)
    with mock.patch.object(peer, "step", side_effect=AssertionError("fell to the peer")):
        run(case, ours)


def repaint(scheduler, output, t, x, options):
    r = random.Random(0)
    draw = torch.Generator().manual_seed(r.randrange(100))
    image = torch.rand(x.shape, generator=draw).to(x.dtype)
    mask = (torch.rand(x.shape, generator=draw) > 0.5).to(x.dtype)
    result = scheduler.step(output, t, x, image, mask, return_dict=False, **options)
    if int(t) % 300 == 0:
        return scheduler.undo_step(result[0], t, **options), result[1]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [{}, {"eta": 0.5}, {"eta": 0.5, "clip_sample": False}])
def test_repaint(config, dtype):
    timesteps = {"num_inference_steps": 10, "jump_length": 2, "jump_n_sample": 2}
    compare(Case("RePaintScheduler", config, timesteps, {"generator": 3}, dtype=dtype, advance=repaint), ulps=64)


class WithSigmas(Case):
    def make(self, module):
        scheduler = super().make(module)
        scheduler.set_sigmas(self.timesteps["num_inference_steps"])
        return scheduler


def corrected(scheduler, output, t, x, options):
    y = scheduler.step_correct(output, x, **options).prev_sample
    return scheduler.step_pred(output, t, y, return_dict=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_score_sde_ve(dtype):
    case = WithSigmas(
        "ScoreSdeVeScheduler",
        {"sigma_max": 5.0},
        {"num_inference_steps": 9},
        {"generator": 3},
        dtype=dtype,
        advance=corrected,
    )
    compare(case, ulps=256)


def test_score_sde_ve_with_a_timestep_per_sample():
    x, output, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.9, 0.4, 0.1])
    results = []
    for module in (diffusers, ours):
        scheduler = module.ScoreSdeVeScheduler()
        scheduler.set_timesteps(10)
        scheduler.set_sigmas(10)
        results.append(scheduler.step_pred(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "DDPMParallelScheduler"])
@pytest.mark.parametrize("config", [{}, {"clip_sample": False}, {"thresholding": True}, {"prediction_type": "sample"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_batch_step_no_noise(name, config, dtype):
    x, output = torch.randn(4, 3, 5, 5).to(dtype), torch.randn(4, 3, 5, 5).to(dtype)
    results = []
    for module in (diffusers, ours):
        scheduler = getattr(module, name)(**config)
        scheduler.set_timesteps(10)
        results.append(scheduler.batch_step_no_noise(output, torch.tensor([900, 500, 0, 37]), x))
    assert results[0].dtype == results[1].dtype
    tolerance = 2e-2 if dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
def test_ddpm_without_a_schedule(name):
    """As in training code: every timestep, and no call of set_timesteps."""
    theirs, mine = getattr(diffusers, name)(), getattr(ours, name)()
    x = y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (999, 500, 1, 0):
        x = theirs.step(model(x, t), t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        y = mine.step(model(y, t), t, y, generator=torch.Generator().manual_seed(t)).prev_sample
    torch.testing.assert_close(y, x, rtol=0, atol=1e-4)
    mine.set_timesteps(timesteps=[700, 300, 5])
    theirs.set_timesteps(timesteps=[700, 300, 5])
    for t in (700, 300, 5):
        assert mine.previous_timestep(t) == theirs.previous_timestep(t)
    with pytest.raises(IndexError):
        mine.step(x, 301, x)


def test_unclip_with_a_previous_timestep():
    def advance(scheduler, output, t, x, options):
        values = scheduler.timesteps.tolist()
        i = values.index(int(t))
        previous = None if i + 1 == len(values) else scheduler.timesteps[i + 1]
        return scheduler.step(output, t, x, prev_timestep=previous, return_dict=False, **options)

    for kind in ("fixed_small_log", "learned_range"):
        config = {"variance_type": kind}
        channels = 2 if kind == "learned_range" else 1
        compare(
            Case(
                "UnCLIPScheduler",
                config,
                {"num_inference_steps": 9},
                {"generator": 3},
                channels=channels,
                advance=advance,
            )
        )


def test_a_schedule_with_a_plan_for_every_token():
    """Flow matching with timesteps per token runs the peer's code."""
    x, output = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    per_token = torch.full((2, 6), 500.0)
    results = []
    for module in (diffusers, ours):
        scheduler = module.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(8)
        step = scheduler.step(output, scheduler.timesteps[2], x, per_token_timesteps=per_token)
        results.append(step.prev_sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_whole_numbers_are_refused_as_by_the_peer(name):
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(5)
    x = torch.randn(1, 2, 3)
    for t in (3, torch.tensor(3)):
        with pytest.raises(ValueError, match="Passing integer indices"):
            scheduler.step(x, t, x)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"]
)
def test_step_before_set_timesteps(name):
    x = torch.randn(1, 2, 3, 3)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        getattr(ours, name)().step(x, 999, x)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_state_between_the_two_halves_of_a_step(name):
    """What the first call leaves behind is the peer's, and either class can take the second."""
    x, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    theirs, mine = getattr(diffusers, name)(), getattr(ours, name)()
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
        scheduler.step(output, scheduler.timesteps[0], x)
    assert mine.state_in_first_order is theirs.state_in_first_order is False
    for attribute in ("sample", "dt", "prev_derivative"):
        if hasattr(theirs, attribute):
            torch.testing.assert_close(getattr(mine, attribute), getattr(theirs, attribute), rtol=1e-4, atol=1e-4)
    t = mine.timesteps[1]
    by_peer = peer_class(type(mine)).step(mine, 2 * output, t, x + output).prev_sample
    exact = theirs.step(2 * output, t, x + output).prev_sample
    torch.testing.assert_close(by_peer, exact, rtol=1e-4, atol=1e-4)
    assert mine.state_in_first_order and mine.step_index == theirs.step_index == 2


UNSEEDED = ("FlowMatchEulerDiscrete", "DPMSolverMultistepInverse")  # the SDE forms have no inverse
SEEDED = [n for n, (_, calls) in SCHEDULERS.items() if calls is DRAW and n not in UNSEEDED]


@pytest.mark.parametrize("name", SEEDED)
def test_noise_drawn_in_the_kernel(name):
    config = {"algorithm_type": "sde-dpmsolver++"} if "DPMSolver" in name else {}

    def loop(seed):
        scheduler = getattr(ours, name + "Scheduler")(**config)
        scheduler.set_timesteps(6)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        state = torch.get_rng_state()
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(model(seen, t), t, x, seed=seed).prev_sample
        assert torch.equal(state, torch.get_rng_state())
        return x

    first = loop(1)
    assert first.isfinite().all() and torch.equal(first, loop(1)) and not torch.equal(first, loop(2))
