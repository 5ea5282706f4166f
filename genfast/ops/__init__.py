"""Public ops: signatures, checks and dispatch. The arithmetic is in the backends."""

from genfast.ops import (  # noqa: F401
    attention,
    attention_cached,
    gradient_bucket,
    sampler_step,
    token_head,
    token_masking,
    token_sampling,
    token_transfer,
    token_transition,
)
