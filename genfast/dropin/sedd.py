"""SEDD (Lou, Meng, Ermon 2023, arXiv:2310.16834) by the names and arguments of Score-Entropy-Discrete-Diffusion: its
``noise_lib``, ``graph_lib``, ``catsample``, ``sampling`` and ``losses``, with fused reverse steps.

A model is called as ``model(x, sigma)`` and answers with log scores [B, L, V]. On the graphs of this module a
predictor's update is one kernel over them: no scores, one-hots or probabilities of their size are made. Graphs of a
user's own take the same steps in plain PyTorch.

Random numbers come from ``torch.rand`` in the published order, so that a seeded run in float32 gives the published
tokens (but for ties within its rounding). With ``seed=`` they are drawn inside the kernel: that is what makes a step
cheap, a row's tokens then do not depend on its batch, and tokens with a share below 1e-8 are drawn as often as they
should be, which float32 noise cannot do.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.dropin.subs import one_seed
from genfast.ops._checks import LOGIT_DTYPES
from genfast.ops.token_transition import discrete_transition
from genfast.samplers.text.transition import uniform_tokens

__all__ = [
    "Absorbing",
    "AnalyticPredictor",
    "Denoiser",
    "EulerPredictor",
    "GeometricNoise",
    "Graph",
    "LogLinearNoise",
    "Noise",
    "NonePredictor",
    "Predictor",
    "Uniform",
    "get_graph",
    "get_loss_fn",
    "get_model_fn",
    "get_noise",
    "get_pc_sampler",
    "get_predictor",
    "get_sampling_fn",
    "get_score_fn",
    "register_predictor",
    "sample_categorical",
    "unsqueeze_as",
]


# --- noise_lib -------------------------------------------------------------------------------------------------------


class Noise(abc.ABC, nn.Module):
    """Noise for t in [0, 1]: called with t, answers (sigma(t), dsigma/dt)."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.total_noise(t), self.rate_noise(t)

    @abc.abstractmethod
    def rate_noise(self, t: Tensor) -> Tensor:
        """dsigma/dt."""

    @abc.abstractmethod
    def total_noise(self, t: Tensor) -> Tensor:
        """sigma(t)."""


class GeometricNoise(Noise):
    """sigma(t) = sigma_min^(1 - t) sigma_max^t."""

    def __init__(self, sigma_min: float = 1e-3, sigma_max: float = 1, learnable: bool = False):
        super().__init__()
        self.sigmas = 1.0 * torch.tensor([sigma_min, sigma_max])
        if learnable:
            self.sigmas = nn.Parameter(self.sigmas)
        self.empty = nn.Parameter(torch.tensor(0.0))

    def total_noise(self, t):
        return self.sigmas[0] ** (1 - t) * self.sigmas[1] ** t

    def rate_noise(self, t):
        return self.total_noise(t) * (self.sigmas[1].log() - self.sigmas[0].log())


class LogLinearNoise(Noise):
    """sigma(t) = -log(1 - (1 - eps) t)."""

    def __init__(self, eps: float = 1e-3):
        super().__init__()
        self.eps = eps
        self.empty = nn.Parameter(torch.tensor(0.0))

    def total_noise(self, t):
        return -torch.log1p(-(1 - self.eps) * t)

    def rate_noise(self, t):
        return (1 - self.eps) / (1 - (1 - self.eps) * t)


def get_noise(config) -> Noise:
    """The noise that ``config.noise`` describes: type ``"geometric"`` (sigma_min, sigma_max) or ``"loglinear"``.

    Raises:
        ValueError: another type.
    """
    if config.noise.type == "geometric":
        return GeometricNoise(config.noise.sigma_min, config.noise.sigma_max)
    if config.noise.type == "loglinear":
        return LogLinearNoise()
    raise ValueError(f"{config.noise.type} is not a valid noise")


# --- catsample -------------------------------------------------------------------------------------------------------


def sample_categorical(categorical_probs: Tensor, method: str = "hard") -> Tensor:
    """Draw from weights [..., V]; int64 [...]. Negative weights never win.

    Raises:
        ValueError: a method other than ``"hard"``.
    """
    if method != "hard":
        raise ValueError(f"Method {method} for sampling categorical variables is not valid.")
    exponential = 1e-10 - (torch.rand_like(categorical_probs) + 1e-10).log()
    return (categorical_probs / exponential).argmax(dim=-1)


