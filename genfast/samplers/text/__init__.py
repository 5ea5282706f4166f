"""Whole sampling loops of masked diffusion language models, built from the ops of ``token_sampling``.

A model is called as ``model(ids)`` with ids int64 [B, L] (and ``attention_mask`` [B, L] where prompts are padded) and
answers with logits [B, L, V], an object with ``logits``, or a tuple that begins with them.
"""

from genfast.samplers.text.bd3lm import generate_bd3lm
from genfast.samplers.text.block_diffusion import generate_block_diffusion
from genfast.samplers.text.dream import generate_dream
from genfast.samplers.text.fast_dllm import generate_fast_dllm
from genfast.samplers.text.llada import generate_llada
from genfast.samplers.text.mdlm import generate_mdlm
from genfast.samplers.text.noise import GeometricNoise, LogLinearNoise
from genfast.samplers.text.run import TextSample, TextState
from genfast.samplers.text.sedd import generate_sedd

__all__ = [
    "GeometricNoise",
    "LogLinearNoise",
    "TextSample",
    "TextState",
    "generate_bd3lm",
    "generate_block_diffusion",
    "generate_dream",
    "generate_fast_dllm",
    "generate_llada",
    "generate_mdlm",
    "generate_sedd",
]
