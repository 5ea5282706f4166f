"""The ops of the family ``token_sampling`` that read hidden states and the head's weight: no logits are stored.

There is no CUDA C++: the work is a matrix product, which Triton hands to the tensor cores like cuBLAS does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.ops._checks import (
    check_counters,
    check_logits,
    checked_seed,
    checked_temperature,
    fresh_seed,
    id_list,
    indices,
    joined,
    sequences,
)
from genfast.ops.token_sampling import MOST_ENTRIES, TokenSample
from genfast.reference.token_head import tiles
from genfast.reference.token_sampling import LOG2_E, scale

FAMILY = "token_sampling"
CONFIDENCES = ("probability", "tempered")
STATISTICS = ("logsumexp",)


@export(FAMILY)
class HeadPartials(NamedTuple):
    """What :func:`lm_head_partials` returns: [M, tiles] of a vocabulary cut in tiles of 512; None where not needed.

    To merge what tensor-parallel ranks have found, gather them and give :func:`merge_head_partials` the list, in order
    of the vocabulary.
    """

    largest: Tensor
    """float32: the largest logit."""
    index: Tensor
    """int32: its place in the whole vocabulary; the lowest among equals."""
    exponentials: Tensor | None
    """float32: the sum of exp(logit - largest)."""
    judged_largest: Tensor | None
    """float32: the largest logit that counts in the confidence; None where that is ``largest``."""
    judged_sum: Tensor | None
    """float32: the sum of exp((logit - judged_largest) / temperature) of those, the temperature being the
    confidence's."""
    judged_logit: Tensor | None
    """float32: the logit of the tile's candidate, -inf if it counts for nothing; None where that is ``largest``."""
    mass: Tensor | None
    """int64: the whole-number weight of the tile."""
    candidate: Tensor | None
    """int32: the entry drawn within the tile."""
    uniform: Tensor | None
    """int64 [M]: the bits that draw the tile."""
    scale: Tensor | None
    """float32 [M]: log2(e) / temperature of the draw; 0 takes the largest."""
    judged_scale: Tensor | None
    """float32 [M]: the same of the confidence; None: temperature 1."""


@export(FAMILY)
def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    suppress: Sequence[int] | Tensor | None = None,
    suppress_confidence: Sequence[int] | Tensor | None = None,
    mask_id: int | None = None,
    softcap: float | None = None,
    rows: Tensor | None = None,
    confidence: str | None = "probability",
    statistics: Sequence[str] = (),
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    row_ids: Tensor | None = None,
) -> TokenSample:
    """A token and a confidence per row of hidden states: the head's matrix product and the draw in one.

    No logits are stored: beside the outputs there are 12 to 36 bytes per row and 512 entries of the vocabulary, and
    a buffer per thread. The weight is read once for some hundred rows. It is not differentiable.

    Args:
        hidden: [..., L, d], [R, d] or [d], the last hidden states after the final norm; float32, bfloat16 or float16.
            All dimensions before the last two count as the batch; [R, d] is R sequences of one position.
        weight: [V, d], of the same dtype and device; rows may have any stride (columns that are no neighbours are
            copied).
        bias: [V], float32 or the dtype of the weight.
        temperature: 0 takes the largest logit (the lowest index among equals), otherwise a draw from
            softmax(logits / temperature). A float, or a tensor with one per row of the result.
        suppress, mask_id: ids that are never taken and have no share in any probability.
        suppress_confidence: ids that may be taken, but count as probability 0 in the confidence.
        softcap: c of c tanh(logit / c), after the bias (Gemma).
        rows: int64 [M], the rows to compute, counted over all dimensions but the last; by default all.
        confidence: ``"probability"`` of the token at temperature 1, or ``"tempered"``, at the temperature of the draw
            (1 where that is 0); or None.
        statistics: ``("logsumexp",)`` for that of the logits at temperature 1.
        seed, stream, offset, row_ids: the source of randomness, addressed as in :func:`sample_tokens`. The draws are
            others than there: each tile of the vocabulary has its own.

    Returns:
        :class:`TokenSample`, tensors of shape hidden.shape[:-1], or [M] with ``rows``. Logits are float32 sums of exact
        products, not rounded to the dtype of the weight, so that a token can differ from one taken from stored logits.
        A row of nothing but -inf gives token 0 and confidence 0; one with a NaN or +inf the place of the first one and
        NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    The draw is exact: in each tile a candidate by inverse CDF, then a tile by the tiles' masses, all in whole numbers
    (``genfast/reference/token_head.py``), so that it does not depend on batch split, threads or ranks.
    """
    size = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0
    call = _checked(
        hidden, weight, bias, temperature, suppress, suppress_confidence, mask_id, softcap, rows, confidence,
        statistics, seed, stream, offset, row_ids, 0, size, True,
    )  # fmt: skip
    shape = hidden.shape[:-1] if rows is None else rows.shape
    return TokenSample(*(t if t is None else t.reshape(shape) for t in _merged(_partials(*call))[:3]))


