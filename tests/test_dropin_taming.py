"""``VectorQuantizer2`` of ``genfast.dropin.taming`` beside the arithmetic that taming-transformers publishes, written
here in eager PyTorch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import genfast.dropin.taming as ours
from genfast.dropin.taming import VectorQuantizer2

CODES, DIM, BETA = 20, 6, 0.25


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Published(nn.Module):
    """Distances as a matrix, argmin, two mean squares, straight through."""

    def __init__(self, weight, legacy, used=None, unknown=None, sane=False):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.legacy, self.used, self.unknown, self.sane = legacy, used, unknown, sane

    def forward(self, z):
        rows = z.movedim(1, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        squares = flat.square().sum(1, keepdim=True) + self.weight.square().sum(1)
        indices = (squares - 2 * flat @ self.weight.t()).argmin(1)
        codes = self.weight[indices].view(rows.shape)
        to_z = (codes.detach() - rows).square().mean()
        to_codes = (codes - rows.detach()).square().mean()
        loss = to_z + BETA * to_codes if self.legacy else BETA * to_z + to_codes
        out = (rows + (codes - rows).detach()).movedim(-1, 1).contiguous()
        if self.used is not None:
            match = indices[:, None] == self.used
            found, missing = match.long().argmax(1), ~match.any(1)
            if self.unknown == "random":
                found[missing] = torch.randint(0, len(self.used), found[missing].shape)
            else:
                found[missing] = len(self.used) if self.unknown == "extra" else self.unknown
            indices = found[:, None]
        if self.sane:
            indices = indices.view(z.shape[0], *z.shape[2:])
        return out, loss, (None, None, indices)


def built(**options):
    torch.manual_seed(0)
    quantizer = VectorQuantizer2(CODES, DIM, BETA, **options)
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def compared(quantizer, published, z):
    results = []
    for q, weight in ((quantizer, quantizer.embedding.weight), (published, published.weight)):
        x = z.clone().requires_grad_()
        torch.manual_seed(4)
        out = q(x)
        ((out[0] * randn(*z.shape, seed=7)).sum() + 3 * out[1]).backward()
        results.append((*out[:2], x.grad, weight.grad))
        results[-1] = (results[-1], out[2])
    (got, (perplexity, one_hot, indices)), (expected, (_, _, wanted)) = results
    assert perplexity is None and one_hot is None
    assert torch.equal(indices, wanted) and indices.shape == wanted.shape
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert got[0].is_contiguous()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("sane", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_as_published(legacy, sane, channels_last):
    quantizer = built(legacy=legacy, sane_index_shape=sane)
    z = randn(3, DIM, 4, 5, seed=1)
    if channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
    compared(quantizer, Published(quantizer.embedding.weight, legacy, sane=sane), z)


def test_legacy_is_the_default():
    assert VectorQuantizer2(CODES, DIM, BETA).legacy is True


@pytest.mark.parametrize("unknown", ["random", "extra", 2])
@pytest.mark.parametrize("sane", [True, False])
def test_remapped(tmp_path, unknown, sane):
    used = torch.tensor([3, 1, 17, 4, 3, 9])
    np.save(tmp_path / "used.npy", used.numpy())
    quantizer = built(remap=str(tmp_path / "used.npy"), unknown_index=unknown, sane_index_shape=sane)
    assert quantizer.re_embed == 6 + (unknown == "extra") and torch.equal(quantizer.used, used)
    published = Published(quantizer.embedding.weight, True, used, unknown, sane)
    compared(quantizer, published, randn(3, DIM, 4, 5, seed=1))

    entry = quantizer.get_codebook_entry(torch.tensor([0, 2, 5, 6 if unknown == "extra" else 4]), (1, 2, 2, DIM))
    codes = used[[0, 2, 5, 0 if unknown == "extra" else 4]]
    assert torch.equal(entry, quantizer.embedding.weight[codes].view(1, 2, 2, DIM).permute(0, 3, 1, 2))


def test_codebook_entries():
    quantizer = built()
    z = randn(2, DIM, 3, 4)
    z_q, _, (_, _, indices) = quantizer(z)
    entry = quantizer.get_codebook_entry(indices, (2, 3, 4, DIM))
    assert torch.equal(entry, z_q) and entry.is_contiguous()
    assert torch.equal(quantizer.get_codebook_entry(indices, None), quantizer.embedding.weight[indices])


def test_state_dict_and_first_codes():
    quantizer = VectorQuantizer2(CODES, DIM, BETA)
    assert list(quantizer.state_dict()) == ["embedding.weight"]
    weight = quantizer.embedding.weight
    assert weight.shape == (CODES, DIM) and 0.9 / CODES < float(weight.abs().max().detach()) <= 1 / CODES
    other = VectorQuantizer2(CODES, DIM, BETA)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    z = randn(2, DIM, 3, 4)
    assert torch.equal(other(z)[2][2], quantizer(z)[2][2])


def test_one_lookup(monkeypatch):
    calls = []
    wanted = ours.nearest
    monkeypatch.setattr(ours, "nearest", lambda *args, **kwargs: calls.append(1) or wanted(*args, **kwargs))
    built()(randn(2, DIM, 3, 4))
    assert len(calls) == 1


def test_refusals():
    for options in (dict(temp=0.5), dict(rescale_logits=True), dict(return_logits=True)):
        with pytest.raises(ValueError, match="Gumbel"):
            built()(randn(1, DIM, 2, 2), **options)
    assert built()(randn(1, DIM, 2, 2), temp=1.0)[0].shape == (1, DIM, 2, 2)
