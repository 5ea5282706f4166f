"""Whole sampling loops over a user's ``model(x, t)``, built from the one op :func:`genfast.sampler_step`."""

from genfast.samplers.flow import reflow_pairs
from genfast.samplers.sampler import Sampler, SamplerState, sample
from genfast.samplers.schedules import noise_schedule
from genfast.samplers.table import SAMPLERS
from genfast.samplers.text import (
    GeometricNoise,
    LogLinearNoise,
    TextSample,
    TextState,
    generate_bd3lm,
    generate_block_diffusion,
    generate_dream,
    generate_fast_dllm,
    generate_llada,
    generate_mdlm,
    generate_sedd,
)
from genfast.samplers.trajectory import Trajectory

__all__ = [
    "SAMPLERS",
    "GeometricNoise",
    "LogLinearNoise",
    "Sampler",
    "SamplerState",
    "TextSample",
    "TextState",
    "Trajectory",
    "generate_bd3lm",
    "generate_block_diffusion",
    "generate_dream",
    "generate_fast_dllm",
    "generate_llada",
    "generate_mdlm",
    "generate_sedd",
    "noise_schedule",
    "reflow_pairs",
    "sample",
]
