"""The op of the family ``token_sampling`` that makes a reverse step of SEDD or MDLM: checks, choice of backend.

There is no CUDA C++ here either: as in :mod:`genfast.ops.token_sampling`, a program per row is what Triton writes well.
A program whose row does not change ends after one load. A measurement on a GPU may say otherwise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.ops._checks import (
    LARGEST_TEMPERATURE,
    check_counters,
    check_logits,
    checked_seed,
    fresh_seed,
    uniform,
)
from genfast.reference.token_transition import coefficients

FAMILY = "token_sampling"
RULES = {"log_score": ("euler", "analytic", "denoise"), "logits": ("posterior",)}
"""Kinds of output, and the rules that take them."""
GRAPHS = ("absorb", "uniform")
MOST_ENTRIES = 2**31 - 1


@export(FAMILY)
class Transition(NamedTuple):
    """What :func:`discrete_transition` returns."""

    x: Tensor
    """int64 [B, L], the next state."""
    changed: Tensor
    """bool [B], on the device: whether any position of the row has changed. Where none has, MDLM's cached output holds
    for the next step too."""


@export(FAMILY)
def discrete_transition(
    x: Tensor,
    output: Tensor,
    amount: float | Tensor,
    *,
    kind: str = "log_score",
    graph: str = "absorb",
    rule: str = "analytic",
    mask_id: int | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_p_crossing: bool = True,
    active: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    row_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Transition:
    """One reverse step of SEDD or MDLM, from the model's output, without a distribution in memory.

    With s = exp(output) the score, x the current token, V the entries of a row, S the sum of s over y != x:

    * absorb, ``"analytic"``: p_y = (e^amount - 1) s_y and p_mask = 1 - (e^amount - 1) S; ``"euler"``: p_y = amount s_y
      and p_mask = 1 - amount S; ``"denoise"``: p_y proportional to s_y, the mask none, whatever the amount. The mask's
      own score is 1 by definition and not read. Tokens other than the mask never change; their rows are not read.
    * uniform, ``"analytic"`` and ``"denoise"`` (the same with all the noise): p_y proportional to
      (s_y - (1 - e^-amount) sum(s) / V) T_xy, where T is (1 - e^-amount) / V, plus e^-amount on the diagonal; here s_x
      counts as it comes (SEDD's model gives log score 0). ``"euler"``: p_y = amount s_y / V and
      p_x = 1 - (amount / V) S.
    * ``"posterior"``: the token stays the mask with probability ``amount``, otherwise it is drawn from
      softmax(output / temperature) without the mask. Rows that stay are not read.

    Negative entries count as 0, as in the published ``argmax p / noise``, where they can never win.

    Args:
        x: int64 [B, L], the state.
        output: [B, L, V], float32, bfloat16 or float16; rows may have any stride. Of ``kind`` ``"log_score"`` (SEDD)
            or ``"logits"`` (MDLM, before or after its SUBS parameterisation).
        amount: a float or a floating tensor with one per sequence. ``"euler"``: dt sigma'(t); ``"analytic"``:
            sigma(t) - sigma(s); ``"denoise"``: sigma(t); ``"posterior"``: m_s / m_t, the probability of staying
            masked, 0 at the last step (MDLM's loglinear noise: (t - dt) / t). A tensor is clamped to the possible
            values, a float is checked.
        kind, graph, rule: see above. ``"posterior"`` goes with ``"logits"`` and the absorbing graph, the other rules
            with ``"log_score"``. (MDLM's analytic and denoising updates are the posterior with the same m_s / m_t, and
            with 0.)
        mask_id: the absorbing token, by default the last one; none on the uniform graph.
        temperature, top_p, top_p_crossing: of the posterior's draw, as in :func:`sample_tokens`; temperature 0 takes
            the largest (MDLM's noise removal, with amount 0). BD3-LM's nucleus is ``top_p_crossing=False``.
        active: bool [B, L]: only these positions may change; by default all.
        seed, stream, offset, row_ids: the position's random numbers, as in :func:`sample_tokens` (same numbers as that
            op's; words 2 and 3 decide whether a token goes). Without any source, a seed is taken from torch's default
            generator.
        noise: uniform numbers in [0, 1), float32 or float64, [B, L, V] ([B, L, V - 1] for ``"denoise"`` where the mask
            is the last token, whose column the published code drops): the next token is then
            argmax p / (1e-10 - log(noise + 1e-10)), as in ``sample_categorical`` of SEDD, MDLM and BD3-LM.
        generator: draw ``noise`` from it, in float32 like the published code with float32 models. The same generator
            then gives the same tokens (but for near ties within the rounding of float32). It and ``noise`` are for
            parity: they cost 4 or 8 bytes per entry, and float32 noise, of 24 bits, cuts off shares below about 1e-8.
        out: where to write the next state, int64 [B, L]; may be ``x`` itself, and must not overlap it otherwise.

    Returns:
        :class:`Transition`. A row without a distribution (nothing but -inf, a NaN or +inf at an id that could be
        drawn, a NaN as amount) keeps its token. With an amount that is a float, and the same seed and positions, the
        tokens are the same on every backend and device, for any batch split and thread count; with a tensor too, as far
        as two devices' ``expm1`` agree in float64.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, or one that goes with
            another kind or graph. ``out`` is then untouched.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: SEDD (arXiv:2310.16834; ``graph_lib.py``, ``sampling.py``), MDLM (arXiv:2406.07524; ``diffusion.py``). The
    algorithm, to the bit: ``genfast/reference/token_transition.py``.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() != 2:
        raise TypeError("x must be an int64 tensor [B, L]")
    check_logits("output", output)
    device = x.device
    if output.dim() != 3 or output.shape[:2] != x.shape or output.shape[2] == 0 or output.device != device:
        raise ValueError(
            f"output is {list(output.shape)} on {output.device}; expected {[*x.shape, 'V']} on {device}, "
            "V of at least 1"
        )
    batch, _, size = output.shape
    if size > MOST_ENTRIES:
        raise ValueError(f"output has {size} entries per row; at most {MOST_ENTRIES}")
    for name, value, known in (("kind", kind, RULES), ("graph", graph, GRAPHS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if rule not in RULES[kind]:
        raise ValueError(f"rule for kind {kind!r} must be one of {', '.join(RULES[kind])}; got {rule!r}")
    if rule == "posterior" and graph != "absorb":
        raise ValueError(f"rule 'posterior' is of the graph 'absorb'; got graph {graph!r}")
    amount = _checked_amount(amount, rule, batch, device)
    mask_id = _checked_mask_id(mask_id, graph, size)
    if graph == "uniform" and device.type == "cpu" and not torch.compiler.is_compiling() and x.numel():
        low, high = (int(v) for v in x.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"x is out of range: {low} to {high} for {size} entries")
    if kind == "log_score" and (temperature != 1.0 or top_p is not None or not top_p_crossing):
        raise ValueError("temperature, top_p and top_p_crossing go with kind 'logits'")
    temperature = float(temperature)
    if not 0 <= temperature <= LARGEST_TEMPERATURE:
        raise ValueError(f"temperature must be in [0, {LARGEST_TEMPERATURE:g}], got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    _check_like_x("active", active, torch.bool, x)
    _check_like_x("out", out, torch.int64, x)
    if out is not None and any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.stride())):
        raise ValueError("out is an expanded tensor: several of its elements share one place in memory")
    if sum(source is not None for source in (noise, generator, seed)) > 1:
        raise ValueError("noise, generator and seed exclude each other: give one source of randomness")
    check_counters(stream, offset)
    if row_ids is not None:
        if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64:
            raise TypeError("row_ids must be an int64 tensor")
        if row_ids.numel() != x.numel() or row_ids.device != device:
            raise ValueError(
                f"row_ids is {list(row_ids.shape)} on {row_ids.device}; expected {list(x.shape)} on {device}"
            )
        row_ids = row_ids.reshape(-1).contiguous()
    width = size - (rule == "denoise" and mask_id == size - 1)
    if generator is not None:
        noise = uniform((*x.shape, width), generator, device, torch.float32)
    if noise is not None:
        noise = _checked_noise(noise, (*x.shape, width), device)
        if temperature == 0:
            raise ValueError("temperature 0 draws nothing: noise and generator need one above 0")
    if seed is not None:
        seed = checked_seed(seed, batch, device)
    elif noise is None:
        seed = fresh_seed()

    law, a, b = coefficients(graph, rule, amount, size)
    output = output.detach()
    if output.stride(2) != 1 and size > 1:
        output = output.contiguous()
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensor = isinstance(a, Tensor)
    run = _transition_op if torch.compiler.is_compiling() else _transition
    changed = run(
        x,
        output,
        law,
        a if tensor else None,
        0.0 if tensor else a,
        b if tensor else None,
        0.0 if tensor else b,
        mask_id,
        temperature,
        1.0 if top_p is None else float(top_p),
        bool(top_p_crossing),
        active,
        noise,
        seed if isinstance(seed, Tensor) else None,
        seed if isinstance(seed, int) else None,
        stream,
        offset,
        row_ids,
        out,
    )
    return Transition(out, changed)


# --- checks ----------------------------------------------------------------------------------------------------------


def _checked_amount(amount, rule: str, batch: int, device) -> float | Tensor:
    """A float, or float64 [B]."""
    most = 1.0 if rule == "posterior" else math.inf
    if isinstance(amount, Tensor):
        if not amount.is_floating_point():
            raise TypeError(f"amount must be a float or a floating tensor, got {amount.dtype}")
        if amount.numel() not in (1, batch) or amount.device != device:
            raise ValueError(
                f"amount is {list(amount.shape)} on {amount.device}; expected one number or [{batch}] on {device}"
            )
        return amount.detach().double().reshape(-1).clamp(0, most).expand(batch).contiguous()
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise TypeError(f"amount must be a float or a floating tensor, got {type(amount).__name__}")
    amount = float(amount)
    if not 0 <= amount <= most or math.isinf(amount):
        raise ValueError(f"amount of rule {rule!r} must be {'in [0, 1]' if most == 1 else 'at least 0'}, got {amount}")
    return amount


def _checked_mask_id(mask_id, graph: str, size: int) -> int | None:
    if graph == "uniform":
        if mask_id is not None:
            raise ValueError(f"mask_id goes with the graph 'absorb'; got {mask_id} with {graph!r}")
        return None
    if mask_id is None:
        return size - 1
    if isinstance(mask_id, bool) or not isinstance(mask_id, int):
        raise TypeError(f"mask_id must be a whole number, got {type(mask_id).__name__}")
    if not 0 <= mask_id < size:
        raise ValueError(f"mask_id is out of range: {mask_id} for {size} entries")
    return mask_id


def _check_like_x(name: str, t, dtype, x: Tensor) -> None:
    if t is None:
        return
    if not isinstance(t, Tensor) or t.dtype != dtype:
        raise TypeError(f"{name} must be a tensor of {dtype}")
    if t.shape != x.shape or t.device != x.device:
        raise ValueError(f"{name} is {list(t.shape)} on {t.device}; expected {list(x.shape)} on {x.device}")


def _checked_noise(noise, shape, device) -> Tensor:
    if not isinstance(noise, Tensor) or noise.dtype not in (torch.float32, torch.float64):
        raise TypeError("noise must be a float32 or float64 tensor")
    if noise.shape != shape or noise.device != device:
        raise ValueError(f"noise is {list(noise.shape)} on {noise.device}; expected {list(shape)} on {device}")
    return noise.detach().contiguous()


# --- torch.library ---------------------------------------------------------------------------------------------------


def _transition(
    x, output, law, a_tensor, a, b_tensor, b, mask_id, temperature, top_p, keep_crossing, active, noise, seeds, seed,
    stream, offset, ids, out,
) -> Tensor:  # fmt: skip
    changed = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    name, function = choose(FAMILY, "discrete_transition", x.device)
    with profiling.op_range(FAMILY, f"discrete_transition[{name}]", x.numel(), output.shape[2]):
        function(
            x,
            output,
            law=law,
            a=a if a_tensor is None else a_tensor,
            b=b if b_tensor is None else b_tensor,
            mask_id=mask_id,
            temperature=temperature,
            top_p=top_p,
            keep_crossing=keep_crossing,
            active=active,
            noise=noise,
            seed=seed if seeds is None else seeds,
            stream=stream,
            offset=offset,
            ids=ids,
            out=out,
            changed=changed,
        )
    return changed


_transition_op = torch.library.custom_op(
    "genfast::discrete_transition",
    _transition,
    mutates_args=("out",),
    schema="(Tensor x, Tensor output, str law, Tensor? a_tensor, float a, Tensor? b_tensor, float b, int? mask_id, "
    "float temperature, float top_p, bool keep_crossing, Tensor? active, Tensor? noise, Tensor? seeds, int? seed, "
    "int stream, int offset, Tensor? ids, Tensor(a!) out) -> Tensor",
)


@_transition_op.register_fake
def _transition_fake(x, *arguments):
    return torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
