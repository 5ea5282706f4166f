"""The memory that the CPU kernels keep for their next results."""

from __future__ import annotations

from genfast import backends
from genfast._registry import export


@export("package")
def release_memory() -> int:
    """Give the memory that genfast keeps for its next results back to the system.

    New results of the CPU kernels lie in a pool: when such a tensor is dropped, its memory is kept for the next one of
    the same size, at most 256 MiB and 32 tensors, the oldest going first. In a sampling loop this saves the page faults
    of fresh memory, which at large shapes cost more than the step. Tensors that are in use are not touched.

    Returns:
        The number of bytes given back.
    """
    modules = {backends.native_module(f"cpu_{isa}") for isa in backends.machine_isas()}
    return sum(module.release_memory() for module in modules)