# --- graph_lib -------------------------------------------------------------------------------------------------------


def get_graph(config, device=None) -> Graph:
    """The graph that ``config.graph.type`` names, ``"uniform"`` or ``"absorb"``, on ``config.tokens`` tokens.

    Raises:
        ValueError: another type.
    """
    if config.graph.type == "uniform":
        return Uniform(config.tokens)
    if config.graph.type == "absorb":
        return Absorbing(config.tokens)
    raise ValueError(f"Graph {config.graph.type} not valid")


def unsqueeze_as(x: Tensor, y: Tensor, back: bool = True) -> Tensor:
    """x with as many dimensions as y, new ones at the back or at the front."""
    ones = (1,) * (y.dim() - x.dim())
    return x.view(*x.shape, *ones) if back else x.view(*ones, *x.shape)


class Graph(abc.ABC):
    """The rates Q at which tokens turn into others. Tokens ``i`` are int64 [...], rows of Q [..., dim]."""

    name: str | None = None
    """What :func:`genfast.discrete_transition` calls it; None: it does not know it."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """How many states there are."""

    @property
    @abc.abstractmethod
    def absorb(self) -> bool:
        """Whether state dim - 1 is absorbing."""

    @abc.abstractmethod
    def rate(self, i: Tensor) -> Tensor:
        """Column i of Q: what i turns into."""

    @abc.abstractmethod
    def transp_rate(self, i: Tensor) -> Tensor:
        """Row i of Q: what turns into i."""

    @abc.abstractmethod
    def transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        """Column i of exp(sigma Q)."""

    def sample_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        """A draw from column i of exp(sigma Q)."""
        return sample_categorical(self.transition(i, sigma), method="hard")

    def reverse_rate(self, i: Tensor, score: Tensor) -> Tensor:
        """Rates of the process that runs backwards, the diagonal included."""
        rates = self.transp_rate(i) * score
        rates = rates.scatter(-1, i[..., None], 0)
        return rates.scatter(-1, i[..., None], -rates.sum(dim=-1, keepdim=True))

    def sample_rate(self, i: Tensor, rate: Tensor) -> Tensor:
        """A draw after a short time: from the identity plus ``rate``."""
        return sample_categorical(rate.scatter_add(-1, i[..., None], torch.ones_like(rate[..., :1])))

    @abc.abstractmethod
    def staggered_score(self, score: Tensor, dsigma: Tensor) -> Tensor:
        """exp(-dsigma Q) applied to the scores: ratios to p_{sigma - dsigma}."""

    @abc.abstractmethod
    def sample_limit(self, *batch_dims: int) -> Tensor:
        """A draw of pure noise, int64 [*batch_dims]."""

    @abc.abstractmethod
    def score_entropy(self, score: Tensor, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """The score entropy of log scores [B, L, dim] at x [B, L] of the text x0, to be weighted with the rate: [B, L].
        sigma is [B, 1]. It is 0 at the ratios of the noised x0 and nowhere below."""


def _expm1(sigma: Tensor) -> Tensor:
    # As published: expm1 where it matters, so that float32 results are the same.
    return torch.where(sigma < 0.5, torch.expm1(sigma), torch.exp(sigma) - 1)


class Uniform(Graph):
    """Every token turns into every other at rate 1 / dim."""

    name = "uniform"

    def __init__(self, dim: int):
        self._dim = dim

    @property
    def dim(self):
        return self._dim

    @property
    def absorb(self):
        return False

    def rate(self, i):
        rates = torch.full((*i.shape, self.dim), 1 / self.dim, device=i.device)
        return rates.scatter(-1, i[..., None], -(self.dim - 1) / self.dim)

    def transp_rate(self, i):
        return self.rate(i)

    def transition(self, i, sigma):
        away = (1 - (-sigma[..., None]).exp()) / self.dim
        rows = away.expand(*i.shape, self.dim).scatter(-1, i[..., None], 0)
        return rows.scatter(-1, i[..., None], 1 - rows.sum(dim=-1, keepdim=True))

    def transp_transition(self, i, sigma):
        """Row i of exp(sigma Q)."""
        return self.transition(i, sigma)

    def sample_transition(self, i, sigma):
        moves = torch.rand(*i.shape, device=i.device) < 1 - (-sigma).exp()
        return torch.where(moves, torch.randint_like(i, self.dim), i)

    def staggered_score(self, score, dsigma):
        shrunk = (-dsigma).exp()[..., None]
        return (shrunk - 1) / (score.shape[-1] * shrunk) * score.sum(dim=-1, keepdim=True) + score / shrunk

    def sample_limit(self, *batch_dims):
        return torch.randint(0, self.dim, batch_dims)

    def score_entropy(self, score, sigma, x, x0):
        grown, dim = _expm1(sigma), self.dim
        ratio = 1 - dim / (grown + dim)

        def others(values):  # the mean over dim of all but x's own
            return values.mean(dim=-1) - values.gather(-1, x[..., None])[..., 0] / dim

        there = others(score)
        towards = score.gather(-1, x0[..., None])[..., 0] / grown
        negative = torch.where(x == x0, ratio * there, towards + there)
        home = (dim - 1) / dim * ratio * (ratio.log() - 1)
        constant = torch.where(x == x0, home, ((-ratio.log() - 1) / ratio - (dim - 2)) / dim)
        return others(score.exp()) - negative + constant


class Absorbing(Graph):
    """Every token turns into the mask, state ``dim`` - 1, at rate 1."""

    name = "absorb"

    def __init__(self, dim: int):
        super().__init__()
        self._dim = dim

    @property
    def dim(self):
        return self._dim + 1

    @property
    def absorb(self):
        return True

    def rate(self, i):
        return F.one_hot(torch.full_like(i, self.dim - 1), self.dim) - F.one_hot(i, self.dim)

    def transp_rate(self, i):
        return (i == self.dim - 1).to(i.dtype)[..., None] - F.one_hot(i, self.dim)

    def transition(self, i, sigma):
        """Column i of exp(sigma Q) (the published class returns None)."""
        left = (-unsqueeze_as(sigma, i[..., None])).exp()
        mask = F.one_hot(torch.full_like(i, self.dim - 1), self.dim)
        return left * F.one_hot(i, self.dim) + (1 - left) * mask

    def transp_transition(self, i, sigma):
        """Row i of exp(sigma Q)."""
        left = (-unsqueeze_as(sigma, i[..., None])).exp()
        return left * F.one_hot(i, self.dim) + torch.where((i == self.dim - 1)[..., None], 1 - left, 0)

    def sample_transition(self, i, sigma):
        moves = torch.rand(*i.shape, device=i.device) < 1 - (-sigma).exp()
        return torch.where(moves, self.dim - 1, i)

    def staggered_score(self, score, dsigma):
        grown = dsigma.exp()
        lost = (1 - grown) * score.sum(dim=-1)
        score = score * grown[:, None]
        score[..., -1] += lost
        return score

    def sample_limit(self, *batch_dims):
        return torch.full(batch_dims, self.dim - 1, dtype=torch.int64)

    def score_entropy(self, score, sigma, x, x0):
        masked = x == self.dim - 1
        ratio = (1 / _expm1(sigma)).expand_as(x)[masked]
        rows = score[masked]
        negative = ratio * rows.gather(-1, x0[masked][..., None])[..., 0]
        found = rows[:, :-1].exp().sum(dim=-1) - negative + ratio * (ratio.log() - 1)
        return torch.zeros(*x.shape, device=x.device).masked_scatter(masked, found.float())


# --- scores ----------------------------------------------------------------------------------------------------------


def get_model_fn(model: Callable, train: bool = False) -> Callable:
    """``model_fn(x, sigma)``: the model in training or evaluation mode."""

    def model_fn(x, sigma):
        if hasattr(model, "train"):
            model.train(train)
        return model(x, sigma)

    return model_fn


class _Score:
    """Scores of a model of log scores; the steps of this module read the logarithms."""

    def __init__(self, model_fn: Callable):
        self.model_fn = model_fn

    def log(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.model_fn(x, sigma.reshape(-1))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.log(x, sigma).exp()


def get_score_fn(model: Callable, train: bool = False, sampling: bool = False) -> Callable:
    """``score_fn(x, sigma)``: scores with ``sampling``, log scores without; sigma has one entry per row."""
    assert not (sampling and train), "Must sample in eval mode"
    score = _Score(get_model_fn(model, train=train))
    return score if sampling else score.log


# --- sampling --------------------------------------------------------------------------------------------------------


_predictors: dict[str, type] = {}


def register_predictor(cls: type | None = None, *, name: str | None = None):
    """Decorator: register a predictor class under a name, by default its own."""

    def register(cls):
        key = cls.__name__ if name is None else name
        if key in _predictors:
            raise ValueError(f"Already registered model with name: {key}")
        _predictors[key] = cls
        return cls

    return register if cls is None else register(cls)


def get_predictor(name: str) -> type:
    """The class registered under a name: ``"euler"``, ``"analytic"`` or ``"none"``, or a user's own."""
    return _predictors[name]


