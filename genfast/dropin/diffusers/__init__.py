"""Schedulers of diffusers with fused steps."""

from genfast.dropin.diffusers.ddim import DDIMInverseScheduler, DDIMParallelScheduler, DDIMScheduler
from genfast.dropin.diffusers.euler import EulerDiscreteScheduler
from genfast.dropin.diffusers.flow_match_euler import FlowMatchEulerDiscreteScheduler