@export(FAMILY)
def lm_head_partials(
    hidden: Tensor,
    weight: Tensor,
    *,
    first: int = 0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    suppress: Sequence[int] | Tensor | None = None,
    suppress_confidence: Sequence[int] | Tensor | None = None,
    mask_id: int | None = None,
    softcap: float | None = None,
    rows: Tensor | None = None,
    confidence: str | None = "probability",
    statistics: Sequence[str] = (),
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    row_ids: Tensor | None = None,
) -> HeadPartials:
    """The share of one tensor-parallel rank in :func:`lm_head_sample`: some numbers per tile of the vocabulary.

    Args:
        hidden: as in :func:`lm_head_sample`, the same on every rank.
        weight, bias: this rank's rows, [first, first + V) of the whole vocabulary.
        first: where they begin. Multiples of 512 on every rank make the tokens those of :func:`lm_head_sample` on the
            whole weight; otherwise a tile is cut in two, the distribution is the same and the tokens may be others.
        suppress, suppress_confidence, mask_id: ids of the whole vocabulary; those of other ranks are passed over.
        seed: needed where a temperature is above 0, the same on every rank.

    The other arguments, the same on every rank, and the errors are those of :func:`lm_head_sample`.

    Returns:
        :class:`HeadPartials` for :func:`merge_head_partials`.
    """
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first <= MOST_ENTRIES:
        raise ValueError(f"first must be a whole number in [0, 2^31), got {first!r}")
    call = _checked(
        hidden, weight, bias, temperature, suppress, suppress_confidence, mask_id, softcap, rows, confidence,
        statistics, seed, stream, offset, row_ids, first, MOST_ENTRIES, False,
    )  # fmt: skip
    return _partials(*call)


@export(FAMILY)
def merge_head_partials(parts: HeadPartials | Sequence[HeadPartials]) -> TokenSample:
    """Tokens and confidences out of all the tiles of a vocabulary, as every tensor-parallel rank computes them.

    Args:
        parts: of one call of :func:`lm_head_partials` per rank, with equal arguments, in order of the vocabulary; or
            one with all of them already concatenated along the tiles.

    Returns:
        :class:`TokenSample` of tensors [M]: confidence and logsumexp where the calls asked for them.

    Raises:
        TypeError, ValueError: parts that are no :class:`HeadPartials`, or do not belong together.
    """
    parts = [parts] if isinstance(parts, HeadPartials) else parts
    if not isinstance(parts, Sequence) or not parts or not all(isinstance(part, HeadPartials) for part in parts):
        raise TypeError("parts must be HeadPartials, one or a list of at least one")
    head = parts[0]
    if not isinstance(head.largest, Tensor) or head.largest.dim() != 2 or not head.largest.shape[1]:
        raise ValueError("parts[0].largest must be a tensor [M, tiles] of at least one tile")
    for k, part in enumerate(parts):
        size = part.largest.shape[1] if isinstance(part.largest, Tensor) and part.largest.dim() == 2 else -1
        for name, ours, theirs in zip(HeadPartials._fields, part, head):
            shape = (len(head.largest),) if name in _PER_ROW else (len(head.largest), size)
            if (ours is None) != (theirs is None) or (
                ours is not None and (ours.shape != shape or ours.dtype != theirs.dtype or ours.device != theirs.device)
            ):
                raise ValueError(f"parts[{k}].{name} does not belong to parts[0]: they come of calls that differ")
    if len(parts) > 1:
        joint = {
            name: values[0] if values[0] is None or name in _PER_ROW else torch.cat(values, dim=1)
            for name, values in zip(HeadPartials._fields, zip(*parts))
        }
        head = HeadPartials(**joint)
    return _merged(head)