def _step(graph, rule: str, score_fn: Callable, x, sigma, amount, eager: Callable, randomness: dict) -> Tensor:
    """A reverse step: fused where the kernel knows the graph, or ``eager(score)``."""
    own = type(score_fn) is _Score
    output = score_fn.log(x, sigma) if own else score_fn(x, sigma)
    fits = type(graph) in (Absorbing, Uniform) and x.dim() == 2 and output.dtype in LOGIT_DTYPES
    if not fits:
        if randomness:
            raise ValueError("seed needs a graph of genfast.dropin.sedd, x [B, L] and scores of at most 32 bits")
        return eager(output.exp() if own else output)
    if not randomness:
        width = output.shape[-1] - (rule == "denoise" and graph.absorb)
        dtype = torch.promote_types(output.dtype, sigma.dtype)
        randomness = dict(noise=torch.rand(*x.shape, width, device=x.device, dtype=dtype))
    return discrete_transition(
        x,
        output if own else output.log(),
        amount.reshape(-1),
        graph=graph.name,
        rule=rule,
        mask_id=graph.dim - 1 if graph.absorb else None,
        **randomness,
    ).x


class Predictor(abc.ABC):
    """A reverse step from t to t - step_size."""

    def __init__(self, graph: Graph, noise: Callable):
        super().__init__()
        self.graph, self.noise = graph, noise

    @abc.abstractmethod
    def update_fn(self, score_fn: Callable, x: Tensor, t: Tensor, step_size: float) -> Tensor:
        """x [B, L] at time t [B, 1] to x at time t - step_size."""


