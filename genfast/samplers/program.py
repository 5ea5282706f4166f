"""From stages to step tables: a sampler's whole run as a list of calls, each a row of a table.

Stages of the same shape (same buffers in, same buffer out) share one table, whatever step they belong to. So a run has
one table per kind of stage and the loop looks nothing up but a row index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from genfast.samplers.linear import Linear, Stage, tensor
from genfast.samplers.trajectory import Node
from genfast.step_table import StepTable, x0_coefficients

COMBINE, CORRECT = "combine", "correct"
INPUT = "model input"
"""The buffer with what the model sees, where that is not the state itself: scaled, or in another dtype."""

OUT_PARTS = ("coefficients", "x0", "noise")  # the arguments of a step table that weigh the op's output,
SECOND_PARTS = ("second", "second_x0", "second_noise")  # and its second output


@dataclass
class Call:
    """One call of the op (or one Langevin correction), with everything that the loop needs to make it."""

    action: str
    step: int
    node: Node | None  # where the model is evaluated, if it is
    at: str  # the buffer the model is evaluated on, the op's first input
    others: tuple[str, ...]  # further inputs, after the model's output
    into: str
    keep: bool = False  # the second output goes to the history
    feed: bool = False  # the second output is the next model input
    learned: bool = False  # the model's output has a variance half
    noisy: bool = False
    table: int = -1
    row: int = -1
    draw: int = 0  # the number of this draw of noise in the run: its stream
    gain: float = 0.0  # of a correction: the step size where the norms of noise and score are equal
    time: int = -1  # index of the evaluation's time
    last: bool = False  # of its step
    parts: tuple[Linear, Linear | None, tuple[float, float] | None] = (Linear(), None, None)
    """out, second output, log_std."""


class Program:
    """The calls of one run, their tables and the times of the model's evaluations.

    Args:
        steps: per step, its stages.
        nodes: per step, the node that it starts from.
        prediction, sigma_data: what the model predicts, see :func:`genfast.x0_coefficients`.
        fold: leave x0 out where its weights can be put on the state and the model's output (no clipping): one pass
            with nothing in between, and no cancellation.
        feed: write the model's input as a tensor of its own; always so for ``"edm"``, whose input is scaled.
        corrections: per step, the gains of the Langevin corrections before it.
    """

    def __init__(
        self,
        steps: list[list[Stage]],
        nodes: list[Node],
        prediction: str,
        sigma_data: float,
        *,
        fold: bool,
        feed: bool,
        corrections: list[list[float]] | None = None,
    ):
        self.prediction, self.sigma_data, self.fold = prediction, sigma_data, fold
        self.feed = feed or prediction == "edm"
        self.calls: list[Call] = []
        self.times: list[Node] = []
        self.history = 0
        self._kinds: dict[tuple, int] = {}
        self._rows: list[list[dict]] = []
        self._draws = {COMBINE: 0, CORRECT: 0}
        for i, stages in enumerate(steps):
            for gain in corrections[i] if corrections else ():
                self._correct(i, nodes[i], gain)
            for stage in stages:
                self._combine(i, stage)
            self.calls[-1].last = True
        self._drop_unread_history()
        self._attach_inputs()
        self.model_times: dict[tuple, tuple[torch.Tensor, ...]] = {}
        self._tables: dict[torch.device, list[StepTable]] = {}

    def tables(self, device: torch.device) -> list[StepTable]:
        """The step tables on a device, made once."""
        if device not in self._tables:
            made = []
            for rows in self._rows:
                parts = {name: np.array([r[name] for r in rows]) for name in rows[0]}
                made.append(StepTable(parts.pop("coefficients"), **parts, device=device))
            self._tables[device] = made
        return self._tables[device]

    def _combine(self, step: int, stage: Stage) -> None:
        out, keep = _without_zeros(stage.out), _without_zeros(stage.keep) if stage.keep is not None else None
        names = {name for part in (out, keep) if part is not None for name in part.weights}
        self.history = max([self.history, *(int(n[1:]) for n in names if is_history(n))])
        others = tuple(sorted(names - {stage.at, "x0", "noise"}))
        call = Call(COMBINE, step, stage.node, stage.at, others, stage.into, keep is not None)
        call.learned, call.noisy = stage.log_std is not None, "noise" in out.weights
        call.parts = out, keep, stage.log_std
        self._append(call)

    def _correct(self, step: int, node: Node, gain: float) -> None:
        # The score at the node; the step along it is made from values on the device (corrector.py).
        call = Call(CORRECT, step, node, "x", (), "x", noisy=True, gain=gain)
        call.parts = (node.alpha * tensor("x0") - tensor("x")) / node.sigma**2, None, None
        self._append(call)

    def _append(self, call: Call) -> None:
        if call.noisy:
            call.draw = self._draws[call.action]
            self._draws[call.action] += 1
        if call.node is not None:
            call.time = len(self.times)
            self.times.append(call.node)
        self.calls.append(call)

    def _drop_unread_history(self) -> None:
        """The last evaluations of a run are kept for nobody: leave out their second output."""
        readers = [k for k, call in enumerate(self.calls) if any(is_history(name) for name in call.others)]
        for call in self.calls[readers[-1] if readers else 0 :]:
            call.keep, call.parts = False, (call.parts[0], None, call.parts[2])

    def _attach_inputs(self) -> None:
        """Give every evaluation its model input: as second output of the call before it, or by a call of its own."""
        finished: list[Call] = []
        for call in self.calls:
            second = None
            if self.feed and call.node is not None:
                scale = input_scale(call.node, self.prediction, self.sigma_data)
                before = finished[-1] if finished else None
                if before is not None and before.action == COMBINE and before.into == call.at and not before.keep:
                    before.feed = True
                    before.parts = (before.parts[0], scale * before.parts[0], before.parts[2])
                else:
                    second = Call(COMBINE, call.step, None, call.at, (), INPUT)
                    second.parts = Linear({call.at: scale}), None, None
            finished += [call] if second is None else [second, call]
        self.calls = finished
        for call in finished:
            self._tabulate(call)

    def _tabulate(self, call: Call) -> None:
        out, second, log_std = call.parts
        evaluated = call.node is not None
        inputs = (call.at, *(("model",) if evaluated else ()), *call.others)
        row: dict = {}
        if evaluated:
            to_x0 = x0_coefficients(self.prediction, call.node.alpha, call.node.sigma, sigma_data=self.sigma_data)
            if not self.fold:
                row["to_x0"] = to_x0
        for combination, (own, x0, noise) in ((out, OUT_PARTS), (second, SECOND_PARTS)):
            if combination is None:
                continue
            weights = dict(combination.weights)
            if evaluated and self.fold:
                w = weights.pop("x0", 0.0)
                weights[call.at] = weights.get(call.at, 0.0) + w * to_x0[0]
                weights["model"] = w * to_x0[1]
            elif evaluated:
                row[x0] = weights.get("x0", 0.0)
            row[own] = [weights.get(name, 0.0) for name in inputs]
            if call.noisy and call.action == COMBINE:
                row[noise] = weights.get("noise", 0.0)
        if log_std is not None and call.noisy:
            row["log_std"] = log_std
        kind = (call.action, inputs, call.into, tuple(row))
        call.table = self._kinds.setdefault(kind, len(self._kinds))
        if call.table == len(self._rows):
            self._rows.append([])
        call.row = len(self._rows[call.table])
        self._rows[call.table].append(row)


def input_scale(node: Node, prediction: str, sigma_data: float) -> float:
    """What the model's input is multiplied with: c_in of Karras et al. for their raw network, else 1."""
    if prediction != "edm":
        return 1.0
    return 1 / (node.alpha * (node.ratio**2 + sigma_data**2) ** 0.5)


def is_history(name: str) -> bool:
    """Whether a tensor's name is that of a kept one: h1, h2, .."""
    return name[0] == "h" and name[1:].isdigit()


def _without_zeros(combination: Linear) -> Linear:
    return Linear({name: weight for name, weight in combination.weights.items() if weight != 0.0})
