"""Public ops: signatures, checks and dispatch. The arithmetic is in the backends."""

from genfast.ops import (  # noqa: F401
    attention,
    attention_cached,
    code_update,
    gradient_bucket,
    kmeans,
    multiscale_quantize,
    nearest_code_index,
    residual_quantize,
    sampler_step,
    scalar_quantize,
    token_head,
    token_masking,
    token_sampling,
    token_transfer,
    token_transition,
    vector_quantize,
)