_PER_ROW = ("uniform", "scale", "judged_scale")


# --- checks ----------------------------------------------------------------------------------------------------------


def _checked(
    hidden, weight, bias, temperature, suppress, suppress_confidence, mask_id, softcap, rows, confidence, statistics,
    seed, stream, offset, row_ids, first, size, may_seed,
) -> tuple:  # fmt: skip
    """The arguments of :func:`_partials`. ``size`` bounds ids; ``may_seed``: a missing seed may be made up."""
    check_logits("hidden", hidden)
    check_logits("weight", weight)
    if hidden.dim() == 0 or weight.dim() != 2 or 0 in weight.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; expected [..., d] and [V, d], V and d of "
            "at least 1"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise TypeError(
            f"weight is {weight.dtype} on {weight.device}; expected {hidden.dtype} on {hidden.device}, as hidden"
        )
    device = hidden.device
    if first + weight.shape[0] > MOST_ENTRIES:
        raise ValueError(f"the vocabulary has {first + weight.shape[0]} entries; at most {MOST_ENTRIES}")
    if bias is not None:
        check_logits("bias", bias)
        if bias.dtype not in (torch.float32, weight.dtype) or bias.device != device:
            raise TypeError(f"bias is {bias.dtype} on {bias.device}; expected float32 or {weight.dtype} on {device}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias is {list(bias.shape)}; expected {list(weight.shape[:1])}")
        bias = bias.detach().contiguous()
    shape, count = hidden.shape[:-1], math.prod(hidden.shape[:-1])
    if rows is not None:
        rows = indices("rows", rows, count, device)
        shape = rows.shape
    wanted = math.prod(shape)
    temperature = checked_temperature(temperature, wanted, device)
    hot = isinstance(temperature, Tensor) or temperature > 0
    if mask_id is not None:
        suppress = [mask_id] if suppress is None else joined(suppress, mask_id)
    suppress = id_list("suppress", suppress, size, device)
    suppress_confidence = id_list("suppress_confidence", suppress_confidence, size, device)
    if softcap is not None and not 1e-3 <= softcap <= 1e6:
        raise ValueError(f"softcap must be in [0.001, 1000000], got {softcap}")
    if confidence is not None and confidence not in CONFIDENCES:
        raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)} or None; got {confidence!r}")
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"statistics must be among {', '.join(STATISTICS)}; got {name!r}")
    check_counters(stream, offset)
    if seed is not None:
        batch = math.prod(hidden.shape[:-2]) if hidden.dim() > 2 else count
        seed = checked_seed(seed, batch, device)
    elif hot and may_seed:
        seed = fresh_seed()
    elif hot:
        raise ValueError("seed is missing: with a temperature above 0 all ranks need the same one")
    if row_ids is not None:
        if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64:
            raise TypeError("row_ids must be an int64 tensor")
        if row_ids.numel() != wanted or row_ids.device != device:
            raise ValueError(
                f"row_ids is {list(row_ids.shape)} on {row_ids.device}; expected {list(shape)} on {device}"
            )
        row_ids = row_ids.reshape(-1).contiguous()

    scales = judged_scales = None
    if isinstance(temperature, Tensor):
        scales = scale(temperature)
    elif hot:
        scales = torch.full((wanted,), scale(temperature), device=device)
    if scales is not None and confidence == "tempered":
        judged_scales = torch.where(scales > 0, scales, LOG2_E)
    weight = weight.detach()
    return (
        sequences(hidden),
        weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous(),
        bias,
        first,
        scales,
        judged_scales,
        suppress,
        suppress_confidence,
        0.0 if softcap is None else float(softcap),
        rows,
        confidence is not None,
        "logsumexp" in statistics,
        seed if isinstance(seed, Tensor) else None,
        seed if isinstance(seed, int) else None,
        stream,
        offset,
        row_ids,
    )


