"""Linear combinations of tensors that do not exist yet: the language in which the samplers' rows are written.

A row says ``out = (s1 / s) * X + (a1 - a * s1 / s) * X0`` with plain numbers; the result is a :class:`Linear`, a weight
per named tensor, which ``program.py`` turns into one row of a :class:`genfast.StepTable`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from genfast.samplers.trajectory import Node


@dataclass(frozen=True)
class Linear:
    """sum_i weight_i * tensor_i, by name."""

    weights: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Linear) -> Linear:
        merged = dict(self.weights)
        for name, weight in other.weights.items():
            merged[name] = merged.get(name, 0.0) + weight
        return Linear(merged)

    def __sub__(self, other: Linear) -> Linear:
        return self + (-1.0) * other

    def __mul__(self, factor: float) -> Linear:
        return Linear({name: weight * float(factor) for name, weight in self.weights.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Linear:
        return self * (1.0 / float(divisor))


def tensor(name: str) -> Linear:
    """The tensor of that name: ``x`` is the state, any other a buffer that an earlier stage of the step wrote."""
    return Linear({name: 1.0})


X = tensor("x")
X0 = tensor("x0")  # the data estimate at the stage's evaluation
NOISE = tensor("noise")
ZERO = Linear()


def history(k: int) -> Linear:
    """What the stage ``k`` evaluations ago kept; 1 is the newest."""
    return tensor(f"h{k}")


def eps(node: Node, x: Linear = X) -> Linear:
    """The noise that goes with the data estimate: x = alpha x0 + sigma eps."""
    return (x - node.alpha * X0) / node.sigma


@dataclass(frozen=True)
class Stage:
    """One call of the op: evaluate the model on a buffer at a node, then combine.

    Args:
        out: the combination; its tensors are ``x``, buffers, ``x0``, ``noise`` and history.
        node: where the model is evaluated; None where the stage only moves the state.
        at: the buffer that the model is evaluated on, with the level of ``node``.
        into: the buffer that ``out`` goes to.
        keep: a second combination that goes to the history.
        log_std: offset and slope of the noise's logarithmic scale in the model's variance output.
    """

    out: Linear
    node: Node | None = None
    at: str = "x"
    into: str = "x"
    keep: Linear | None = None
    log_std: tuple[float, float] | None = None
