"""Public ops: signatures, checks and dispatch. The arithmetic is in the backends."""

from genfast.ops import attention, sampler_step, token_masking, token_sampling, token_transfer  # noqa: F401
