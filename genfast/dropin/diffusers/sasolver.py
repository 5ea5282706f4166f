"""SASolverScheduler: a stochastic Adams predictor and corrector (Xue et al. 2023, arXiv:2309.05019)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers import scheduling_sasolver as peer
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from genfast.dropin.diffusers.base import (
    Fused,
    Plan,
    Rows,
    check_seed,
    fused,
    levels,
    needs_generator,
    output_maker,
)
from genfast.dropin.diffusers.unipc import Move, alike, combined, shifted
from genfast.ops.sampler_step import randn

__all__ = ["SASolverScheduler"]

_output = output_maker(SchedulerOutput)


def default_tau(t):
    """The peer's own function, which it writes as a lambda: noise in the middle of the range of timesteps."""
    return 1 if 200 <= t <= 800 else 0


def _is_default(function) -> bool:
    return function is default_tau or getattr(function, "__qualname__", "") == _PEERS_TAU


_PEERS_TAU = "SASolverScheduler.__init__.<locals>.<lambda>"


class SASolverScheduler(Fused, diffusers.SASolverScheduler):
    """``diffusers.SASolverScheduler`` with a fused ``step``.

    A step without corrector is one kernel, and so is one whose model predicts what the solver keeps; the others are
    two: one writes the corrected sample and the data estimate, the other predicts. Outputs with a learned variance, a
    ``tau_func`` that returns tensors, and samples and outputs of different dtypes run the peer's own code. The tables
    are kept per value of tau, a handful for the piecewise constant functions in use.
    """

    watched = ("sigmas", "predict_x0")
    default_key = ("plain", 0, 0, 1, 0)

    def build(self) -> Plan:
        config = self.config
        alpha, sigma, lam = self._alpha_sigma_lambda()
        data = config.algorithm_type == "data_prediction"
        limited = bool(config.thresholding and data)
        learned = config.prediction_type == "epsilon" and config.variance_type in ("learned", "learned_range")
        orders = config.predictor_order, config.corrector_order
        return Plan(
            levels=(alpha, sigma, lam),
            estimate=self._estimate(alpha, sigma),
            predictor_order=config.predictor_order,
            corrector_order=config.corrector_order,
            history=max(config.predictor_order, config.corrector_order - 1),
            lower_order_final=config.lower_order_final,
            limited=limited,
            keeps_output=config.prediction_type == ("sample" if data else "epsilon") and not limited,
            fuses=all(order in (1, 2, 3, 4) for order in orders)
            and not learned
            and not (config.thresholding and not data)
            and self.predict_x0 == data,
        )

    def planned_keys(self, plan: Plan) -> list[tuple]:
        if not self.timesteps.is_cuda:
            return [self.default_key]  # a dozen tables: on the CPU they are as well made by the steps that need them
        taus = (0, 1)  # of the peer's own function
        predictors, correctors = range(1, plan.predictor_order + 1), range(1, plan.corrector_order + 1)
        keys = [("plain", 0, 0, p, tau) for p in predictors for tau in taus]
        if plan.keeps_output:
            pairs = [(c, p) for c in correctors for p in predictors if p <= c + 1]
            return keys + [("both", c, before, p, tau) for c, p in pairs for before in taus for tau in taus]
        keys += [("correct", c, tau, 0, 0) for c in correctors for tau in taus]
        return keys + [("predict", 0, 0, p, tau) for p in predictors for tau in taus]

    def make_rows(self, plan, kind, corrector, tau_before, predictor, tau) -> Rows | None:
        """One row per step for a kind of :func:`combined`, orders (0 for a part that it has not) and values of tau."""
        estimate = plan.estimate
        if estimate is None or not plan.fuses:
            return None
        behind = self._corrector(plan, corrector, tau_before) if corrector else None
        ahead = self._predictor(plan, predictor, tau) if predictor else None
        return combined(kind, estimate, behind, ahead, plan.limited, plan.keeps_output)

    def _alpha_sigma_lambda(self):
        alpha, sigma = self._sigma_to_alpha_sigma_t(levels(self.sigmas))
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)

    def _estimate(self, alpha, sigma):
        """(k, m), float64 [steps]: the estimate that the solver keeps is k sample + m output; None if there is none."""
        alpha, sigma = alpha[:-1].double(), sigma[:-1].double()
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.predict_x0:
            made = {
                "epsilon": (1 / alpha, -sigma / alpha),
                "sample": (zero, one),
                "v_prediction": (alpha, -sigma),
                "flow_prediction": (one, -levels(self.sigmas)[:-1].double()),
            }
        else:
            made = {
                "epsilon": (zero, one),
                "sample": (1 / sigma, -alpha / sigma),
                "v_prediction": (sigma, alpha),
            }
        return made.get(self.config.prediction_type)

    def _predictor(self, plan: Plan, order: int, tau) -> Move:
        """The moves from every level i to the next, estimates at i, i - 1, ..; the peer's float32 arithmetic."""
        alpha, sigma, lam = plan.levels
        start, end = lam[:-1], lam[1:]
        h = end - start
        points = [start, *(self._earlier(lam, k) for k in range(1, order))]
        weights = self.get_coefficients_fn(order, start, end, points, tau)
        if self.predict_x0 and order == 2:
            bend = h**2 / 2 - (h * (1 + tau**2) - 1 + torch.exp((1 + tau**2) * -h)) / (1 + tau**2) ** 2
            bend = 1.0 * torch.exp((1 + tau**2) * end) * bend / (start - points[1])
            weights = [weights[0] + bend, weights[1] - bend]
        return self._move(alpha, sigma, end, h, tau, weights)

    def _corrector(self, plan: Plan, order: int, tau) -> Move:
        """The moves to every level i from the one before, estimates at i, i - 1, ..; none before the first."""
        alpha, sigma, lam = plan.levels
        start, end = lam[:-1], lam[1:]
        h = end - start
        # Point k of the interval that ends at level i is level i - k.
        points = [end, start, *(self._earlier(lam, k) for k in range(1, order - 1))][:order]
        weights = self.get_coefficients_fn(order, start, end, points, tau)
        if self.predict_x0 and order == 2:
            bend = h / 2 - (h * (1 + tau**2) - 1 + torch.exp((1 + tau**2) * -h)) / ((1 + tau**2) ** 2 * h)
            bend = 1.0 * torch.exp((1 + tau**2) * end) * bend
            weights = [weights[0] + bend, weights[1] - bend]
        state, estimates, noise = self._move(alpha, sigma, end, h, tau, weights)
        return Move(shifted(state), [shifted(w) for w in estimates], shifted(noise))

    @staticmethod
    def _earlier(lam: torch.Tensor, k: int) -> torch.Tensor:
        """lambda k levels before every level but the last; a negative position counts from the end, as in the peer."""
        at = torch.arange(len(lam) - 1) - k
        return torch.where(at >= -len(lam), lam[at % len(lam)], float("nan"))

    def _move(self, alpha, sigma, end, h, tau, weights) -> Move:
        if self.predict_x0:
            scale = (1 + tau**2) * sigma[1:] * torch.exp(-(tau**2) * end)
            state = torch.exp(-(tau**2) * h) * (sigma[1:] / sigma[:-1])
            noise = sigma[1:] * torch.sqrt(1 - torch.exp(-2 * tau**2 * h))
        else:
            scale = -(1 + tau**2) * alpha[1:]
            state = alpha[1:] / alpha[:-1]
            noise = tau * sigma[1:] * torch.sqrt(torch.exp(2 * h) - 1)
        return Move(state.double(), [(scale * w).double() for w in weights], noise.double())

    def __getstate__(self):
        """The peer's, with a default tau that can be pickled."""
        state = super().__getstate__()
        return {**state, "tau_func": default_tau} if _is_default(self.tau_func) else state

    def _tau(self, timestep):
        """tau at a timestep as ``step`` was given it, or None if it is not a number of the host."""
        if _is_default(self.tau_func):  # it compares numbers: spare the host a wait for a GPU's
            value = self.host_timestep(timestep)
            timestep = timestep if value is None else value
        tau = self.tau_func(timestep)
        return tau if type(tau) is int or type(tau) is float else None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator=None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> SchedulerOutput | tuple:
        """The peer's step; ``seed`` draws the noise of a Philox sequence, in place of ``generator``."""
        made = NotImplemented
        if self.num_inference_steps is not None:
            seed = check_seed(self, generator, seed)
            if self._step_index is None:
                self._init_step_index(timestep)
            plan = self.current_plan()
            if plan.fuses and len(self.model_outputs) == plan.history and alike(plan, model_output, sample):
                made = self._fused(plan, model_output, timestep, sample, generator, seed)
        if made is NotImplemented:
            needs_generator(seed)
            return super().step(model_output, timestep, sample, generator, return_dict)
        return _output(made) if return_dict else (made,)

    def _fused(self, plan, model_output, timestep, sample, generator, seed):
        """The next sample, all state being brought up to date, or NotImplemented and nothing changed."""
        row = self._step_index
        past, times, last = self.model_outputs, self.timestep_list, self.last_sample
        left = len(self.timesteps) - row
        predictor, corrector = plan.predictor_order, plan.corrector_order
        if plan.lower_order_final:
            predictor, corrector = min(predictor, left), min(corrector, left + 1)
        predictor = min(predictor, self.lower_order_nums + 1)
        corrector = min(corrector, self.lower_order_nums + 2)
        if predictor < 1 or corrector < 1:
            return NotImplemented
        corrects = row > 0 and last is not None
        before = self.__dict__.get("this_corrector_order", 0) if corrects else 0
        tau, tau_before = self._tau(timestep), self._tau(times[-1]) if corrects else 0
        if tau is None or tau_before is None or (corrects and not 0 < before <= plan.history + 1):
            return NotImplemented
        dtype = sample.dtype
        drawn = []

        def draw():
            if seed is not None:
                z = randn(model_output.shape, seed=seed, stream=row, dtype=dtype, device=model_output.device)
            else:
                z = peer.randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=dtype)
            drawn.append(z)
            return z

        threshold = plan.threshold if plan.limited else None
        if not corrects:
            inputs = (sample, model_output, *past[:-predictor:-1])
            table = plan.rows(("plain", 0, 0, predictor, tau), self.make_rows)
        else:
            inputs = (sample, model_output, last, self.last_noise, *past[:-before:-1])
            if plan.keeps_output:
                inputs += tuple(past[-before:-predictor:-1])  # what the predictor looks back on and the other not
                table = plan.rows(("both", before, tau_before, predictor, tau), self.make_rows)
            else:
                table = plan.rows(("correct", before, tau_before, 0, 0), self.make_rows)
        if not alike(plan, sample, *inputs):
            return NotImplemented
        predicts = not corrects or plan.keeps_output
        made = fused(inputs, table, row, dtype, threshold=threshold, draw=draw if predicts else None)
        if made is NotImplemented:
            return made
        if predicts:
            estimate, corrected = model_output, sample
            if corrects:
                previous, corrected = made
            elif plan.keeps_output:
                previous = made
            else:
                previous, estimate = made
        else:
            corrected, estimate = made
            inputs = (corrected, estimate, *past[:-predictor:-1])
            if not alike(plan, sample, *inputs):
                return NotImplemented
            table = plan.rows(("predict", 0, 0, predictor, tau), self.make_rows)
            previous = fused(inputs, table, row, dtype, draw=draw)
            if previous is NotImplemented:
                return previous
        for i in range(plan.history - 1):
            past[i] = past[i + 1]
            times[i] = times[i + 1]
        past[-1] = estimate
        times[-1] = timestep
        self.this_predictor_order, self.this_corrector_order = predictor, corrector
        self.last_sample, self.last_noise = corrected, drawn[0]
        if self.lower_order_nums < plan.history:
            self.lower_order_nums += 1
        self._step_index = row + 1
        return previous
