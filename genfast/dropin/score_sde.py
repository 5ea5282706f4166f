"""Score SDEs (Song et al. 2021, arXiv:2011.13456): SDEs, predictors, correctors and samplers, fused, by the names and
arguments of score_sde_pytorch (its ``sde_lib`` and ``sampling``).

A model is called as ``model(x, labels)``. A predictor's update is one kernel that writes ``x`` and ``x_mean``, the
scaling of the model's output to a score included; ``get_pc_sampler`` makes the coefficients of the whole schedule once.
SDEs, predictors and score functions of a user's own run by the same steps in plain PyTorch. Noise is drawn by
``torch.randn_like`` in the published order.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from genfast.dropin.tensors import plain, promoted
from genfast.ops.sampler_step import sampler_step
from genfast.step_table import StepTable

__all__ = [
    "SDE",
    "VESDE",
    "VPSDE",
    "AncestralSamplingPredictor",
    "AnnealedLangevinDynamics",
    "Corrector",
    "EulerMaruyamaPredictor",
    "LangevinCorrector",
    "NoneCorrector",
    "NonePredictor",
    "Predictor",
    "ReverseDiffusionPredictor",
    "get_corrector",
    "get_ode_sampler",
    "get_pc_sampler",
    "get_predictor",
    "get_sampling_fn",
    "get_score_fn",
    "register_corrector",
    "register_predictor",
    "shared_corrector_update_fn",
    "shared_predictor_update_fn",
    "subVPSDE",
]


def _per_sample(v: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...]."""
    return v.reshape(-1, *[1] * (like.dim() - 1))


# --- SDEs ------------------------------------------------------------------------------------------------------------


class SDE(abc.ABC):
    """dx = f(x, t) dt + G(t) dw on [0, T], discretised in ``N`` steps. Times ``t`` are [B]."""

    def __init__(self, N: int):
        super().__init__()
        self.N = N

    @property
    @abc.abstractmethod
    def T(self):
        """The last time."""

    @abc.abstractmethod
    def sde(self, x: Tensor, t: Tensor):
        """(drift [B, ...], diffusion [B])."""

    @abc.abstractmethod
    def marginal_prob(self, x: Tensor, t: Tensor):
        """(mean [B, ...], standard deviation [B]) of x_t given x_0."""

    @abc.abstractmethod
    def prior_sampling(self, shape):
        """A draw of x_T."""

    @abc.abstractmethod
    def prior_logp(self, z: Tensor):
        """log p_T [B]."""

    def discretize(self, x: Tensor, t: Tensor):
        """(f, G) of x_{i+1} = x_i + f(x_i) + G z: by Euler and Maruyama, unless a class knows better."""
        dt = 1 / self.N
        drift, diffusion = self.sde(x, t)
        return drift * dt, diffusion * torch.sqrt(torch.tensor(dt, device=t.device))

    def reverse(self, score_fn: Callable, probability_flow: bool = False) -> SDE:
        """The SDE that runs backwards, or the ODE with the same marginals."""
        return _ReverseSDE(self, score_fn, probability_flow)


class _ReverseSDE:
    def __init__(self, forward: SDE, score_fn: Callable, probability_flow: bool):
        self.forward, self.score_fn, self.probability_flow, self.N = forward, score_fn, probability_flow, forward.N

    @property
    def T(self):
        return self.forward.T

    def sde(self, x, t):
        drift, diffusion = self.forward.sde(x, t)
        share = 0.5 if self.probability_flow else 1.0
        drift = drift - _per_sample(diffusion, x) ** 2 * self.score_fn(x, t) * share
        return drift, 0.0 if self.probability_flow else diffusion

    def discretize(self, x, t):
        f, G = self.forward.discretize(x, t)
        share = 0.5 if self.probability_flow else 1.0
        f = f - _per_sample(G, x) ** 2 * self.score_fn(x, t) * share
        return f, torch.zeros_like(G) if self.probability_flow else G


def _steps_of(sde: SDE, t: Tensor) -> Tensor:
    return (t * (sde.N - 1) / sde.T).long()


