"""Fused kernels for generative models: sampler steps, token sampling, attention, vector quantisation, all-reduce.

Every op has a plain PyTorch reference (``genfast.reference``) and is checked against it (``genfast verify``).
"""

import torch  # noqa: F401  (first, so that the native modules find the OpenMP runtime that torch loaded)

from genfast import checks, distributed, dropin, memory, ops, profiling, samplers  # noqa: F401
from genfast._registry import PUBLIC

__version__ = "0.1.0"

globals().update({name: entry.value for name, entry in PUBLIC.items()})
__all__ = sorted(PUBLIC)
