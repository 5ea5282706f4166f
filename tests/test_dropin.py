"""Putting the drop-ins in the place of a peer: patch, unpatch, accelerate, and what every fused scheduler shares."""

import copy
import importlib
import inspect
import json
import pickle
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import genfast
from genfast.dropin import patching

diffusers = pytest.importorskip("diffusers")
try:
    patching.PEERS["diffusers"].check()
except ImportError as unsupported:
    pytest.skip(str(unsupported), allow_module_level=True)

import genfast.dropin.diffusers as ours  # noqa: E402
from genfast.dropin.diffusers.base import output_maker, peer_class  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CLASSES = [cls for _, cls in ours.replacements()]
ARGUMENTS = {"AmusedScheduler": dict(mask_token_id=9), "VQDiffusionScheduler": dict(num_vec_classes=9)}
names = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def made(cls):
    return cls(**ARGUMENTS.get(cls.__name__, {}))


@pytest.fixture
def patched():
    with genfast.patch("diffusers") as done:
        yield done


# --- patch and unpatch -----------------------------------------------------------------------------------------------


def test_patch_swaps_every_place_and_unpatch_swaps_back():
    homes = [diffusers, diffusers.schedulers, importlib.import_module("diffusers.schedulers.scheduling_ddim")]
    before = [home.DDIMScheduler for home in homes]
    assert all(cls is peer_class(ours.DDIMScheduler) for cls in before)
    assert "DDIMScheduler" in genfast.patch("diffusers").names
    assert all(home.DDIMScheduler is ours.DDIMScheduler for home in homes)
    genfast.patch("diffusers")  # once more: nothing to do
    pipelines = importlib.reload(importlib.import_module("diffusers.pipelines.ddim.pipeline_ddim"))
    assert pipelines.DDIMScheduler is ours.DDIMScheduler  # a module that is loaded while the patch is in force
    genfast.unpatch("diffusers")
    assert [home.DDIMScheduler for home in homes] == before
    assert pipelines.DDIMScheduler is before[0]
    genfast.unpatch("diffusers")


def test_patch_reaches_names_that_were_never_looked_up():
    code = (
        "import genfast, diffusers; genfast.patch('diffusers'); import genfast.dropin.diffusers as ours\n"
        "from diffusers import EulerDiscreteScheduler; assert EulerDiscreteScheduler is ours.EulerDiscreteScheduler\n"
        "genfast.unpatch('diffusers')\n"
        "from diffusers import EulerDiscreteScheduler; assert EulerDiscreteScheduler is not ours.EulerDiscreteScheduler"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_peer_is_imported_only_when_asked_for():
    code = "import genfast, sys; sys.exit(any(m.split('.')[0] in ('diffusers', 'k_diffusion') for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_with_block():
    with genfast.patch("diffusers") as done:
        assert diffusers.DDIMScheduler is ours.DDIMScheduler and "DDIMScheduler" in repr(done)
    assert diffusers.DDIMScheduler is not ours.DDIMScheduler


def test_unknown_peers_and_releases(monkeypatch):
    for function in (genfast.patch, genfast.unpatch):
        with pytest.raises(
            ValueError, match=r"peer must be one of diffusers, k_diffusion, transformers, .*; got 'torch'"
        ):
            function("torch")
    for version in ("0.41.0", "0.43.0", "0.420.1"):
        monkeypatch.setattr(metadata, "version", lambda _, v=version: v)
        with pytest.raises(ImportError, match=f"diffusers {version} is installed, but .* release 0.42"):
            genfast.patch("diffusers")
        with pytest.raises(ImportError, match="nothing was swapped"):
            genfast.accelerate(diffusers.DDIMScheduler())

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match="diffusers is not installed"):
        genfast.patch("diffusers")
    assert diffusers.DDIMScheduler is not ours.DDIMScheduler


# --- accelerate ------------------------------------------------------------------------------------------------------


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipe(generator=generator, num_inference_steps=4, output_type="np").images)


@pytest.mark.parametrize("pipeline, scheduler", [("DDIMPipeline", "DDIMScheduler"), ("DDPMPipeline", "DDPMScheduler")])
def test_a_pipeline_gives_the_same_images(pipeline, scheduler, tmp_path):
    pipe = getattr(diffusers, pipeline)(unet(), getattr(diffusers, scheduler)())
    theirs, old = images(pipe), pipe.scheduler
    assert genfast.accelerate(pipe) is pipe
    assert type(pipe.scheduler) is getattr(ours, scheduler) and type(old) is getattr(diffusers, scheduler)
    torch.testing.assert_close(images(pipe), theirs, rtol=0, atol=1e-5)
    # What is saved is the peer's, for readers that know nothing of genfast.
    pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["scheduler"] == ["diffusers", scheduler]
    again = getattr(diffusers, pipeline).from_pretrained(tmp_path)
    assert type(again.scheduler) is getattr(diffusers, scheduler)
    torch.testing.assert_close(images(again), theirs, rtol=0, atol=1e-5)


