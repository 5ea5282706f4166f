"""The quantisers of vector-quantize-pytorch: the same classes by inheritance, quantising in one fused pass.

Arguments, buffers, state dicts, projections and what is returned: all as in the peer. A configuration or a call without
a fused form runs the peer's own ``forward``. :func:`adopt` makes the vector quantisers of a model that exists ours.
"""

# ruff: noqa: E402 (the check comes before what it guards)
from genfast.dropin.patching import PEERS

PEERS["vector_quantize_pytorch"].check()

from genfast.dropin.vector_quantize_pytorch.fsq import FSQ
from genfast.dropin.vector_quantize_pytorch.lfq import LFQ
from genfast.dropin.vector_quantize_pytorch.residual_vq import GroupedResidualVQ, ResidualVQ, adopt  # noqa: F401
from genfast.dropin.vector_quantize_pytorch.vector_quantize import VectorQuantize

__all__ = ["FSQ", "LFQ", "GroupedResidualVQ", "ResidualVQ", "VectorQuantize"]


def replacements() -> list[tuple[type, type]]:
    """(theirs, ours) for every class of this package."""
    return [(cls.__mro__[1], cls) for cls in map(globals().get, __all__)]
