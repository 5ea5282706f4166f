"""Models of text whose exact answers are known, and the published steps of SEDD and MDLM written out with matrices."""

import itertools
import math

import torch


class Joint:
    """A joint distribution of ``length`` tokens of ``size`` ids, small enough to enumerate; the mask is id ``size``."""

    def __init__(self, size=3, length=3, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.size, self.length, self.mask = size, length, size
        self.texts = torch.tensor(list(itertools.product(range(size), repeat=length)))
        p = torch.rand(len(self.texts), generator=g, dtype=torch.float64) ** 3 + 0.01
        self.p = p / p.sum()
        self.states = torch.tensor(list(itertools.product(range(size + 1), repeat=length)))
        fits = ((self.states[:, None] == self.texts) | (self.states[:, None] == self.mask)).all(-1)
        weight = fits * self.p  # [states, texts]
        hot = torch.nn.functional.one_hot(self.texts, size).double()
        self.conditionals = torch.einsum("st,tly->sly", weight, hot) / weight.sum(1)[:, None, None]

    def index(self, x, base=None):
        """Places of x [B, L] in ``states``, or in ``texts`` with base = size."""
        base = self.size + 1 if base is None else base
        return (x * base ** torch.arange(self.length - 1, -1, -1)).sum(1)

    def logits(self, x):
        """log P(x_i = y | what x holds), float32 [B, L, size + 1], any number for the mask; x may lack its end."""
        held = torch.nn.functional.pad(x, (0, self.length - x.shape[1]), value=self.mask)
        found = self.conditionals[self.index(held)].log()[:, : x.shape[1]]
        return torch.nn.functional.pad(found, (0, 1), value=1.5).float()

    def absorb_scores(self, x, sigma):
        """Exact log scores where the mask absorbs; those that no step needs are made up."""
        found = self.conditionals[self.index(x)].log() - torch.expm1(sigma.double()).log()[:, None, None]
        found = torch.nn.functional.pad(found, (0, 1), value=0.0)
        made_up = torch.full_like(found, -0.3).scatter(-1, x[..., None], 0.0)
        return torch.where((x == self.mask)[..., None], found, made_up).float()

    def uniform_scores(self, x, sigma):
        """Exact log scores on the uniform graph; one sigma for all rows."""
        assert (sigma == sigma[0]).all()
        stay = torch.exp(-sigma[0].double())
        kernel = stay * torch.eye(self.size, dtype=torch.float64) + (1 - stay) / self.size
        p = self.p.reshape((self.size,) * self.length)
        for _ in range(self.length):
            p = torch.tensordot(p, kernel, dims=([0], [0]))
        p, i = p.reshape(-1), self.index(x, self.size)
        place = self.size ** torch.arange(self.length - 1, -1, -1)
        others = i[:, None, None] + (torch.arange(self.size) - x[..., None]) * place[:, None]
        return (p[others] / p[i][:, None, None]).log().float()


class Mixer(torch.nn.Module):
    """A model without a law: logits that depend on all ids, and a little on sigma."""

    def __init__(self, size, width=8, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randn(size, width, generator=g)
        self.head = torch.randn(width, size, generator=g)
        self.calls = 0

    def forward(self, x, sigma=None, attention_mask=None):
        self.calls += 1
        weight = torch.ones(x.shape) if attention_mask is None else attention_mask.float()
        place = (weight.cumsum(1) * 0.37).sin()[..., None]
        h = self.ids[x] * weight[..., None]
        h = torch.tanh(h + h.sum(1, keepdim=True) / weight.sum(1)[:, None, None] + place)
        if sigma is not None:
            h = h * (1 + 0.1 * torch.tanh(sigma.reshape(-1, 1, 1).float()))
        return h @ self.head


def draw(weights, noise):
    """The published draw from weights [..., V]."""
    return (weights / (1e-10 - (noise + 1e-10).log())).argmax(-1)


def rates(graph, size):
    """Q, whose column i says what i turns into; on the absorbing graph the mask is the last id."""
    if graph == "uniform":
        return torch.full((size, size), 1 / size, dtype=torch.float64) - torch.eye(size, dtype=torch.float64)
    q = -torch.eye(size, dtype=torch.float64)
    q[-1] += 1
    return q


def sedd_weights(x, log_score, graph, rule, amount):
    """Weights [B, L, V] of a step; amount is dt sigma' (euler), the difference of sigma (analytic) or sigma."""
    size = log_score.shape[-1]
    q, score = rates(graph, size), log_score.double().exp()
    hot = torch.nn.functional.one_hot(x, size).double()
    if rule == "euler":
        flow = q[x] * score * (1 - hot)
        return hot * (1 - amount * flow.sum(-1, keepdim=True)) + amount * flow
    staggered = score @ torch.matrix_exp(-amount * q).T
    weights = staggered * torch.matrix_exp(amount * q)[x]
    return weights[..., :-1] if rule == "denoise" and graph == "absorb" else weights


def mdlm_weights(x, logits, chance_t, chance_s, mask):
    """Weights [B, L, V] of a step from t to s, unmasked positions certain."""
    p = logits.clone().float()
    p[..., mask] = -torch.inf
    p = p.softmax(-1) * (chance_t - chance_s)
    p[..., mask] = chance_s
    return torch.where((x == mask)[..., None], p, torch.nn.functional.one_hot(x, p.shape[-1]).to(p))


def chain(joint, start, steps):
    """The law after ``steps``, each a function of the states that gives weights [S, L, ids]; start is a law."""
    states, law = start
    for weights in steps:
        w = weights(states).double().clamp_min(0)
        w = torch.nn.functional.pad(w, (0, int(states.max()) + 1 - w.shape[-1])) if w.shape[-1] <= states.max() else w
        w = w / w.sum(-1, keepdim=True)
        jump = torch.ones(len(states), len(states), dtype=torch.float64)
        for i in range(joint.length):
            jump *= w[:, i][:, states[:, i]]
        law = law @ jump
    return law


def chi_square(found, law):
    """Assert that counts [K] are of the law [K]: a false alarm once in 10^5 seeds (Wilson and Hilferty's bound).

    Classes expected fewer than 5 times count as one.
    """
    expected = law * found.sum()
    few = expected < 5
    assert not found[law == 0].any()
    counts = torch.cat([found[~few].double(), found[few].sum().double().reshape(1)])
    expected = torch.cat([expected[~few], expected[few].sum().reshape(1)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if expected[-1] < 5 and len(expected) > 1:
        counts = torch.cat([counts[:-2], counts[-2:].sum().reshape(1)])
        expected = torch.cat([expected[:-2], expected[-2:].sum().reshape(1)])
    k = len(expected) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    limit = k * (1 - 2 / (9 * k) + 4.27 * math.sqrt(2 / (9 * k))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {k} degrees of freedom, limit {limit:.1f}"