@register_predictor(name="euler")
class EulerPredictor(Predictor):
    """Tau-leaping: the rates of time t for the whole step."""

    def update_fn(self, score_fn, x, t, step_size, **randomness):
        """See :class:`Predictor`; randomness: seed, stream, offset of :func:`genfast.discrete_transition`."""
        sigma, dsigma = self.noise(t)

        def eager(score):
            return self.graph.sample_rate(x, step_size * dsigma[..., None] * self.graph.reverse_rate(x, score))

        return _step(self.graph, "euler", score_fn, x, sigma, step_size * dsigma, eager, randomness)


@register_predictor(name="none")
class NonePredictor(Predictor):
    """No step at all."""

    def update_fn(self, score_fn, x, t, step_size, **randomness):
        return x


@register_predictor(name="analytic")
class AnalyticPredictor(Predictor):
    """Tweedie tau-leaping: exact for one position on its own."""

    def update_fn(self, score_fn, x, t, step_size, **randomness):
        """See :class:`Predictor`; randomness: seed, stream, offset of :func:`genfast.discrete_transition`."""
        sigma = self.noise(t)[0]
        dsigma = sigma - self.noise(t - step_size)[0]

        def eager(score):
            staggered = self.graph.staggered_score(score, dsigma)
            return sample_categorical(staggered * self.graph.transp_transition(x, dsigma))

        return _step(self.graph, "analytic", score_fn, x, sigma, dsigma, eager, randomness)


class Denoiser:
    """The last step: all the noise at once, never to the mask."""

    def __init__(self, graph: Graph, noise: Callable):
        self.graph, self.noise = graph, noise

    def update_fn(self, score_fn, x, t, **randomness):
        """x [B, L] at time t [B, 1] to text; randomness: seed, stream, offset of
        :func:`genfast.discrete_transition`."""
        sigma = self.noise(t)[0]

        def eager(score):
            staggered = self.graph.staggered_score(score, sigma)
            probs = staggered * self.graph.transp_transition(x, sigma)
            return sample_categorical(probs[..., :-1] if self.graph.absorb else probs)

        return _step(self.graph, "denoise", score_fn, x, sigma, sigma, eager, randomness)


