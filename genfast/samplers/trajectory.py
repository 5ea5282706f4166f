"""The points that a sampler visits: alpha, sigma and time, from noise to data, on any schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from genfast._registry import export
from genfast.samplers import spacing as spacings
from genfast.samplers.schedules import NoiseSchedule, noise_schedule


@dataclass(frozen=True)
class Node:
    """One noise level: x = alpha x0 + sigma eps at a time of the schedule."""

    alpha: float
    sigma: float
    time: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level of Karras et al. 2022; inf where no signal is left."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def snr(self) -> float:
        """lambda = ln(alpha / sigma), half the log signal-to-noise ratio; -inf without signal, inf without noise."""
        if not self.alpha:
            return -math.inf
        return math.log(self.alpha) - math.log(self.sigma) if self.sigma else math.inf


@export("samplers")
class Trajectory:
    """The nodes 0 .. N of a sampling run, with strictly falling noise: node 0 is where it starts, node N is its result.

    Args:
        alphas, sigmas: N + 1 numbers each, x = alpha x0 + sigma eps. sigma may be 0 at the last node, alpha at the
            first.
        times: N + 1 times of the schedule; the last one is never given to the model.
        schedule: where levels between the nodes come from (a :class:`NoiseSchedule`, or its name), for the samplers
            that visit them.

    Raises:
        ValueError: numbers that are negative or not finite, or a ratio sigma / alpha that does not fall.
    """

    def __init__(self, alphas, sigmas, times, schedule: NoiseSchedule | str | None = None):
        alphas, sigmas, times = (np.asarray(v, np.float64) for v in (alphas, sigmas, times))
        if not alphas.shape == sigmas.shape == times.shape or alphas.ndim != 1 or len(alphas) < 2:
            raise ValueError("alphas, sigmas and times must be three sequences of one length, at least 2")
        if not all(np.isfinite(v).all() for v in (alphas, sigmas, times)) or (alphas < 0).any() or (sigmas < 0).any():
            raise ValueError("alphas and sigmas must be finite and not negative, times finite")
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = sigmas / alphas
        falls = ratios[1:] < ratios[:-1]
        if not falls.all():
            i = int(np.argmin(falls))
            raise ValueError(
                f"sigma / alpha must fall from node to node: it goes from {ratios[i]:g} to {ratios[i + 1]:g} at step "
                f"{i} (fewer steps, or another spacing, keep them apart)"
            )
        self.schedule = noise_schedule(schedule) if isinstance(schedule, str) else schedule
        self.alphas, self.sigmas, self.times = alphas, sigmas, times
        self.nodes = [Node(*map(float, row)) for row in zip(alphas, sigmas, times)]

    @classmethod
    def spaced(
        cls,
        schedule: NoiseSchedule,
        steps: int | None,
        spacing: str | None = None,
        *,
        timesteps=None,
        sigmas=None,
        final: str = "zero",
        **options,
    ) -> Trajectory:
        """Nodes of a schedule at a spacing, see :class:`genfast.Sampler`; ``timesteps`` or ``sigmas`` list them."""
        given = sum(v is not None for v in (timesteps, sigmas))
        if given == 2:
            raise ValueError("timesteps and sigmas exclude each other: both say where the nodes are")
        if given and (spacing is not None or options):
            raise ValueError("spacing and its options have no meaning beside timesteps or sigmas, which list the nodes")
        if timesteps is not None or sigmas is not None:
            inclusive, kind = False, "time" if timesteps is not None else "ratio"
            values = np.asarray(timesteps if timesteps is not None else sigmas, np.float64)
            if values.ndim != 1 or not len(values):
                raise ValueError("timesteps and sigmas must be non-empty sequences of numbers")
            if steps is not None and steps != len(values):
                raise ValueError(f"steps is {steps}, but {len(values)} timesteps or sigmas are given")
        else:
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
                raise ValueError(f"steps must be a positive int, got {steps!r}")
            name = spacing or schedule.spacing
            # A spacing that ends at the least noisy level has its own last point for the result, if that is wanted.
            inclusive = final == "sigma_min" and name in spacings.INCLUSIVE
            kind, values = spacings.space(schedule, steps + inclusive, name, **options)
        if kind == "ratio":
            alphas, sigmas = schedule.at_ratio(values)
            times = schedule.time_at(values)
        else:
            alphas, sigmas = schedule.alpha_sigma(values)
            times = values
        columns = alphas, sigmas, times
        if not inclusive:
            columns = [np.append(a, b) for a, b in zip(columns, _final_node(schedule, final))]
        return cls(*columns, schedule=schedule)

    def __len__(self) -> int:
        return len(self.nodes) - 1

    def __getitem__(self, i: int) -> Node:
        return self.nodes[i]

    def at_ratio(self, ratio: float) -> Node:
        """The schedule's node of a noise level sigma / alpha between the trajectory's own."""
        alpha, sigma = self._between().at_ratio(ratio)
        return Node(float(alpha), float(sigma), float(self._between().time_at(ratio)))

    def at_time(self, time: float) -> Node:
        """The schedule's node at a time."""
        alpha, sigma = self._between().alpha_sigma(time)
        return Node(float(alpha), float(sigma), float(time))

    def rates(self, node: Node) -> tuple[float, float]:
        """d alpha / dt and d sigma / dt at a node."""
        return self._between().rates(node.time)

    def _between(self) -> NoiseSchedule:
        if self.schedule is None:
            raise ValueError(
                "this sampler visits noise levels between the trajectory's nodes: give the trajectory its schedule"
            )
        return self.schedule


def _final_node(schedule: NoiseSchedule, final: str) -> tuple[float, float, float]:
    if final == "zero":
        return 1.0, 0.0, schedule.clean_time
    if final == "sigma_min":
        alpha, sigma = schedule.alpha_sigma(schedule.t_min)
        return float(alpha), float(sigma), schedule.t_min
    raise ValueError(f"final must be 'zero' or 'sigma_min'; got {final!r}")