class VPSDE(SDE):
    """Variance preserving: beta(t) from ``beta_min`` to ``beta_max``; its discretisation is DDPM."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20, N: int = 1000):
        super().__init__(N)
        self.beta_0, self.beta_1 = beta_min, beta_max
        self.discrete_betas = torch.linspace(beta_min / N, beta_max / N, N)
        self.alphas = 1.0 - self.discrete_betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.sqrt_alphas_cumprod = torch.sqrt(self.alphas_cumprod)
        self.sqrt_1m_alphas_cumprod = torch.sqrt(1.0 - self.alphas_cumprod)

    @property
    def T(self):
        return 1

    def _beta(self, t):
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def _log_mean(self, t):
        return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def sde(self, x, t):
        beta = self._beta(t)
        return -0.5 * _per_sample(beta, x) * x, torch.sqrt(beta)

    def marginal_prob(self, x, t):
        log_mean = self._log_mean(t)
        return torch.exp(_per_sample(log_mean, x)) * x, torch.sqrt(1.0 - torch.exp(2.0 * log_mean))

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        count = z[0].numel()
        return -count / 2.0 * np.log(2 * np.pi) - torch.sum(z.reshape(len(z), -1) ** 2, dim=1) / 2.0

    def discretize(self, x, t):
        step = _steps_of(self, t)
        beta, alpha = self.discrete_betas.to(x.device)[step], self.alphas.to(x.device)[step]
        return torch.sqrt(_per_sample(alpha, x)) * x - x, torch.sqrt(beta)


class subVPSDE(VPSDE):
    """The SDE whose variance stays below that of the variance-preserving one."""

    def sde(self, x, t):
        beta = self._beta(t)
        discount = 1.0 - torch.exp(-2 * self.beta_0 * t - (self.beta_1 - self.beta_0) * t**2)
        return -0.5 * _per_sample(beta, x) * x, torch.sqrt(beta * discount)

    def marginal_prob(self, x, t):
        log_mean = self._log_mean(t)
        return torch.exp(_per_sample(log_mean, x)) * x, 1 - torch.exp(2.0 * log_mean)

    def discretize(self, x, t):
        return SDE.discretize(self, x, t)


class VESDE(SDE):
    """Variance exploding: sigma(t) from ``sigma_min`` to ``sigma_max``, geometric; its discretisation is SMLD."""

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50, N: int = 1000):
        super().__init__(N)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.discrete_sigmas = torch.exp(torch.linspace(np.log(sigma_min), np.log(sigma_max), N))

    @property
    def T(self):
        return 1

    def _sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x, t):
        rate = np.sqrt(2 * (np.log(self.sigma_max) - np.log(self.sigma_min)))
        return torch.zeros_like(x), self._sigma(t) * rate

    def marginal_prob(self, x, t):
        return x, self._sigma(t)

    def prior_sampling(self, shape):
        return torch.randn(*shape) * self.sigma_max

    def prior_logp(self, z):
        count = z[0].numel()
        squares = torch.sum(z.reshape(len(z), -1) ** 2, dim=1)
        return -count / 2.0 * np.log(2 * np.pi * self.sigma_max**2) - squares / (2 * self.sigma_max**2)

    def levels(self, t):
        """(sigma_i, sigma_{i-1}) of the steps at times t."""
        step, sigmas = _steps_of(self, t), self.discrete_sigmas.to(t.device)
        return sigmas[step], torch.where(step == 0, torch.zeros_like(t), sigmas[step - 1])

    def discretize(self, x, t):
        sigma, before = self.levels(t)
        return torch.zeros_like(x), torch.sqrt(sigma**2 - before**2)


KNOWN = (VPSDE, subVPSDE, VESDE)


# --- scores ----------------------------------------------------------------------------------------------------------


class _Score:
    """A score made of a model: ``scale(t) * model(x, labels(t))``."""

    def __init__(self, sde: SDE, model: Callable, train: bool, continuous: bool):
        self.sde, self.model, self.train, self.continuous = sde, model, train, continuous

    def labels(self, t: Tensor) -> Tensor:
        sde = self.sde
        if isinstance(sde, VESDE):
            if self.continuous:
                return sde._sigma(t)
            return torch.round((sde.T - t) * (sde.N - 1)).long()
        return t * 999 if self.continuous or isinstance(sde, subVPSDE) else t * (sde.N - 1)

    def scale(self, t: Tensor) -> Tensor | None:
        """[B], or None where the model's output is the score."""
        sde = self.sde
        if isinstance(sde, VESDE):
            return None
        if self.continuous or isinstance(sde, subVPSDE):
            return -1 / sde.marginal_prob(t, t)[1]
        return -1 / sde.sqrt_1m_alphas_cumprod.to(t.device)[self.labels(t).long()]

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        """The model's own output."""
        if hasattr(self.model, "train"):
            self.model.train(self.train)
        return self.model(x, self.labels(t))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        output, scale = self.output(x, t), self.scale(t)
        return output if scale is None else output * _per_sample(scale, x)