def get_sampling_fn(config, graph: Graph, noise: Callable, batch_dims, eps: float, device) -> Callable:
    """The sampler that ``config.sampling`` asks for: predictor, steps, noise_removal."""
    options = config.sampling
    return get_pc_sampler(
        graph=graph,
        noise=noise,
        batch_dims=batch_dims,
        predictor=options.predictor,
        steps=options.steps,
        denoise=options.noise_removal,
        eps=eps,
        device=device,
    )


def get_pc_sampler(
    graph: Graph,
    noise: Callable,
    batch_dims,
    predictor: str,
    steps: int,
    denoise: bool = True,
    eps: float = 1e-5,
    device="cpu",
    proj_fun: Callable = lambda x: x,
    *,
    seed: int | Tensor | torch.Generator | None = None,
    offset: int = 0,
) -> Callable:
    """``pc_sampler(model)``: ``steps`` reverse steps from pure noise to time ``eps``, and one that takes out the rest.

    Args:
        graph, noise: of this module or a user's own.
        batch_dims: (B, L).
        predictor: a registered name.
        proj_fun: applied to x before every step (not after the last, as published): tokens that are known.
        seed, offset: draw inside the kernels, see :func:`genfast.discrete_transition`; the step is the stream. Of a
            generator a seed is drawn at every call of the sampler.
    """
    predict = get_predictor(predictor)(graph, noise)
    denoiser = Denoiser(graph, noise)

    @torch.no_grad()
    def pc_sampler(model):
        chosen = one_seed(seed)
        score_fn = get_score_fn(model, train=False, sampling=True)
        if chosen is None or graph.absorb:
            x = graph.sample_limit(*batch_dims).to(device)
        else:
            rows = torch.arange(batch_dims[0], device=device) + offset
            rows = torch.full_like(rows, offset) if isinstance(chosen, Tensor) and chosen.dim() == 1 else rows
            places = torch.arange(batch_dims[1], device=device)
            x = uniform_tokens(chosen, (rows[:, None] << 32) | places, graph.dim)
        timesteps = torch.linspace(1, eps, steps + 1, device=device)
        dt = (1 - eps) / steps

        def randomness(i):
            return {} if chosen is None else dict(seed=chosen, stream=i, offset=offset)

        for i in range(steps):
            t = timesteps[i] * torch.ones(x.shape[0], 1, device=device)
            x = predict.update_fn(score_fn, proj_fun(x), t, dt, **randomness(i))
        if denoise:
            t = timesteps[-1] * torch.ones(x.shape[0], 1, device=device)
            x = denoiser.update_fn(score_fn, proj_fun(x), t, **randomness(steps))
        return x

    return pc_sampler


# --- losses ----------------------------------------------------------------------------------------------------------


def get_loss_fn(noise: Callable, graph: Graph, train: bool, sampling_eps: float = 1e-3, lv: bool = False) -> Callable:
    """``loss_fn(model, batch, cond=None, t=None, perturbed_batch=None)``: the score entropy of texts [B, L], times the
    rate of the noise, summed over positions: [B]. Times are uniform in [sampling_eps, 1] where none are given.

    Raises:
        NotImplementedError: (from the loss) ``lv``, which the published code has not written either.
    """

    def loss_fn(model, batch, cond=None, t=None, perturbed_batch=None):
        if t is None:
            if lv:
                raise NotImplementedError("lv has no published definition: give t")
            t = (1 - sampling_eps) * torch.rand(batch.shape[0], device=batch.device) + sampling_eps
        sigma, dsigma = noise(t)
        if perturbed_batch is None:
            perturbed_batch = graph.sample_transition(batch, sigma[:, None])
        log_score = get_score_fn(model, train=train, sampling=False)(perturbed_batch, sigma)
        loss = graph.score_entropy(log_score, sigma[:, None], perturbed_batch, batch)
        return (dsigma[:, None] * loss).sum(dim=-1)

    return loss_fn
