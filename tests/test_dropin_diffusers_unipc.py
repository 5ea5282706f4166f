"""UniPC, LMS, PNDM, SA-Solver and DPM-Solver SDE: our classes against those of diffusers, whole loops."""

import copy
import math
import pickle
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast.dropin import patching

diffusers = pytest.importorskip("diffusers")
try:
    patching.PEERS["diffusers"].check()
except ImportError as unsupported:
    pytest.skip(str(unsupported), allow_module_level=True)
pytest.importorskip("scipy")
pytest.importorskip("torchsde")

from diffusers.schedulers import scheduling_dpmsolver_sde, scheduling_sasolver  # noqa: E402
from diffusers_peer import Case, agree, compare, model, no_less_exact, run  # noqa: E402

import genfast  # noqa: E402
import genfast.dropin.diffusers as ours  # noqa: E402
from genfast.dropin.diffusers.lms import adams_weights  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torchsde"),
    pytest.mark.filterwarnings("ignore:.*scale_model_input:UserWarning"),
]
NAMES = [
    "UniPCMultistepScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "DPMSolverSDEScheduler",
]
names = pytest.mark.parametrize("name", NAMES)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, None)] * 4 + [(F64, None), (BF16, None), (F16, None)]
MIXED = [(F32, BF16), (BF16, F32), (F16, F32), (F32, F16)]
SHAPES = [(2, 3, 5, 4), (1, 4, 8, 8), (3, 2, 7), (2, 5), (1, 3, 2, 4, 3)]
SIGMAS = [{}, {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]


@st.composite
def parts(draw, dtypes=DTYPES, shapes=SHAPES, most=15):
    """What every case has beside its configuration."""
    dtype, output_dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.sampled_from(shapes))
    steps = draw(st.integers(1, most))
    return dict(
        dtype=dtype,
        output_dtype=output_dtype,
        shape=shape,
        channels_last=len(shape) == 4 and draw(st.booleans()),
        timesteps={"num_inference_steps": steps},
        begin=draw(st.sampled_from([None, None, steps // 2])),
        seed=draw(st.integers(0, 99)),
    )


# --- UniPC -----------------------------------------------------------------------------------------------------------


@st.composite
def unipc_cases(draw, predict_x0=True):
    predictions = ["epsilon", "sample", "v_prediction"] + ["flow_prediction"] * predict_x0
    config = dict(
        solver_order=draw(st.integers(1, 3)),
        solver_type=draw(st.sampled_from(["bh1", "bh2"])),
        prediction_type=draw(st.sampled_from(predictions)),
        predict_x0=predict_x0,
        thresholding=draw(st.booleans()),
        sample_max_value=draw(st.sampled_from([1.0, 1.5])),
        lower_order_final=draw(st.booleans()),
        disable_corrector=draw(st.sampled_from([[], [], [0], [0, 2]])),
        timestep_spacing=draw(st.sampled_from(["linspace", "leading", "trailing"])),
        final_sigmas_type=draw(st.sampled_from(["zero", "sigma_min"])),
        rescale_betas_zero_snr=draw(st.sampled_from([False, False, True])),
        **draw(st.sampled_from(SIGMAS[:4])),
    )
    if predict_x0 and draw(st.booleans()):
        config.update(use_flow_sigmas=True, flow_shift=draw(st.sampled_from([1.0, 3.0])))
    # einsum in the peer takes no tensors of fewer than two dimensions, and no mixed ones.
    return Case("UniPCMultistepScheduler", config, **draw(parts()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(unipc_cases())
def test_unipc(case):
    if case.config["rescale_betas_zero_snr"]:  # a first level of 4096 amplifies roundings
        case.dtype, case.output_dtype = F32, None
        no_less_exact(case)
    else:
        agree(case)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(unipc_cases(predict_x0=False))
def test_unipc_of_the_noise(case):
    case.dtype, case.output_dtype = F32, None
    no_less_exact(case)


@pytest.mark.parametrize("dtypes", MIXED)
@pytest.mark.parametrize("order", [1, 2])
def test_unipc_of_mixed_dtypes_is_the_peers(dtypes, order):
    case = Case("UniPCMultistepScheduler", dict(solver_order=order), dtype=dtypes[0], output_dtype=dtypes[1])
    agree(case)


def test_unipc_with_sigmas_and_shifts():
    for extra in ({}, {"shift_terminal": 0.1}, {"use_dynamic_shifting": True}):
        config = dict(use_flow_sigmas=True, prediction_type="flow_prediction", **extra)
        timesteps = dict(
            sigmas=np.array([1.0, 0.8, 0.5, 0.2]), **({"mu": 0.7} if "use_dynamic_shifting" in extra else {})
        )
        compare(Case("UniPCMultistepScheduler", config, timesteps))


def test_unipc_with_a_predictor_of_another_kind():
    def made(module):
        scheduler = module.UniPCMultistepScheduler(solver_p=diffusers.DDIMScheduler())
        scheduler.set_timesteps(6)
        x, steps = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), []
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
            steps.append(x)
        return steps

    for a, b in zip(made(ours), made(diffusers)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- LMS -------------------------------------------------------------------------------------------------------------


def exact_coefficient(self, order, t, current):
    """What the peer integrates numerically, with float32 levels in the integrand, in closed form."""
    sigmas = self.sigmas.double().tolist()
    roots = [sigmas[t - k] for k in range(order) if k != current]
    poly = [1.0]  # coefficients in (tau - sigma_t), lowest first
    for root in roots:
        shift = sigmas[t] - root
        poly = [a * shift + b for a, b in zip([*poly, 0.0], [0.0, *poly])]
    width = sigmas[t + 1] - sigmas[t]
    total = math.fsum(c * width ** (k + 1) / (k + 1) for k, c in enumerate(poly))
    return total / math.prod(sigmas[t - current] - root for root in roots)


@st.composite
def lms_cases(draw, dtypes=DTYPES + MIXED):
    config = dict(
        prediction_type=draw(st.sampled_from(["epsilon", "sample", "v_prediction"])),
        beta_schedule=draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        timestep_spacing=draw(st.sampled_from(["linspace", "leading", "trailing"])),
        steps_offset=draw(st.sampled_from([0, 1])),
        **draw(st.sampled_from(SIGMAS)),
    )
    return Case(
        "LMSDiscreteScheduler",
        config,
        options={"order": draw(st.sampled_from([1, 2, 3, 4, 4, 7, 9]))},
        **draw(parts(dtypes)),
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lms_cases())
def test_lms_with_exact_integrals(case):
    with mock.patch.object(diffusers.LMSDiscreteScheduler, "get_lms_coefficient", exact_coefficient):
        compare(case, 64)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(lms_cases([(F32, None)]))
def test_lms(case):
    case.options["order"] = min(case.options["order"], 4)
    compare(case, 256)  # the peer's coefficients are good to float32


def test_adams_weights():
    width = 0.5
    w = adams_weights(torch.arange(8, 0, -1, dtype=F64).numpy() * width, 4)
    expected = [
        [1, 0, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
    torch.testing.assert_close(
        torch.from_numpy(w[:4]), -width * torch.tensor(expected, dtype=F64), rtol=1e-14, atol=1e-14
    )
    torch.testing.assert_close(torch.from_numpy(w[4:]), torch.from_numpy(w[3:4]).expand(3, 4), rtol=1e-14, atol=1e-14)
    scheduler = ours.LMSDiscreteScheduler()
    scheduler.set_timesteps(6)
    own = adams_weights(scheduler.sigmas.double().numpy(), 4)[4]
    assert own == pytest.approx([scheduler.get_lms_coefficient(4, 4, k) for k in range(4)], rel=1e-5)


def test_lms_warns_as_the_peer():
    for module in (diffusers, ours):
        scheduler = module.LMSDiscreteScheduler()
        scheduler.set_timesteps(3)
        x = torch.ones(1, 2, 3)
        with pytest.warns(UserWarning, match="scale_model_input") as seen:
            scheduler.step(x, scheduler.timesteps[0], x)
        with pytest.warns(UserWarning, match="scale_model_input") as again:  # a step that is the peer's
            scheduler.step(x.clone().requires_grad_(), scheduler.timesteps[1], x)
        assert len(seen) == len(again) == 1


# --- PNDM ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(
        lambda config, rest: Case("PNDMScheduler", config, **rest),
        st.fixed_dictionaries(
            dict(
                prediction_type=st.sampled_from(["epsilon", "v_prediction"]),
                skip_prk_steps=st.booleans(),
                set_alpha_to_one=st.booleans(),
                timestep_spacing=st.sampled_from(["leading", "linspace", "trailing"]),
                steps_offset=st.sampled_from([0, 1]),
                beta_schedule=st.sampled_from(["linear", "scaled_linear"]),
            )
        ),
        parts(DTYPES + MIXED),
    )
)
def test_pndm(case):
    if not case.config["skip_prk_steps"]:
        case.begin = None
    agree(case, 64)


# --- SA-Solver -------------------------------------------------------------------------------------------------------

TAUS = [
    None,
    None,
    lambda t: 0,
    lambda t: 1 if t > 300 else 0.5,
    lambda t: float(t) / 1000,
    lambda t: torch.tensor(0.3),
]


@st.composite
def sa_cases(draw):
    data = draw(st.booleans())
    config = dict(
        algorithm_type="data_prediction" if data else "noise_prediction",
        prediction_type=draw(st.sampled_from(["epsilon", "sample", "v_prediction"] + ["flow_prediction"] * data)),
        predictor_order=draw(st.integers(1, 4)),
        corrector_order=draw(st.integers(1, 4)),
        lower_order_final=draw(st.booleans()),
        thresholding=data and draw(st.booleans()),
        timestep_spacing=draw(st.sampled_from(["linspace", "leading", "trailing"])),
        tau_func=draw(st.sampled_from(TAUS)),
        **draw(st.sampled_from([*SIGMAS[:4], {"use_flow_sigmas": True, "flow_shift": 2.0}])),
    )
    generator = draw(st.sampled_from([None, 3]))
    return Case(
        "SASolverScheduler", config, options={} if generator is None else {"generator": generator}, **draw(parts())
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sa_cases())
def test_sasolver(case):
    # High orders at large steps, and noise predictions at large levels, amplify the peer's roundings and ours.
    if max(case.config["predictor_order"], case.config["corrector_order"]) > 2 or (
        case.config["algorithm_type"] == "noise_prediction"
    ):
        case.dtype = F32
        no_less_exact(case)
    else:
        agree(case, 256)


def test_sasolver_draws_noise_of_a_seed():
    def made(seed, generator=None):
        scheduler = ours.SASolverScheduler()
        scheduler.set_timesteps(5)
        x = torch.ones(3, 2, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator, seed=seed).prev_sample
        return x

    before = torch.get_rng_state()
    assert torch.equal(made(3), made(3)) and not torch.equal(made(3), made(4))
    assert torch.equal(made(torch.tensor([3, 4, 5]))[1], made(torch.tensor([7, 4, 9]))[1])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="exclude each other"):
        made(3, torch.Generator())
    scheduler = ours.SASolverScheduler()
    scheduler.set_timesteps(5)
    x = torch.ones(3, 2, 4)
    scheduler.step(x, scheduler.timesteps[0], x, seed=9)
    assert torch.equal(scheduler.last_noise, genfast.randn(3, 2, 4, seed=9, stream=0))
    with pytest.raises(ValueError, match="needs a step that runs fused"):
        scheduler.step(x.requires_grad_(), scheduler.timesteps[1], x, seed=9)


# --- DPM-Solver SDE --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.builds(
        lambda config, rest, s_noise: Case("DPMSolverSDEScheduler", config, options={"s_noise": s_noise}, **rest),
        st.builds(
            lambda base, sigmas: {**base, **sigmas},
            st.fixed_dictionaries(
                dict(
                    prediction_type=st.sampled_from(["epsilon", "v_prediction"]),
                    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
                    noise_sampler_seed=st.sampled_from([None, 5]),
                    timestep_spacing=st.sampled_from(["linspace", "leading", "trailing"]),
                )
            ),
            st.sampled_from(SIGMAS),
        ),
        parts(DTYPES + MIXED, most=8),
        st.sampled_from([1.0, 0.6, 0.0]),
    )
)
def test_dpm_sde(case):
    asked = {diffusers: [], ours: []}
    real = scheduling_dpmsolver_sde.BrownianTreeNoiseSampler.__call__
    case.begin = None if case.begin is None else case.begin // 2 * 2  # an even position begins a step
    for module in asked:

        def ask(self, start, end, seen=asked[module]):
            seen.append((start.item(), end.item()))
            return real(self, start, end)

        with mock.patch.object(scheduling_dpmsolver_sde.BrownianTreeNoiseSampler, "__call__", ask):
            run(case, module)
    assert asked[ours] == asked[diffusers]  # to the bit: the path is rough
    compare(case, 64)


def test_dpm_sde_path_per_sample_and_noise_seed():
    case = Case("DPMSolverSDEScheduler", dict(noise_sampler_seed=[4, 5]))
    compare(case)
    seeded, _ = run(Case("DPMSolverSDEScheduler", dict(noise_sampler_seed=11)), diffusers)
    with mock.patch.object(ours.DPMSolverSDEScheduler, "noise_seed", 11):
        mine, _ = run(Case("DPMSolverSDEScheduler"), ours)
    torch.testing.assert_close(mine[-1][0], seeded[-1][0], rtol=0, atol=1e-4)
    with mock.patch.object(ours.DPMSolverSDEScheduler, "noise_seed", torch.tensor([4, 5])):
        mine, _ = run(Case("DPMSolverSDEScheduler"), ours)
    torch.testing.assert_close(mine[-1][0], run(case, diffusers)[0][-1][0], rtol=0, atol=1e-4)


# --- all of them -----------------------------------------------------------------------------------------------------


def steady(t):
    return 1 if t > 300 else 0.5


ORDINARY = [
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", dict(solver_order=3, prediction_type="v_prediction", use_karras_sigmas=True)),
    ("UniPCMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)),
    ("UniPCMultistepScheduler", dict(thresholding=True, prediction_type="sample")),
    ("UniPCMultistepScheduler", dict(predict_x0=False, final_sigmas_type="sigma_min")),
    ("LMSDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", dict(prediction_type="sample")),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", dict(skip_prk_steps=True, steps_offset=1)),
    ("SASolverScheduler", {}),
    ("SASolverScheduler", dict(tau_func=steady)),
    ("SASolverScheduler", dict(predictor_order=3, corrector_order=4, prediction_type="v_prediction", tau_func=steady)),
    ("SASolverScheduler", dict(algorithm_type="noise_prediction", tau_func=steady)),
    ("DPMSolverSDEScheduler", {}),
]


@pytest.mark.parametrize("name, config", ORDINARY)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_step_is_left_to_the_peer(name, config, dtype):
    steps = ["step_prk", "step_plms"] if name == "PNDMScheduler" else ["step"]
    left = AssertionError("the peer's step was called")
    with without(getattr(diffusers, name), steps, left):
        run(Case(name, config, timesteps={"num_inference_steps": 6}, dtype=dtype), ours)


def without(cls, methods, error):
    return mock.patch.multiple(cls, **{method: mock.Mock(side_effect=error) for method in methods})


@pytest.mark.parametrize("name, config", ORDINARY)
def test_the_tables_of_a_run_are_known_beforehand(name, config):
    config = {k: v for k, v in config.items() if k != "tau_func"}
    scheduler = getattr(ours, name)(**config)
    scheduler.set_timesteps(9)
    x = torch.ones(1, 2, 3)
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    plan = scheduler.current_plan()
    if name == "SASolverScheduler":  # makes tables beforehand for a GPU alone
        scheduler.timesteps = mock.Mock(is_cuda=True)
    keys = scheduler.planned_keys(plan)
    assert set(plan.tables) <= set(keys)
    assert len(keys) < plan.MOST_TABLES
    assert all(plan.rows(key, scheduler.make_rows) is not None for key in keys)


def plain_value(v):
    if isinstance(v, (list, tuple)):
        return [plain_value(x) for x in v]
    return v.double() if isinstance(v, torch.Tensor) else v


STATE = [
    *("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "last_noise", "_step_index"),
    *("this_order", "this_predictor_order", "this_corrector_order", "derivatives", "is_scale_input_called"),
    *("ets", "counter", "cur_sample", "cur_model_output", "sample", "mid_point_sigma"),
]


@pytest.mark.parametrize("name, config", ORDINARY)
@pytest.mark.parametrize("stop", [1, 2, 3, 6])
def test_state_is_the_peers(name, config, stop):
    schedulers = []
    for module in (diffusers, ours):
        scheduler = getattr(module, name)(**config)
        scheduler.set_timesteps(5)
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        for t in scheduler.timesteps[:stop]:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        schedulers.append(scheduler)
    theirs, mine = schedulers
    checked = 0
    for key in STATE:
        if hasattr(theirs, key):
            checked += 1
            a, b = plain_value(getattr(mine, key)), plain_value(getattr(theirs, key))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4) if not _none_in(b) else _same(a, b)
    assert checked >= 3


def _none_in(v):
    return v is None or (isinstance(v, list) and any(map(_none_in, v)))


def _same(a, b):
    if isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            _same(x, y)
    elif isinstance(b, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    else:
        assert a == b


@pytest.mark.parametrize("name, config", ORDINARY)
@pytest.mark.parametrize("turn", [0, 1])
def test_fused_steps_and_the_peers_mix(name, config, turn):
    def mixed(scheduler, output, t, x, options):
        mixed.calls += 1
        step = diffusers_class.step if mixed.calls % 2 == turn else type(scheduler).step
        if name == "PNDMScheduler" and mixed.calls % 2 == turn:
            with mock.patch.multiple(
                ours.PNDMScheduler, step_prk=diffusers_class.step_prk, step_plms=diffusers_class.step_plms
            ):
                return step(scheduler, output, t, x, return_dict=False, **options)
        return step(scheduler, output, t, x, return_dict=False, **options)

    diffusers_class, mixed.calls = getattr(diffusers, name), 0
    compare(Case(name, config, advance=mixed), 256)


@pytest.mark.parametrize("name, config", ORDINARY)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_in_the_middle_goes_on_alike(name, config, way):
    scheduler = getattr(ours, name)(**config, **({"noise_sampler_seed": 2} if name == "DPMSolverSDEScheduler" else {}))
    scheduler.set_timesteps(6)
    x = torch.randn(2, 3, 4) * scheduler.init_noise_sigma
    if name == "DPMSolverSDEScheduler":
        middle = len(scheduler.timesteps) // 2 // 2 * 2 + 1
    else:
        middle = len(scheduler.timesteps) // 2
    for t in scheduler.timesteps[:middle]:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    if name == "DPMSolverSDEScheduler":
        scheduler.noise_sampler = None  # torchsde's tree can neither be copied nor pickled; a new one is drawn
    twin = way(scheduler)
    results = []
    for s in (scheduler, twin):
        y = x
        torch.manual_seed(5)
        for t in scheduler.timesteps[middle:]:
            y = s.step(model(s.scale_model_input(y, t), t), t, y).prev_sample
        results.append(y)
    assert torch.equal(*results)


HISTORY = {
    "UniPCMultistepScheduler": [dict(model_outputs=2), dict(model_outputs=3, solver_order=3, predict_x0=False)],
    "LMSDiscreteScheduler": [dict(derivatives=4), dict(derivatives=2)],
    "PNDMScheduler": [dict(ets=4), dict(ets=2, skip_prk_steps=True)],
    "SASolverScheduler": [dict(model_outputs=2), dict(model_outputs=3, predictor_order=3)],
    "DPMSolverSDEScheduler": [dict(sample=0, noise_sampler_seed=1)],
}


@names
@pytest.mark.parametrize("later", [False, True])
def test_assigned_history(name, later):
    """What diffusers' own tests do: put tensors in the history, then step."""
    for config in HISTORY[name]:
        attribute, count = next(iter(config.items()))
        options = {k: v for k, v in config.items() if k != attribute}
        results = []
        for module in (diffusers, ours):
            scheduler = getattr(module, name)(**options)
            scheduler.set_timesteps(10)
            draw = torch.Generator().manual_seed(0)
            x, e = torch.randn(2, 3, 4, 4, generator=draw), torch.randn(2, 3, 4, 4, generator=draw)
            torch.manual_seed(0)
            t = scheduler.timesteps[:4]
            if later:
                scheduler.scale_model_input(x, t[0])
                x = scheduler.step(e, t[0], x).prev_sample
            past = [torch.randn(2, 3, 4, 4, generator=draw) for _ in range(count)]
            setattr(scheduler, attribute, past if count else x + 0.1)
            if name == "UniPCMultistepScheduler" and later:
                scheduler.lower_order_nums = scheduler.this_order = count
            out = [x]
            steps = [scheduler.step]
            if name == "PNDMScheduler":
                steps = [scheduler.step_plms, scheduler.step_prk]
            try:
                for step in steps:
                    for s in t[int(later) :]:
                        out.append(step(e, s, out[-1]).prev_sample)
            except Exception as refusal:
                out.append(type(refusal))
            results.append(out)
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5, equal_nan=True)
            else:
                assert a is b


@names
def test_unusual_tensors_get_the_peers_result(name):
    class Own(torch.Tensor):
        pass

    def odd(make):
        results = []
        for module in (diffusers, ours):
            scheduler = getattr(module, name)()
            scheduler.set_timesteps(4)
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
            torch.manual_seed(0)
            x, e = make(x)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    for t in scheduler.timesteps[:3]:
                        x = scheduler.step(e, t, x).prev_sample
                except Exception as refusal:
                    x = type(refusal)
            results.append(x)
        if isinstance(results[0], type):
            assert results[0] is results[1]
        else:
            assert type(results[0]) is type(results[1])
            assert results[0].requires_grad == results[1].requires_grad
            torch.testing.assert_close(results[1].detach(), results[0].detach(), rtol=2e-5, atol=2e-5)

    odd(lambda x: (x, (x * 0.5).requires_grad_()))
    odd(lambda x: (x, x[:1] * 0.5))
    odd(lambda x: (x, x[:, :1] * 0.5))
    odd(lambda x: (x.as_subclass(Own), x * 0.5))
    odd(lambda x: (x[:, :, 0, 0].contiguous()[0], x[0, :, 0, 0].contiguous()))
    odd(lambda x: (x[:0], x[:0]))
    odd(lambda x: (x.transpose(1, 3), x.transpose(1, 3) * 0.5))


@names
def test_wrong_calls_raise_what_the_peer_raises(name):
    def error(module, call):
        scheduler = getattr(module, name)()
        with pytest.raises(Exception) as caught:
            call(scheduler)
        return type(caught.value), str(caught.value).replace(f"genfast.dropin.{module.__name__}", module.__name__)

    x = torch.ones(1, 2, 3)

    def too_many(scheduler):
        scheduler.set_timesteps(1)
        for _ in range(3):
            scheduler.step(x, scheduler.timesteps[0], x)

    def unknown_prediction(scheduler):
        scheduler.register_to_config(prediction_type="nothing")
        scheduler.set_timesteps(3)
        scheduler.step(x, scheduler.timesteps[0], x)

    def nothing(scheduler):
        scheduler.set_timesteps(3)
        scheduler.step(None, scheduler.timesteps[0], x)

    calls = [unknown_prediction, nothing]
    if name != "PNDMScheduler":
        calls.append(too_many)
    if name in ("PNDMScheduler", "UniPCMultistepScheduler", "SASolverScheduler"):
        calls.append(lambda scheduler: scheduler.step(x, 1, x))  # before set_timesteps
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, mine = error(diffusers, call), error(ours, call)
        assert mine[0] is theirs[0] and (mine[1] == theirs[1] or "class" in theirs[1]), (mine, theirs)


def test_a_pickled_sasolver_keeps_its_tau():
    scheduler = ours.SASolverScheduler()
    twin = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(scheduler))))
    for t in (0, 199, 200, 500, 800, 801, torch.tensor(300)):
        assert twin.tau_func(t) == scheduler.tau_func(t)
    scheduler.tau_func = steady
    assert pickle.loads(pickle.dumps(scheduler)).tau_func is steady


def test_draws_of_sasolver_are_the_peers_also_where_they_weigh_nothing():
    seen = {}
    for module in (diffusers, ours):
        scheduler = module.SASolverScheduler(tau_func=lambda t: 0)
        scheduler.set_timesteps(5)
        draw = torch.Generator().manual_seed(7)
        x = torch.ones(1, 2, 3, 3)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator=draw).prev_sample
        seen[module] = draw.get_state(), scheduler.last_noise
    assert torch.equal(seen[ours][0], seen[diffusers][0]) and torch.equal(seen[ours][1], seen[diffusers][1])
    assert scheduling_sasolver.randn_tensor is diffusers.utils.torch_utils.randn_tensor