def get_score_fn(sde: SDE, model: Callable, train: bool = False, continuous: bool = False) -> Callable:
    """``score_fn(x, t)`` of a model that predicts noise (VP, subVP) or the score (VE).

    Args:
        train: the mode that the model is put in, if it has one.
        continuous: whether it was trained at all times of [0, T] rather than at N of them.

    Raises:
        NotImplementedError: an SDE that is none of these, as the published code has it.
    """
    if not isinstance(sde, KNOWN):
        raise NotImplementedError(f"SDE class {type(sde).__name__} not yet supported.")
    return _Score(sde, model, train, continuous)


# --- predictors and correctors ---------------------------------------------------------------------------------------

_predictors: dict[str, type] = {}
_correctors: dict[str, type] = {}


def _register(registry: dict[str, type], cls, name):
    def add(cls):
        key = cls.__name__ if name is None else name
        if key in registry:
            raise ValueError(f"Already registered model with name: {key}")
        registry[key] = cls
        return cls

    return add if cls is None else add(cls)


def register_predictor(cls=None, *, name: str | None = None):
    """Decorator that makes a predictor known to :func:`get_predictor`."""
    return _register(_predictors, cls, name)


def register_corrector(cls=None, *, name: str | None = None):
    """Decorator that makes a corrector known to :func:`get_corrector`."""
    return _register(_correctors, cls, name)


def get_predictor(name: str) -> type:
    return _predictors[name]


def get_corrector(name: str) -> type:
    return _correctors[name]


def _table(mean_x: Tensor, mean_score: Tensor, noise: Tensor) -> StepTable | None:
    """One row per time; None where a number is not finite, which the published arithmetic carries on with."""
    mean = torch.stack([mean_x.double(), mean_score.double()], 1)
    try:
        return StepTable(mean, second=mean, noise=noise.double())
    except ValueError:
        return None


class Predictor(abc.ABC):
    """One step backwards in time: ``update_fn(x, t)`` returns (x, x_mean)."""

    def __init__(self, sde: SDE, score_fn: Callable, probability_flow: bool = False):
        super().__init__()
        self.sde, self.score_fn, self.probability_flow = sde, score_fn, probability_flow
        self.rsde = sde.reverse(score_fn, probability_flow) if hasattr(sde, "reverse") else None

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor):
        """Args: x [B, ...], t [B]. Returns: (x, x_mean), both [B, ...]."""


