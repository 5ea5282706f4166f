"""DPM-Solver (multistep, inverse, singlestep, EDM) and DEIS: our classes against those of diffusers, whole loops."""

import copy
import pickle
from unittest import mock

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

from diffusers_peer import Case, agree, compare, model, no_less_exact, run  # noqa: E402

import genfast.dropin.diffusers as ours  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dpmsolver.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:diffusers"),
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


def test_edm_scales_the_models_input_as_the_peer():
    for dtype in (F32, F64, BF16, F16):
        for config in ({}, dict(sigma_data=1.0, sigma_schedule="exponential")):
            scaled = []
            for module in (diffusers, ours):
                scheduler = module.EDMDPMSolverMultistepScheduler(**config)
                scheduler.set_timesteps(6)
                x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
                for t in scheduler.timesteps:
                    scaled.append(scheduler.scale_model_input(x, t))
                    scheduler.step(x, t, x)
            half = len(scaled) // 2
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(scaled[:half], scaled[half:]))


# --- all of them -----------------------------------------------------------------------------------------------------

MULTI, INVERTED = "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"
SINGLE, DEIS, EDM = "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "EDMDPMSolverMultistepScheduler"
names = pytest.mark.parametrize("name", [MULTI, INVERTED, SINGLE, DEIS, EDM])
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
THRESHOLD = dict(thresholding=True, sample_max_value=1.5)
ORDINARY = [
    (MULTI, {}),
    (MULTI, dict(solver_order=3, use_karras_sigmas=True, prediction_type="v_prediction")),
    (MULTI, dict(algorithm_type="sde-dpmsolver++", solver_type="heun")),
    (MULTI, dict(algorithm_type="sde-dpmsolver++", solver_order=3)),
    (MULTI, dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **THRESHOLD)),
    (MULTI, dict(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min", prediction_type="sample")),
    (MULTI, dict(prediction_type="sample", **THRESHOLD)),
    (MULTI, FLOW),
    (INVERTED, {}),
    (INVERTED, dict(solver_order=3)),
    (INVERTED, dict(algorithm_type="sde-dpmsolver++", **FLOW)),
    (SINGLE, {}),
    (SINGLE, dict(solver_order=3, prediction_type="v_prediction", lower_order_final=True)),
    (SINGLE, dict(algorithm_type="sde-dpmsolver++", **THRESHOLD)),
    (SINGLE, dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")),
    (DEIS, {}),
    (DEIS, dict(solver_order=3, **THRESHOLD)),
    (EDM, {}),
    (EDM, dict(solver_order=3, prediction_type="v_prediction", solver_type="heun")),
    (EDM, dict(algorithm_type="sde-dpmsolver++", **THRESHOLD)),
]
ordinary = pytest.mark.parametrize("name, config", ORDINARY)
STOCHASTIC = [(name, config) for name, config in ORDINARY if config.get("algorithm_type", "").startswith("sde")]


def scheduled(module, name, config, steps=6):
    scheduler = getattr(module, name)(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def walk(scheduler, x, timesteps, **options):
    for t in timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x


def start(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(a, b):
    """Equal structures of numbers and tensors; tensors up to the roundings of a few steps."""
    if isinstance(b, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            close(x, y)
    elif isinstance(b, torch.Tensor):
        finite = b[b.isfinite()]
        largest = finite.double().abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * max(largest, 1), equal_nan=True)
    else:
        assert a == b


@ordinary
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_step_is_left_to_the_peer(name, config, dtype):
    left = mock.Mock(side_effect=AssertionError("the peer's step was called"))
    with mock.patch.object(getattr(diffusers, name), "step", left):
        run(Case(name, config, dtype=dtype), ours)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("name", [MULTI, INVERTED, SINGLE])
def test_a_learned_variance_is_left_out(name, variance):
    case = Case(name, dict(variance_type=variance), channels=2)
    left = mock.Mock(side_effect=AssertionError("the peer's step was called"))
    with mock.patch.object(getattr(diffusers, name), "step", left):
        run(case, ours)
    no_less_exact(case) if name == INVERTED else compare(case)


@ordinary
def test_the_tables_of_a_run_are_made_beforehand(name, config):
    scheduler = scheduled(ours, name, config, 9)
    with mock.patch.object(type(scheduler), "make_rows", side_effect=AssertionError("a table within the run")):
        walk(scheduler, start(1, 2, 3), scheduler.timesteps)


STATE = ["model_outputs", "lower_order_nums", "sample", "order_list", "_step_index", "_begin_index", "step_index"]


@ordinary
@pytest.mark.parametrize("stop", [1, 2, 3, 6])
def test_state_is_the_peers(name, config, stop):
    mine, theirs = scheduled(ours, name, config), scheduled(diffusers, name, config)
    for scheduler in (mine, theirs):
        torch.manual_seed(0)
        walk(scheduler, start(2, 3, 4), scheduler.timesteps[:stop])
    known = [key for key in STATE if hasattr(theirs, key)]
    assert len(known) >= 4
    for key in known:
        close(getattr(mine, key), getattr(theirs, key))


@ordinary
@pytest.mark.parametrize("turn", [0, 1])
def test_fused_steps_and_the_peers_mix(name, config, turn):
    def mixed(scheduler, output, t, x, options):
        mixed.calls += 1
        cls = getattr(diffusers, name) if mixed.calls % 2 == turn else type(scheduler)
        return cls.step(scheduler, output, t, x, return_dict=False, **options)

    mixed.calls = 0
    steep = not config.get("algorithm_type", "++").endswith("++") or name == INVERTED
    compare(Case(name, config, advance=mixed), 1024 if steep else 256)


@ordinary
@pytest.mark.parametrize("way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_a_copy_in_the_middle_goes_on_alike(name, config, way):
    scheduler = scheduled(ours, name, config)
    x = walk(scheduler, start(2, 3, 4), scheduler.timesteps[:3])
    ends = []
    for twin in (way(scheduler), scheduler):
        torch.manual_seed(5)
        ends.append(walk(twin, x, twin.timesteps[3:]))
    assert torch.equal(*ends)


@names
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 4])
def test_assigned_history(name, order, first):
    """What tests and pipelines do: put tensors in the history, say how many there are and where we are, then step."""
    results = []
    for module in (diffusers, ours):
        scheduler = scheduled(module, name, dict(solver_order=order), 10)
        draw = torch.Generator().manual_seed(0)
        scheduler.model_outputs = [torch.randn(2, 3, 4, generator=draw) for _ in range(order)]
        x, e = torch.randn(2, 3, 4, generator=draw), torch.randn(2, 3, 4, generator=draw)
        if hasattr(scheduler, "lower_order_nums"):
            scheduler.lower_order_nums = order
        if hasattr(scheduler, "sample"):
            scheduler.sample = x + 0.1
        scheduler._step_index = first
        scheduler.is_scale_input_called = True
        out = []
        for t in scheduler.timesteps[first : first + 4]:
            x = scheduler.step(e, t, x).prev_sample
            out.append(x)
        results.append([*out, *scheduler.model_outputs])
    close(results[1], results[0])


@pytest.mark.parametrize("name", [MULTI, INVERTED, DEIS, EDM])
def test_a_longer_history_than_the_solver_uses(name):
    case = Case(name, dict(solver_order=4))
    no_less_exact(case)
    with mock.patch.object(getattr(diffusers, name), "step", mock.Mock(side_effect=AssertionError("the peer's step"))):
        run(case, ours)


@names
def test_history_of_other_dtypes_and_lengths(name):
    def both(change):
        results = []
        for module in (diffusers, ours):
            scheduler = scheduled(module, name, dict(solver_order=2), 8)
            x = walk(scheduler, start(2, 3, 4), scheduler.timesteps[:3])
            change(scheduler)
            try:
                t = scheduler.timesteps[3]
                x = scheduler.step(0.1 * x, t, x).prev_sample
                results.append([x, *(m for m in scheduler.model_outputs if m is not None)])
            except Exception as refusal:
                results.append(type(refusal))
        close(results[1], results[0])
        return results[1]

    def in_double(scheduler):
        scheduler.model_outputs = [m.double() for m in scheduler.model_outputs]

    def longer(scheduler):
        scheduler.model_outputs = [scheduler.model_outputs[0], *scheduler.model_outputs]

    def empty(scheduler):
        scheduler.model_outputs = [None, None]

    outputs = [both(change) for change in (in_double, longer, empty)]
    assert name == MULTI or outputs[0][0].dtype is F64


@names
def test_a_schedule_that_is_changed_by_hand(name):
    results = []
    for module in (diffusers, ours):
        scheduler = scheduled(module, name, {}, 8)
        x = walk(scheduler, start(2, 3, 4), scheduler.timesteps[:2])
        scheduler.sigmas[2:-1] *= 1.01  # in place
        x = walk(scheduler, x, scheduler.timesteps[2:4])
        scheduler.sigmas = scheduler.sigmas * 0.99
        x = walk(scheduler, x, scheduler.timesteps[4:6])
        scheduler.register_to_config(**({"solver_type": "heun"} if name != DEIS else {"lower_order_final": False}))
        results.append(walk(scheduler, x, scheduler.timesteps[6:]))
    close(*results)


@names
def test_where_a_run_starts(name):
    """At a timestep, as a tensor or a number; at one that occurs twice; at one that does not occur."""
    for value in ("third", "number", "copy", "unknown", "twice"):
        places = []
        for module in (diffusers, ours):
            scheduler = scheduled(module, name, {}, 8)
            t = scheduler.timesteps[2]
            if value == "number":
                t = t.item()
            elif value == "copy":
                t = t.clone()
            elif value == "unknown":
                t = torch.tensor(-7)
            elif value == "twice":
                scheduler.timesteps = scheduler.timesteps.repeat_interleave(2)
                t = scheduler.timesteps[4]
            scheduler._init_step_index(t)
            places.append(scheduler.step_index)
        assert places[0] == places[1], value


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, config", STOCHASTIC)
def test_noise_of_a_seed(name, config):
    def made(seed, **options):
        scheduler = scheduled(ours, name, config, 5)
        return walk(scheduler, start(3, 2, 4), scheduler.timesteps, seed=seed, **options)

    before = torch.get_rng_state()
    assert torch.equal(made(3), made(3)) and not torch.equal(made(3), made(4))
    assert torch.equal(made(torch.tensor([3, 4, 5]))[1], made(torch.tensor([7, 4, 9]))[1])
    with mock.patch.object(getattr(ours, name), "noise_seed", 3):
        assert torch.equal(made(None), made(3))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="exclude each other"):
        made(3, generator=torch.Generator())
    scheduler = scheduled(ours, name, config)
    x = start(3, 2, 4)
    with pytest.raises(ValueError, match="needs a step that runs fused"):
        scheduler.step(x.clone().requires_grad_(), scheduler.timesteps[0], x, seed=9)


@pytest.mark.parametrize("name, config", [pair for pair in STOCHASTIC if pair[0] in (MULTI, INVERTED)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("noise_dtype", [F32, BF16])
def test_noise_that_is_given(name, config, dtype, noise_dtype):
    z = start(2, 3, 5, 4).to(noise_dtype)
    case = Case(name, config, options={"variance_noise": z, "generator": 1}, dtype=dtype)
    ulps = 64 if config["algorithm_type"].endswith("++") else 1024
    if name == INVERTED and dtype is F32 and noise_dtype is BF16:
        ulps = 2**17  # the peer rounds the noise, times its weight, to bfloat16
    compare(case, ulps)
    with mock.patch.object(getattr(ours, name), "noise_seed", 3):  # the noise that is given goes before
        compare(case, ulps)
    scheduler = scheduled(ours, name, config)
    with pytest.raises(ValueError, match="seed and variance_noise exclude each other"):
        scheduler.step(z, scheduler.timesteps[0], z, variance_noise=z, seed=1)


@pytest.mark.parametrize("noise", [start(1, 5, 4), torch.tensor(0.7), 0.7], ids=["row", "0-d", "number"])
def test_noise_that_must_broadcast(noise):
    for name in (MULTI, INVERTED):
        for config in (dict(algorithm_type="sde-dpmsolver++", **FLOW), dict(algorithm_type="dpmsolver++")):
            agree(Case(name, config, options={"variance_noise": noise}))


# --- calls that are not ordinary -------------------------------------------------------------------------------------


@names
def test_unusual_tensors_get_the_peers_result(name):
    class Own(torch.Tensor):
        pass

    def odd(make):
        results = []
        for module in (diffusers, ours):
            scheduler = scheduled(module, name, {}, 4)
            x, e = make(start(2, 3, 4, 4))
            try:
                for t in scheduler.timesteps[:3]:
                    x = scheduler.step(e, t, x).prev_sample
            except Exception as refusal:
                x = type(refusal)
            results.append(x)
        theirs, mine = results
        assert type(mine) is type(theirs)
        if isinstance(theirs, type):
            assert mine is theirs
        else:
            assert mine.requires_grad == theirs.requires_grad and mine.stride() == theirs.stride()
            close(mine.detach().as_subclass(torch.Tensor), theirs.detach().as_subclass(torch.Tensor))

    odd(lambda x: (x, (x * 0.5).requires_grad_()))
    odd(lambda x: (x, x[:1] * 0.5))
    odd(lambda x: (x, x[:, :1] * 0.5))
    odd(lambda x: (x.as_subclass(Own), x * 0.5))
    odd(lambda x: (x[0, 0, 0].contiguous(), x[0, 0, 1].contiguous()))
    odd(lambda x: (x[0, 0, 0, 0].clone(), x[0, 0, 0, 1].clone()))
    odd(lambda x: (x[:0], x[:0]))
    odd(lambda x: (x.transpose(1, 3), x.transpose(1, 3) * 0.5))
    odd(lambda x: (x.to(torch.int64), x))


@names
def test_outputs_are_the_peers_kind(name):
    scheduler, theirs = scheduled(ours, name, {}), scheduled(diffusers, name, {})
    x = start(2, 3, 4)
    a, b = scheduler.step(x, scheduler.timesteps[0], x), theirs.step(x, theirs.timesteps[0], x)
    assert type(a) is type(b) and list(a) == list(b) == ["prev_sample"] and a.prev_sample is a["prev_sample"]
    first = scheduler.step(x, scheduler.timesteps[1], x, return_dict=False)
    assert type(first) is tuple and len(first) == 1
    kept = first[0].clone()
    walk(scheduler, first[0], scheduler.timesteps[2:])
    assert torch.equal(first[0], kept)  # what was handed out is not written again


@names
def test_wrong_calls_raise_what_the_peer_raises(name):
    x = torch.ones(1, 2, 3)

    def before_set_timesteps(scheduler):
        scheduler.step(x, 1, x)

    def too_many(scheduler):
        scheduler.set_timesteps(2)
        for _ in range(4):
            scheduler.step(x, scheduler.timesteps[0], x)

    def unknown_prediction(scheduler):
        scheduler.register_to_config(prediction_type="nothing")
        scheduler.set_timesteps(3)
        scheduler.step(x, scheduler.timesteps[0], x)

    def nothing(scheduler):
        scheduler.set_timesteps(3)
        scheduler.step(None, scheduler.timesteps[0], x)

    def nowhere(scheduler):
        scheduler.set_timesteps(3)
        scheduler.step(x, scheduler.timesteps[0], None)

    def shapes(scheduler):
        scheduler.set_timesteps(3)
        scheduler.step(torch.ones(1, 5, 3), scheduler.timesteps[0], x)

    def refusal(module, call):
        scheduler = getattr(module, name)()
        with pytest.raises(Exception) as caught:
            call(scheduler)
        return type(caught.value), str(caught.value)

    calls = [before_set_timesteps, too_many, unknown_prediction, nothing, nowhere, shapes]
    for call in calls:
        assert refusal(ours, call) == refusal(diffusers, call), call


@names
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["midpoint", "heun", "nothing"])
@pytest.mark.parametrize(
    "algorithm", ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "nothing"]
)
def test_algorithms_set_after_construction(name, order, solver, algorithm):
    """Those that a class refuses at construction get what its peer's step makes of them."""
    ends = []
    for module in (diffusers, ours):
        scheduler = getattr(module, name)(solver_order=order)
        changes = {} if name in (INVERTED, DEIS) else {"final_sigmas_type": "sigma_min"}
        if name != EDM:
            changes.update(FLOW)
        if not algorithm.endswith("++") and "prediction_type" in changes:
            changes["prediction_type"] = "epsilon"
        scheduler.register_to_config(algorithm_type=algorithm, solver_type=solver, **changes)
        torch.manual_seed(0)
        try:
            scheduler.set_timesteps(6)
            ends.append(walk(scheduler, start(1, 2, 3), scheduler.timesteps))
        except Exception as refusal:
            ends.append((type(refusal), str(refusal).replace("genfast.dropin.", "")))
    theirs, mine = ends
    assert type(mine) is type(theirs), ends
    close(mine, theirs)