def _partials(*call) -> HeadPartials:
    scales, judged_scales, quiet, judged, logsumexp = call[4], call[5], call[7], call[10], call[11]
    run = _partials_op if torch.compiler.is_compiling() else _run_partials
    largest, index, exponentials, judged_largest, judged_sum, judged_logit, mass, candidate, uniform = run(*call)
    hot = scales is not None
    shared = judged and not _apart(judged_scales, quiet)
    return HeadPartials(
        largest=largest,
        index=index,
        exponentials=exponentials if logsumexp else None,
        judged_largest=judged_largest if judged and quiet is not None else None,
        judged_sum=None if not judged else exponentials if shared else judged_sum,
        judged_logit=judged_logit if judged and (hot or quiet is not None) else None,
        mass=mass if hot else None,
        candidate=candidate if hot else None,
        uniform=uniform if hot else None,
        scale=scales,
        judged_scale=judged_scales,
    )


def _apart(judged_scales, quiet) -> bool:
    """Whether the confidence needs a sum of its own."""
    return judged_scales is not None or quiet is not None


def _merged(parts: HeadPartials) -> TokenSample:
    run = _merge_op if torch.compiler.is_compiling() else _run_merge
    tokens, confidences, logsumexp = run(*parts)
    return TokenSample(
        tokens, None if parts.judged_sum is None else confidences, None if parts.exponentials is None else logsumexp
    )


# --- torch.library ---------------------------------------------------------------------------------------------------


def _run_partials(
    hidden, weight, bias, first, scales, judged_scales, suppress, suppress_confidence, softcap, rows, judged, logsumexp,
    seeds, seed, stream, offset, ids,
) -> list[Tensor]:  # fmt: skip
    """The fields of :class:`HeadPartials` up to ``uniform``; empty tensors for those not needed."""
    outputs = _allocate(hidden, weight, first, scales, judged_scales, suppress_confidence, rows, judged, logsumexp)
    name, function = choose(FAMILY, "lm_head_partials", hidden.device)
    with profiling.op_range(FAMILY, f"lm_head_partials[{name}]", outputs[0].shape[0], weight.shape[0], weight.shape[1]):
        function(
            hidden,
            weight,
            bias=bias,
            first=first,
            scale=scales,
            judged_scale=judged_scales,
            suppress=suppress,
            suppress_confidence=suppress_confidence,
            softcap=softcap,
            rows=rows,
            seed=seed if seeds is None else seeds,
            stream=stream,
            offset=offset,
            ids=ids,
            **{k: v if asked else None for k, v, asked in zip(HeadPartials._fields, outputs, _asked(
                scales, judged_scales, suppress_confidence, judged, logsumexp))},
        )  # fmt: skip
    return outputs


def _asked(scales, judged_scales, quiet, judged, logsumexp) -> tuple[bool, ...]:
    """Which fields are computed."""
    hot, apart = scales is not None, _apart(judged_scales, quiet)
    return (
        True,
        True,
        logsumexp or (judged and not apart),
        judged and quiet is not None,
        judged and apart,
        judged and (hot or quiet is not None),
        hot,
        hot,
        hot,
    )