class _FusedPredictor(Predictor):
    """A predictor whose update is linear in x, the score and noise for the SDEs known here."""

    draws_first = False

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(of x, of the score, of the noise) [n] at times t [n]."""

    @abc.abstractmethod
    def plainly(self, x, t):
        """The published steps, for an SDE of the user's own."""

    def table(self, t: Tensor) -> StepTable | None:
        """One row per time, for the model's own output in place of the score; None if it has no such form."""
        if type(self.sde) not in KNOWN:
            return None
        of_x, of_score, noise = self.coefficients(t)
        scale = self.score_fn.scale(t) if type(self.score_fn) is _Score else None
        return _table(of_x, of_score if scale is None else of_score.double() * scale.double(), noise)

    def update_fn(self, x, t, table: StepTable | None = None, row: int | None = None):
        if table is None:
            table = self.table(t) if t.dim() == 1 else None
        fits = table is not None and plain(x)
        if not fits:
            return self.plainly(x, t)
        # The published order, for models that draw random numbers themselves.
        noise = torch.randn_like(x) if self.draws_first else None
        output = self.score_fn.output(x, t) if type(self.score_fn) is _Score else self.score_fn(x, t)
        noise = torch.randn_like(x) if noise is None else noise
        dtype = torch.promote_types(promoted(x, output), torch.float32)  # the coefficients have a batch dimension
        if plain(x, output, noise):
            return sampler_step([x, output], table, step=row, noise=noise, **_results(x, dtype))
        rows = table.data if row is None else table.data[row : row + 1]
        of_x, of_output, of_noise = (_per_sample(rows[:, k], x).to(dtype) for k in (0, 1, 3))
        mean = of_x * x + of_output * output
        return mean + of_noise * noise, mean


def _results(x: Tensor, dtype: torch.dtype) -> dict:
    if dtype is x.dtype:
        return {}
    return {"dtype": dtype, "second_out": torch.empty_like(x, dtype=dtype)}


@register_predictor(name="euler_maruyama")
class EulerMaruyamaPredictor(_FusedPredictor):
    """Euler and Maruyama's step of the reverse SDE."""

    draws_first = True

    def coefficients(self, t):
        one = torch.ones_like(t)
        rate, diffusion = self.sde.sde(one, t)  # drifts are linear in x
        dt = 1.0 / self.sde.N
        share = 0.5 if self.probability_flow else 1.0
        noise = 0 * one if self.probability_flow else diffusion * np.sqrt(dt)
        return 1 - rate * dt, diffusion**2 * share * dt, noise

    def plainly(self, x, t):
        dt = -1.0 / self.rsde.N
        z = torch.randn_like(x)
        drift, diffusion = self.rsde.sde(x, t)
        mean = x + drift * dt
        if isinstance(diffusion, Tensor):
            diffusion = _per_sample(diffusion, x)
        return mean + diffusion * np.sqrt(-dt) * z, mean


@register_predictor(name="reverse_diffusion")
class ReverseDiffusionPredictor(_FusedPredictor):
    """The SDE's own discretisation, backwards."""

    def coefficients(self, t):
        f, G = self.sde.discretize(torch.ones_like(t), t)
        share = 0.5 if self.probability_flow else 1.0
        return 1 - f, G**2 * share, torch.zeros_like(G) if self.probability_flow else G

    def plainly(self, x, t):
        f, G = self.rsde.discretize(x, t)
        z = torch.randn_like(x)
        mean = x - f
        return mean + _per_sample(G, x) * z, mean


@register_predictor(name="ancestral_sampling")
class AncestralSamplingPredictor(_FusedPredictor):
    """Ancestral sampling of the discrete chains behind VP (DDPM) and VE (SMLD).

    Raises:
        NotImplementedError: another SDE, as the published code has it.
    """

    def __init__(self, sde: SDE, score_fn: Callable, probability_flow: bool = False):
        super().__init__(sde, score_fn, probability_flow)
        if not isinstance(sde, (VPSDE, VESDE)) or isinstance(sde, subVPSDE):
            raise NotImplementedError(f"SDE class {type(sde).__name__} not yet supported.")
        assert not probability_flow, "Probability flow not supported by ancestral sampling"

    def coefficients(self, t):
        if isinstance(self.sde, VESDE):
            sigma, before = self.sde.levels(t)
            std = torch.sqrt(before**2 * (sigma**2 - before**2) / sigma**2)
            return torch.ones_like(t), sigma**2 - before**2, std
        beta = self.sde.discrete_betas.to(t.device)[_steps_of(self.sde, t)]
        root = torch.sqrt(1.0 - beta)
        return 1 / root, beta / root, torch.sqrt(beta)

    def plainly(self, x, t):
        of_x, of_score, std = (_per_sample(c, x) for c in self.coefficients(t))
        mean = of_x * x + of_score * self.score_fn(x, t)
        return mean + std * torch.randn_like(x), mean