def test_seeded_noise_of_a_pipeline():
    pipe = genfast.accelerate(diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()), seed=5)
    first = images(pipe)
    assert torch.equal(first, images(pipe))
    genfast.accelerate(pipe, seed=6)
    assert not torch.equal(first, images(pipe))


def test_state_is_carried_over():
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    fused = genfast.accelerate(scheduler)
    assert isinstance(fused, ours.EulerDiscreteScheduler) and fused.config == scheduler.config
    x, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for t in scheduler.timesteps[2:]:
        a, b = scheduler.scale_model_input(x, t), fused.scale_model_input(x, t)
        torch.testing.assert_close(a, b)
        a, b = scheduler.step(output, t, x).prev_sample, fused.step(output, t, x).prev_sample
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert genfast.accelerate(fused) is not fused  # a copy, for it may get a seed of its own
    assert genfast.accelerate(fused, seed=1).noise_seed == 1 and fused.noise_seed is None


def test_what_cannot_be_accelerated():
    with pytest.raises(TypeError, match="Linear has no scheduler"):
        genfast.accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"IPNDMScheduler has no fused class; there is one for Amused.*DDIMScheduler"):
        genfast.accelerate(diffusers.IPNDMScheduler())

    class Mine(diffusers.DDIMScheduler):
        def step(self, *args, **kwargs):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Mine has no fused class"):
        genfast.accelerate(Mine())


def test_anything_with_a_scheduler():
    class Holder:
        scheduler = diffusers.DDIMScheduler()

    holder = Holder()
    assert type(genfast.accelerate(holder).scheduler) is ours.DDIMScheduler


# --- what every class keeps of its peer ------------------------------------------------------------------------------


@names
def test_class_is_the_peers_by_inheritance(cls, tmp_path):
    peer = peer_class(cls)
    assert issubclass(cls, peer) and cls.__name__ == peer.__name__ and cls.__doc__
    theirs, mine = made(peer), made(cls)
    assert mine.config == theirs.config and getattr(mine, "order", None) == getattr(theirs, "order", None)
    mine.save_pretrained(tmp_path)
    assert type(peer.from_pretrained(tmp_path)) is peer and type(cls.from_pretrained(tmp_path)) is cls
    assert type(cls.from_config(theirs.config)) is cls
    assert {c.__name__ for c in mine.compatibles} == {c.__name__ for c in theirs.compatibles}
    for copied in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine), copy.copy(mine)):
        assert type(copied) is cls and copied.config == mine.config
    for method in ("__init__", "set_timesteps", "scale_model_input", "add_noise", "index_for_timestep"):
        if hasattr(peer, method):
            mine, theirs = (inspect.signature(getattr(c, method)).parameters for c in (cls, peer))
            assert [(p.name, p.kind, p.default) for p in mine.values()] == [
                (p.name, p.kind, p.default) for p in theirs.values()
            ], method


@names
def test_step_has_the_peers_signature(cls):
    peer = peer_class(cls)
    for method in ("step", "step_pred", "step_correct", "batch_step_no_noise"):
        if hasattr(peer, method):
            theirs = inspect.signature(getattr(peer, method)).parameters
            mine = inspect.signature(getattr(cls, method)).parameters
            assert list(mine)[: len(theirs)] == list(theirs)
            for name, parameter in theirs.items():
                assert mine[name].default == parameter.default or mine[name].default is parameter.default, name
            assert set(mine) - set(theirs) <= {"seed"}


@names
def test_attributes_after_set_timesteps_are_the_peers(cls):
    theirs, mine = made(peer_class(cls)), made(cls)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
    own = {"_plan", "_index", "_known_plans", "__module__"}
    assert set(vars(mine)) - own == set(vars(theirs))
    for name, value in vars(theirs).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(mine, name).nan_to_num(-1), value.nan_to_num(-1)), name
        elif isinstance(value, (int, float, str, type(None))):
            assert getattr(mine, name) == value, name


# --- plans follow the state ------------------------------------------------------------------------------------------

X, OUTPUT = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)), torch.full((1, 2, 3), 0.5)


def both(change):
    """The same change to a scheduler of ours and one of theirs, then one step of each."""
    results = []
    for module in (diffusers, ours):
        scheduler = module.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(8)
        scheduler.step(OUTPUT, scheduler.timesteps[0], X)
        change(scheduler)
        results.append(scheduler.step(OUTPUT, scheduler.timesteps[1], X).prev_sample)
    return results


def replaced(scheduler):
    scheduler.sigmas = scheduler.sigmas * 0.5


def in_place(scheduler):
    scheduler.sigmas.mul_(0.5)


def configured(scheduler):
    scheduler.register_to_config(stochastic_sampling=True)
    torch.manual_seed(0)


def in_inference_mode(scheduler):
    with torch.inference_mode():
        scheduler.set_timesteps(5)
        scheduler.step(OUTPUT, scheduler.timesteps[0], X)


