"""Whole sampling loops of masked diffusion language models, built from the ops of ``token_sampling``.

A model is called as ``model(ids)`` with ids int64 [B, L] (and ``attention_mask`` [B, L] where prompts are padded) and
answers with logits [B, L, V], an object with ``logits``, or a tuple that begins with them.
"""

from genfast.samplers.text.bd3lm import generate_bd3lm
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
    "generate_mdlm",
    "generate_sedd",
]
