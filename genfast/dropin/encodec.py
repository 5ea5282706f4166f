"""The codebooks of Hugging Face's EnCodec and DAC, looked up without a tensor of vectors by codes:

    model = genfast.dropin.encodec.replace(transformers.EncodecModel.from_pretrained("facebook/encodec_24khz"))

``replace`` works on any model that holds such codebooks (``DacModel``, MusicGen's audio encoder) and leaves its
parameters, buffers and results what they are; ``restore`` undoes it. Vectors and codes are read in place, channel-first
as the models have them, and in half precision the code is the nearest to what is stored.
"""

from __future__ import annotations

from torch import nn

from genfast.dropin.codes import nearest
from genfast.dropin.patching import PEERS

PEERS["transformers"].check()

from transformers.integrations.accelerate import force_accelerate_hooks  # noqa: E402 (after the check)
from transformers.models.dac import modeling_dac as dac  # noqa: E402
from transformers.models.encodec import modeling_encodec as encodec  # noqa: E402


class EncodecEuclideanCodebook(encodec.EncodecEuclideanCodebook):
    """The nearest code by Euclidean distance."""

    def quantize(self, hidden_states):
        """int64 [N] of [N, D]."""
        return nearest(hidden_states, self.embed)


class EncodecVectorQuantization(encodec.EncodecVectorQuantization):
    """One stage of the residual quantiser."""

    def encode(self, hidden_states):
        """int64 [B, T] of [B, D, T]."""
        return nearest(hidden_states, self.codebook.embed, dim=1)


class DacVectorQuantize(dac.DacVectorQuantize):
    """One stage of DAC: the code with the largest cosine, in few dimensions between two projections."""

    @force_accelerate_hooks("codebook")
    def decode_latents(self, hidden_states):
        """(codes [B, D, T], int64 [B, T]) of [B, D, T]."""
        indices = nearest(hidden_states, self.codebook.weight, dim=1, metric="cosine")
        return self.codebook(indices).transpose(1, 2), indices


OURS = {cls.__mro__[1]: cls for cls in (EncodecEuclideanCodebook, EncodecVectorQuantization, DacVectorQuantize)}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def replace(model: nn.Module) -> nn.Module:
    """Look up the codebooks of a model with :func:`nearest_code`, in place.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no codebook of EnCodec or DAC in it.
    """
    return _swapped(model, OURS)


def restore(model: nn.Module) -> nn.Module:
    """Give the codebooks of a model transformers' own code back; the inverse of :func:`replace`."""
    return _swapped(model, THEIRS)


def _swapped(model: nn.Module, classes: dict[type, type]) -> nn.Module:
    found = [module for module in model.modules() if type(module) in classes]
    if not found and not any(type(module) in classes.values() for module in model.modules()):
        raise ValueError(f"model {type(model).__name__} has no codebook of EnCodec or DAC")
    for module in found:
        module.__class__ = classes[type(module)]
    return model
