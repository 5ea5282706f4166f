"""The schedulers of diffusers with a fused ``step``: the same classes by inheritance, one kernel a step.

Configuration, ``set_timesteps``, ``add_noise``, ``scale_model_input``, attributes, output objects, pickling,
``save_pretrained``: all as in diffusers. The same generator gives the same sample, to a few units in the last place in
float32; in half precision the arithmetic of a step is float32 with one rounding at its end, where the peer rounds in
between. Every stochastic ``step`` also takes ``seed=``, noise drawn inside the kernel. The schedulers of tokens
(``discrete.py``) run fused where a step is greedy or has a seed. A configuration or a call without a fused form
(gradients, broadcasting, tensor subclasses, other devices) runs the peer's own ``step``.
"""

# ruff: noqa: E402, F401 (the check comes before what it guards; the names are collected below)
from genfast.dropin.patching import PEERS

PEERS["diffusers"].check()

from diffusers.utils import is_scipy_available, is_torchsde_available

from genfast.dropin.diffusers.amused import AmusedScheduler
from genfast.dropin.diffusers.base import peer_class
from genfast.dropin.diffusers.block_refinement import BlockRefinementScheduler
from genfast.dropin.diffusers.consistency import CMStochasticIterativeScheduler
from genfast.dropin.diffusers.ddim import DDIMInverseScheduler, DDIMParallelScheduler, DDIMScheduler
from genfast.dropin.diffusers.ddpm import DDPMParallelScheduler, DDPMScheduler
from genfast.dropin.diffusers.deis import DEISMultistepScheduler
from genfast.dropin.diffusers.discrete_ddim import DiscreteDDIMScheduler
from genfast.dropin.diffusers.dpm_multistep import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler
from genfast.dropin.diffusers.dpm_singlestep import DPMSolverSinglestepScheduler
from genfast.dropin.diffusers.edm_dpm import EDMDPMSolverMultistepScheduler
from genfast.dropin.diffusers.edm_euler import EDMEulerScheduler
from genfast.dropin.diffusers.entropy_bound import EntropyBoundScheduler
from genfast.dropin.diffusers.euler import EulerDiscreteScheduler
from genfast.dropin.diffusers.euler_ancestral import EulerAncestralDiscreteScheduler
from genfast.dropin.diffusers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from genfast.dropin.diffusers.flow_match_heun import FlowMatchHeunDiscreteScheduler
from genfast.dropin.diffusers.heun import HeunDiscreteScheduler
from genfast.dropin.diffusers.kdpm2 import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from genfast.dropin.diffusers.lcm import LCMScheduler
from genfast.dropin.diffusers.pndm import PNDMScheduler
from genfast.dropin.diffusers.repaint import RePaintScheduler
from genfast.dropin.diffusers.sasolver import SASolverScheduler
from genfast.dropin.diffusers.score_sde_ve import ScoreSdeVeScheduler
from genfast.dropin.diffusers.tcd import TCDScheduler
from genfast.dropin.diffusers.unclip import UnCLIPScheduler
from genfast.dropin.diffusers.unipc import UniPCMultistepScheduler
from genfast.dropin.diffusers.vq_diffusion import VQDiffusionScheduler

if is_scipy_available():
    from genfast.dropin.diffusers.lms import LMSDiscreteScheduler
if is_torchsde_available():
    from genfast.dropin.diffusers.dpm_sde import DPMSolverSDEScheduler

__all__ = [name for name in dir() if name.endswith("Scheduler")]


def replacements() -> list[tuple[type, type]]:
    """(theirs, ours) for every class of this package."""
    return [(peer_class(cls), cls) for cls in map(globals().get, __all__)]
