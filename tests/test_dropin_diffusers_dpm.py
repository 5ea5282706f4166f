"""DPM-Solver (multistep, inverse, singlestep, EDM) and DEIS: our classes against those of diffusers, whole loops."""

import copy
import pickle
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genfast.dropin import patching

diffusers = pytest.importorskip("diffusers")
try:
    patching.PEERS["diffusers"].check()
except ImportError as unsupported:
    pytest.skip(str(unsupported), allow_module_level=True)
pytest.importorskip("scipy")

from diffusers_peer import Case, agree, compare, model, no_less_exact, run  # noqa: E402

import genfast.dropin.diffusers as ours  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dpmsolver.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, None)] * 5 + [(F64, None), (BF16, None), (F16, None), (F32, BF16), (BF16, F32), (F16, F32), (F32, F16)]
SHAPES = [(2, 3, 5, 4), (2, 3, 5, 4), (1, 4, 8, 8), (3, 2, 7), (1, 3, 2, 4, 3)]
SIGMAS = [
    {},
    {},
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0},
]
PREDICTIONS = ["epsilon", "epsilon", "sample", "v_prediction", "flow_prediction"]


@st.composite
def cases(draw, name, config, most=16, generators=False):
    """A case of a class; ``config`` draws a configuration."""
    config = draw(config)
    dtype, output_dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from(SHAPES))
    channels = 1
    if config.get("variance_type") is not None:
        shape, channels = (2, 3, 5, 4), 2
    steps = draw(st.integers(1, most))
    if config.pop("timestep_list", False):
        count = min(steps, 9)
        timesteps = {"timesteps": sorted(draw(st.sets(st.integers(0, 999), min_size=count, max_size=count)))[::-1]}
        steps = count
    else:
        timesteps = {"num_inference_steps": steps}
    options = {}
    if generators:
        options = draw(st.sampled_from([{}, {"generator": 3}, {"generator": list(range(shape[0]))}]))
    return Case(
        name,
        config,
        timesteps,
        options,
        shape,
        dtype,
        output_dtype,
        channels,
        channels_last=len(shape) == 4 and draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        begin=draw(st.sampled_from([None, None, steps // 2])),
    )


def configs(sigmas=SIGMAS, **options):
    """A strategy for configurations: one of the schedules, with a choice of every option."""
    fixed = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in options.items()})
    return st.builds(lambda schedule, rest: {**rest, **schedule}, st.sampled_from(sigmas), fixed)


DIFFUSION = dict(
    prediction_type=PREDICTIONS,
    beta_schedule=["linear", "scaled_linear", "squaredcos_cap_v2"],
    solver_order=[1, 2, 3],
    thresholding=[False, False, True],
    sample_max_value=[1.0, 1.5],
    dynamic_thresholding_ratio=[0.995, 0.8],
    lower_order_final=[True, False],
)
MULTISTEP = dict(
    **DIFFUSION,
    solver_type=["midpoint", "heun"],
    euler_at_final=[False, True],
    timestep_spacing=["linspace", "leading", "trailing"],
    steps_offset=[0, 1],
    lambda_min_clipped=[-float("inf"), -5.1],
    variance_type=[None, None, None, "learned", "learned_range"],
)


def check(case):
    """Whole loops where the formulas are good to float32, step by step where they amplify roundings."""
    config = case.config
    steep = (
        not config.get("algorithm_type", "deis").endswith("++")
        or "Inverse" in case.name
        or config["solver_order"] > 2
        or config.get("rescale_betas_zero_snr")
        or config.get("beta_schedule") == "squaredcos_cap_v2"
    )
    if not steep:
        agree(case, 64)
    elif case.dtype is F32 and case.output_dtype is None:
        no_less_exact(case)
    elif case.dtype is F64:
        agree(case, 1e6)  # still far from float32
    else:
        agree(case, 256)


# --- DPM-Solver, multistep -------------------------------------------------------------------------------------------

PLUS = dict(
    algorithm_type=["dpmsolver++", "dpmsolver++", "sde-dpmsolver++"],
    final_sigmas_type=["zero", "zero", "sigma_min"],
    rescale_betas_zero_snr=[False, False, False, True],
    timestep_list=[False, False, True],
)
NOISE = dict(algorithm_type=["dpmsolver", "sde-dpmsolver"], final_sigmas_type=["sigma_min"] * 5 + ["zero"])
LU = [*SIGMAS, {"use_lu_lambdas": True}]


@settings(max_examples=90, deadline=None, derandomize=True)
@given(cases("DPMSolverMultistepScheduler", configs(LU, **MULTISTEP, **PLUS), generators=True))
def test_multistep(case):
    if case.config["algorithm_type"] == "dpmsolver++":
        case.options = {}
    check(case)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases("DPMSolverMultistepScheduler", configs(LU, **MULTISTEP, **NOISE), generators=True))
def test_multistep_of_the_noise(case):
    check(case)


INVERSE = dict(algorithm_type=["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])


@settings(max_examples=70, deadline=None, derandomize=True)
@given(cases("DPMSolverMultistepInverseScheduler", configs(**MULTISTEP, **INVERSE), generators=True))
def test_inverse(case):
    check(case)


# --- DPM-Solver, singlestep ------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    cases(
        "DPMSolverSinglestepScheduler",
        configs(
            **DIFFUSION,
            algorithm_type=["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver"],
            final_sigmas_type=["zero", "sigma_min"],
            solver_type=["midpoint", "heun"],
            lambda_min_clipped=[-float("inf"), -5.1],
            variance_type=[None, None, None, "learned", "learned_range"],
            timestep_list=[False, False, True],
        ),
        generators=True,
    )
)
def test_singlestep(case):
    check(case)


# --- DEIS ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cases(
        "DEISMultistepScheduler",
        configs(**DIFFUSION, timestep_spacing=["linspace", "leading", "trailing"], steps_offset=[0, 1]),
    )
)
def test_deis(case):
    check(case)


# --- DPM-Solver on EDM's network -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cases(
        "EDMDPMSolverMultistepScheduler",
        configs(
            [{}],
            algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
            prediction_type=["epsilon", "v_prediction"],
            sigma_schedule=["karras", "exponential"],
            sigma_data=[0.5, 1.0],
            sigma_max=[80.0, 20.0],
            solver_order=[1, 2, 3],
            solver_type=["midpoint", "heun"],
            thresholding=[False, False, True],
            sample_max_value=[1.0, 1.5],
            lower_order_final=[True, False],
            euler_at_final=[False, True],
            final_sigmas_type=["zero", "sigma_min"],
        ),
        generators=True,
    )
)
def test_edm(case):
    check(case)