@register_predictor(name="none")
class NonePredictor(Predictor):
    """No step at all."""

    def __init__(self, sde, score_fn, probability_flow=False):
        pass

    def update_fn(self, x, t):
        return x, x


class Corrector(abc.ABC):
    """Steps that leave the law at time t as it is: ``update_fn(x, t)`` returns (x, x_mean)."""

    def __init__(self, sde: SDE, score_fn: Callable, snr: float, n_steps: int):
        super().__init__()
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor):
        """Args: x [B, ...], t [B]. Returns: (x, x_mean), both [B, ...]."""


class _Langevin(Corrector):
    """x + step grad + sqrt(2 step) z, with a step size per sample that stays on the device."""

    def __init__(self, sde: SDE, score_fn: Callable, snr: float, n_steps: int):
        super().__init__(sde, score_fn, snr, n_steps)
        if not isinstance(sde, KNOWN):
            raise NotImplementedError(f"SDE class {type(sde).__name__} not yet supported.")

    @abc.abstractmethod
    def step_size(self, x, t, alpha, output, scale, noise) -> Tensor:
        """Of one step: [] or [B]."""

    def update_fn(self, x, t):
        sde = self.sde
        alpha = torch.ones_like(t)
        if isinstance(sde, VPSDE):
            alpha = sde.alphas.to(t.device)[_steps_of(sde, t)]
        own = type(self.score_fn) is _Score
        scale = self.score_fn.scale(t) if own else None
        mean = x
        for _ in range(self.n_steps):
            output = self.score_fn.output(x, t) if own else self.score_fn(x, t)
            noise = torch.randn_like(x)
            size = self.step_size(x, t, alpha, output, scale, noise)
            weight = size if scale is None else size * scale
            dtype = torch.promote_types(promoted(x, output), torch.float32)
            fits = plain(x, output, noise)
            table = _table(torch.ones_like(size), weight, torch.sqrt(size * 2)) if fits else None
            if table is not None:
                x, mean = sampler_step([x, output], table, noise=noise, **_results(x, dtype))
            else:
                mean = x + _per_sample(weight, x) * output
                x = mean + torch.sqrt(_per_sample(size, x) * 2) * noise
        return x, mean


@register_corrector(name="langevin")
class LangevinCorrector(_Langevin):
    """The step size follows from the mean norms of noise and score over the batch, which couples its samples."""

    def step_size(self, x, t, alpha, output, scale, noise):
        norms = torch.norm(output.reshape(len(output), -1), dim=-1)
        grad_norm = (norms if scale is None else norms * scale.abs()).mean()
        noise_norm = torch.norm(noise.reshape(len(noise), -1), dim=-1).mean()
        return (self.snr * noise_norm / grad_norm) ** 2 * 2 * alpha


@register_corrector(name="ald")
class AnnealedLangevinDynamics(_Langevin):
    """The step size follows from the standard deviation at time t."""

    def step_size(self, x, t, alpha, output, scale, noise):
        std = self.sde.marginal_prob(x, t)[1]
        return (self.snr * std) ** 2 * 2 * alpha


@register_corrector(name="none")
class NoneCorrector(Corrector):
    """No correction."""

    def __init__(self, sde, score_fn, snr, n_steps):
        pass

    def update_fn(self, x, t):
        return x, x


def shared_predictor_update_fn(x, t, sde, model, predictor, probability_flow, continuous):
    """One update of a predictor class (None: no step) on a model: (x, x_mean)."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return (predictor or NonePredictor)(sde, score_fn, probability_flow).update_fn(x, t)


def shared_corrector_update_fn(x, t, sde, model, corrector, continuous, snr, n_steps):
    """One update of a corrector class (None: none) on a model: (x, x_mean)."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return (corrector or NoneCorrector)(sde, score_fn, snr, n_steps).update_fn(x, t)


# --- samplers --------------------------------------------------------------------------------------------------------