_DTYPES = (
    torch.float32, torch.int32, torch.float32, torch.float32, torch.float32, torch.float32, torch.int64, torch.int32,
    torch.int64,
)  # fmt: skip


def _allocate(hidden, weight, first, scales, judged_scales, quiet, rows, judged, logsumexp) -> list[Tensor]:
    count = rows.numel() if rows is not None else hidden.shape[0] * hidden.shape[1]
    size = len(tiles(first, weight.shape[0]))
    found = []
    for k, (asked, dtype) in enumerate(zip(_asked(scales, judged_scales, quiet, judged, logsumexp), _DTYPES)):
        shape = (count,) if HeadPartials._fields[k] in _PER_ROW else (count, size)
        found.append(hidden.new_empty(shape if asked else 0, dtype=dtype))
    return found


_partials_op = torch.library.custom_op(
    "genfast::lm_head_partials",
    _run_partials,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, int first, Tensor? scales, Tensor? judged_scales, "
    "Tensor? suppress, Tensor? suppress_confidence, float softcap, Tensor? rows, bool judged, bool logsumexp, "
    "Tensor? seeds, int? seed, int stream, int offset, Tensor? ids) -> Tensor[]",
)


@_partials_op.register_fake
def _partials_fake(
    hidden, weight, bias, first, scales, judged_scales, suppress, suppress_confidence, softcap, rows, judged, logsumexp,
    seeds, seed, stream, offset, ids,
):  # fmt: skip
    return _allocate(hidden, weight, first, scales, judged_scales, suppress_confidence, rows, judged, logsumexp)


def _run_merge(largest, index, *fields) -> list[Tensor]:
    """Tokens, confidence, logsumexp; empty tensors where the partials do not hold them."""
    named = dict(zip(HeadPartials._fields[2:], fields))
    outputs = _allocate_merged(largest, named["judged_sum"], named["exponentials"])
    name, function = choose(FAMILY, "merge_head_partials", largest.device)
    with profiling.op_range(FAMILY, f"merge_head_partials[{name}]", *largest.shape):
        function(
            largest.contiguous(),
            index.contiguous(),
            **{k: None if t is None else t.contiguous() for k, t in named.items()},
            tokens=outputs[0],
            confidences=None if named["judged_sum"] is None else outputs[1],
            logsumexp=None if named["exponentials"] is None else outputs[2],
        )
    return outputs


def _allocate_merged(largest, judged_sum, exponentials) -> list[Tensor]:
    count = largest.shape[0]
    return [
        largest.new_empty(count, dtype=torch.int64),
        largest.new_empty(0 if judged_sum is None else count),
        largest.new_empty(0 if exponentials is None else count),
    ]


def _merge_impl(
    largest, index, exponentials, judged_largest, judged_sum, judged_logit, mass, candidate, uniform, scale,
    judged_scale,
) -> list[Tensor]:  # fmt: skip
    return _run_merge(
        largest, index, exponentials, judged_largest, judged_sum, judged_logit, mass, candidate, uniform, scale,
        judged_scale,
    )  # fmt: skip


_merge_op = torch.library.custom_op(
    "genfast::merge_head_partials",
    _merge_impl,
    mutates_args=(),
    schema="(Tensor largest, Tensor index, Tensor? exponentials, Tensor? judged_largest, Tensor? judged_sum, "
    "Tensor? judged_logit, Tensor? mass, Tensor? candidate, Tensor? uniform, Tensor? scale, Tensor? judged_scale) "
    "-> Tensor[]",
)


@_merge_op.register_fake
def _merge_fake(largest, index, exponentials, judged_largest, judged_sum, *rest):
    return _allocate_merged(largest, judged_sum, exponentials)