@pytest.mark.parametrize("change", [replaced, in_place, configured, in_inference_mode, lambda s: None])
def test_a_changed_schedule_is_noticed(change):
    theirs, mine = both(change)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_schedule_seen_before_finds_its_tables():
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(5)
    first = scheduler.current_plan()
    scheduler.set_timesteps(6)
    assert scheduler.current_plan() is not first
    scheduler.set_timesteps(5)
    assert scheduler.current_plan() is first
    for n in range(10, 30):
        scheduler.set_timesteps(n)
    assert len(scheduler._known_plans) == scheduler.MOST_PLANS
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    scheduler.set_timesteps(5)
    assert scheduler.current_plan() is not first
    state = pickle.loads(pickle.dumps(scheduler)).__dict__
    assert not {"_plan", "_index", "_known_plans"} & set(state)


def test_tables_per_setting_are_bounded():
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(5)
    for k in range(200):
        scheduler.step(OUTPUT, 800, X, eta=k / 200, variance_noise=X)
    plan = scheduler.current_plan()
    assert len(plan.tables) <= plan.MOST_TABLES


# --- the host's share ------------------------------------------------------------------------------------------------


class Dispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


# Those with a step that draws nothing by default; ancestral ones draw, and so does the tree of DPMSolverSDE.
DETERMINISTIC = [
    cls
    for cls in CLASSES
    if hasattr(cls, "step")
    and cls.__name__ != "DPMSolverSDEScheduler"
    and (
        "generator" not in inspect.signature(cls.step).parameters
        or cls.__name__
        in ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler")
    )
]


@pytest.mark.skipif(genfast.backends.cpu_isa() is None, reason="needs a native module")
@pytest.mark.parametrize("cls", DETERMINISTIC, ids=lambda c: c.__name__)
def test_a_step_dispatches_next_to_nothing(cls):
    scheduler = cls()
    scheduler.set_timesteps(6)
    x = X.clone()
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, scheduler.timesteps[0])
    timesteps = list(scheduler.timesteps)
    for i, t in enumerate(timesteps):
        with Dispatches() as mode:
            x = scheduler.step(OUTPUT, t, x).prev_sample
        assert len(mode.seen) <= 2, (i, mode.seen)
        assert not any("_local_scalar_dense" in name or "nonzero" in name for name in mode.seen)


INDEXED = [cls for cls in CLASSES if hasattr(cls, "index_for_timestep")]


@pytest.mark.parametrize("cls", INDEXED, ids=lambda c: c.__name__)
def test_index_for_timestep_without_nonzero(cls):
    theirs, mine = peer_class(cls)(), cls()
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(7)
    with Dispatches() as mode:
        found = [mine.index_for_timestep(t) for t in list(mine.timesteps)]
    assert found == [theirs.index_for_timestep(t) for t in theirs.timesteps]
    assert not any("nonzero" in name for name in mode.seen)
    elsewhere = mine.timesteps.clone()
    assert mine.index_for_timestep(elsewhere[2]) == theirs.index_for_timestep(elsewhere[2])
    assert mine.index_for_timestep(elsewhere[2], elsewhere) == theirs.index_for_timestep(elsewhere[2], elsewhere)


def test_output_objects_are_the_peers():
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

    expected, made = DDIMSchedulerOutput(X, OUTPUT), output_maker(DDIMSchedulerOutput)(X, OUTPUT)
    scheduler = ours.EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    scheduler.scale_model_input(X, scheduler.timesteps[0])
    for k, output in enumerate((made, scheduler.step(OUTPUT, scheduler.timesteps[0], X))):
        assert list(output) == list(expected) and list(vars(output)) == list(vars(expected))
        assert output[0] is output["prev_sample"] is output.prev_sample
        assert output[1] is output["pred_original_sample"] is output.pred_original_sample
        assert isinstance(output, dict) and len(output.to_tuple()) == 2
        assert torch.equal(pickle.loads(pickle.dumps(output)).prev_sample, output.prev_sample)
        output.prev_sample = OUTPUT
        assert output["prev_sample"] is OUTPUT
        leaves, spec = torch.utils._pytree.tree_flatten(output)
        assert len(leaves) == 2 and type(torch.utils._pytree.tree_unflatten(leaves, spec)) is type(output)
        with pytest.raises(Exception, match="pop"):
            output.pop("prev_sample")
        assert k == 0 or type(output).__name__ == "EulerDiscreteSchedulerOutput"


def test_gradients_and_broadcasts_run_the_peers_code():
    for module in (diffusers, ours):
        scheduler = module.DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(5)
        x = X.clone().requires_grad_()
        scheduler.step(OUTPUT, 800, x).prev_sample.sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        wide = scheduler.step(OUTPUT.expand(1, 2, 3), 800, X.expand(4, 2, 3)).prev_sample
        assert wide.shape == (4, 2, 3)


def test_seed_is_refused_where_it_cannot_be_honoured():
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="seed and generator exclude each other"):
        scheduler.step(OUTPUT, 800, X, eta=1.0, seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"in-kernel noise .* needs a step that runs fused"):
        scheduler.step(OUTPUT, 800, X.clone().requires_grad_(), eta=1.0, seed=1)
    noise = genfast.randn(*X.shape, seed=1, stream=800)
    expected = scheduler.step(OUTPUT, 800, X, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(scheduler.step(OUTPUT, 800, X, eta=1.0, seed=1).prev_sample, expected)