def get_sampling_fn(config, sde: SDE, shape, inverse_scaler: Callable, eps: float) -> Callable:
    """The sampler that a configuration asks for: ``config.sampling.method`` is ``"pc"`` or ``"ode"``, and
    ``config.sampling`` has predictor, corrector, snr, n_steps_each, probability_flow, noise_removal;
    ``config.training.continuous``; ``config.device``.

    Raises:
        ValueError: another method.
    """
    options = config.sampling
    if options.method.lower() == "ode":
        return get_ode_sampler(sde, shape, inverse_scaler, denoise=options.noise_removal, eps=eps, device=config.device)
    if options.method.lower() == "pc":
        return get_pc_sampler(
            sde,
            shape,
            get_predictor(options.predictor.lower()),
            get_corrector(options.corrector.lower()),
            inverse_scaler,
            options.snr,
            n_steps=options.n_steps_each,
            probability_flow=options.probability_flow,
            continuous=config.training.continuous,
            denoise=options.noise_removal,
            eps=eps,
            device=config.device,
        )
    raise ValueError(f"Sampler name {options.method} unknown.")


def get_pc_sampler(
    sde: SDE,
    shape,
    predictor: type | None,
    corrector: type | None,
    inverse_scaler: Callable,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = True,
    denoise: bool = True,
    eps: float = 1e-3,
    device="cuda",
) -> Callable:
    """``pc_sampler(model)``: predictor-corrector sampling of ``sde.N`` steps from T to ``eps``; (samples, number of
    score evaluations). The last step's noise is left out with ``denoise``."""

    def pc_sampler(model):
        with torch.no_grad():
            x = mean = sde.prior_sampling(shape).to(device)
            score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
            predict = (predictor or NonePredictor)(sde, score_fn, probability_flow)
            correct = (corrector or NoneCorrector)(sde, score_fn, snr, n_steps)
            timesteps = torch.linspace(sde.T, eps, sde.N)
            times = timesteps.to(device)[:, None].repeat(1, shape[0])
            table = predict.table(timesteps) if isinstance(predict, _FusedPredictor) else None
            table = None if table is None else table.to(x.device)
            for i in range(sde.N):
                x, mean = correct.update_fn(x, times[i])
                if table is None:
                    x, mean = predict.update_fn(x, times[i])
                else:
                    x, mean = predict.update_fn(x, times[i], table, i)
            return inverse_scaler(mean if denoise else x), sde.N * (n_steps + 1)

    return pc_sampler


def get_ode_sampler(
    sde: SDE,
    shape,
    inverse_scaler: Callable,
    denoise: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-3,
    device="cuda",
) -> Callable:
    """``ode_sampler(model, z=None)``: the probability-flow ODE from T to ``eps`` by a black-box solver of SciPy, as
    published; (samples, number of score evaluations).

    Raises:
        ImportError: (from the sampler) SciPy is not installed.
    """

    def ode_sampler(model, z=None):
        try:
            from scipy.integrate import solve_ivp
        except ImportError:
            raise ImportError("the ODE sampler needs the package scipy (`pip install scipy`)") from None
        with torch.no_grad():
            x = sde.prior_sampling(shape).to(device) if z is None else z
            score_fn = get_score_fn(sde, model, train=False, continuous=True)
            flow = sde.reverse(score_fn, probability_flow=True)

            def slope(t, state):
                y = torch.from_numpy(state.reshape(shape)).to(device).type(torch.float32)
                drift = flow.sde(y, torch.ones(shape[0], device=device) * t)[0]
                return drift.detach().cpu().numpy().reshape(-1)

            start = x.detach().cpu().numpy().reshape(-1)
            solution = solve_ivp(slope, (sde.T, eps), start, rtol=rtol, atol=atol, method=method)
            x = torch.tensor(solution.y[:, -1]).reshape(shape).to(device).type(torch.float32)
            if denoise:
                last = torch.ones(shape[0], device=device) * eps
                x = ReverseDiffusionPredictor(sde, score_fn, probability_flow=False).update_fn(x, last)[1]
            return inverse_scaler(x), solution.nfev

    return ode_sampler
