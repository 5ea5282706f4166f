"""``VectorQuantizer2`` of ``genfast.dropin.var`` beside the arithmetic VAR publishes (``models/quant.py``) in eager
PyTorch."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_multiscale_quantize import SMALL, published, randn
from torch import nn

from genfast.dropin.var import VectorQuantizer2

CODES, DIM = 30, 6


def built(**options):
    torch.manual_seed(0)
    quantizer = VectorQuantizer2(CODES, DIM, **{"using_znorm": False, "v_patch_nums": SMALL, **options})
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def phis_of(quantizer):
    return [quantizer.quant_resi[s / (len(SMALL) - 1)] for s in range(len(SMALL))]


@pytest.mark.parametrize("share, keys", [(0, 8), (1, 2), (4, 8), (2, 4)])
@pytest.mark.parametrize("cosine", [False, True])
def test_forward(share, keys, cosine):
    quantizer = built(share_quant_resi=share, using_znorm=cosine, beta=0.5)
    assert len(quantizer.state_dict()) == 2 + keys
    z, results = randn(2, DIM, 5, 5), []
    for ours in (True, False):
        x = z.clone().requires_grad_()
        quantizer.zero_grad()
        if ours:
            f_hat, usages, loss = quantizer(x)
            assert usages is None
        else:
            f_hat, loss, *_ = published(x, quantizer.embedding.weight, SMALL, phis_of(quantizer), cosine, 0.5)
        ((f_hat * randn(*z.shape, seed=3)).sum() + loss).backward()
        results.append((f_hat, loss, x.grad, *(p.grad.clone() for p in quantizer.parameters())))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_keys_are_vars():
    names = {
        0: "quant_resi.3.weight",
        1: "quant_resi.qresi.weight",
        4: "quant_resi.qresi_ls.3.weight",
    }
    for share, name in names.items():
        state = built(share_quant_resi=share).state_dict()
        assert {"embedding.weight", "ema_vocab_hit_SV", name} <= set(state)
        assert state["ema_vocab_hit_SV"].shape == (len(SMALL), CODES)
    assert set(built(quant_resi=0).state_dict()) == {"embedding.weight", "ema_vocab_hit_SV"}


@torch.no_grad()
def test_methods():
    quantizer = built()
    z, weight, phis = randn(2, DIM, 5, 5), quantizer.embedding.weight, phis_of(quantizer)
    _, _, indices, sums = published(z, weight, SMALL, phis, False, 0.25)
    found = quantizer.f_to_idxBl_or_fhat(z, to_fhat=False)
    assert all(torch.equal(a, b.flatten(1)) for a, b in zip(found, indices))
    for a, b in zip(quantizer.f_to_idxBl_or_fhat(z, to_fhat=True), sums):
        torch.testing.assert_close(a, b)
    codes = [weight[index].movedim(-1, 1) for index in indices]
    for a, b in zip(quantizer.embed_to_fhat(codes), sums):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(quantizer.embed_to_fhat(codes, last_one=True), sums[-1])

    inputs = [F.interpolate(f, size=(side, side), mode="area").flatten(2).mT for f, side in zip(sums, SMALL[1:])]
    torch.testing.assert_close(quantizer.idxBl_to_var_input(found), torch.cat(inputs, 1))
    f_hat = torch.zeros_like(z)
    for s, wanted in enumerate(sums):
        got, following = quantizer.get_next_autoregressive_input(s, len(SMALL), f_hat, codes[s])
        torch.testing.assert_close(f_hat, wanted)
        assert got is f_hat
        if s + 1 < len(SMALL):
            torch.testing.assert_close(following.flatten(2).mT, inputs[s])
    assert following is f_hat
    with pytest.raises(ValueError, match="SN is 3"):
        quantizer.get_next_autoregressive_input(0, 3, f_hat, codes[0])


@torch.no_grad()
def test_other_scales_and_growing_ones():
    quantizer = built()
    z = randn(1, DIM, 4, 6)
    found = quantizer.f_to_idxBl_or_fhat(z, to_fhat=False, v_patch_nums=[1, (2, 3), (4, 6)])
    assert [tuple(index.shape) for index in found] == [(1, 1), (1, 6), (1, 24)]
    codes = [randn(1, DIM, side, side, seed=side) for side in SMALL]
    maps = quantizer.embed_to_fhat(codes, all_to_max_scale=False)
    f_hat = torch.zeros(1, DIM, 1, 1)
    for side, code, phi, got in zip(SMALL, codes, phis_of(quantizer), maps):
        f_hat = F.interpolate(f_hat, size=(side, side), mode="bicubic") + phi(code)
        torch.testing.assert_close(got, f_hat)
    square = randn(2, DIM, 5, 5)
    everything = quantizer.f_to_idxBl_or_fhat(square, to_fhat=False)
    inputs = quantizer.idxBl_to_var_input(everything)
    quantizer.prog_si = 1
    assert len(quantizer.f_to_idxBl_or_fhat(square, to_fhat=False)) == 2
    assert torch.equal(quantizer.idxBl_to_var_input(everything), inputs[:, :4])
    quantizer.prog_si = 0
    assert quantizer.idxBl_to_var_input(everything) is None


def test_hits(tmp_path):
    """Counted in training of several processes, here of one."""
    quantizer, z = built(), randn(2, DIM, 5, 5)
    quantizer(z)
    assert quantizer.record_hit == 0 and not quantizer.ema_vocab_hit_SV.any()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        expected = torch.zeros(len(SMALL), CODES)
        for step in range(2):
            indices = quantizer.f_to_idxBl_or_fhat(z * (step + 1), to_fhat=False)
            for s, index in enumerate(indices):
                hits = torch.bincount(index.flatten(), minlength=CODES).float()
                expected[s] = hits if step == s == 0 else 0.9 * expected[s] + 0.1 * hits
            _, usages, _ = quantizer(z * (step + 1), ret_usages=True)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(quantizer.ema_vocab_hit_SV, expected)
    assert quantizer.record_hit == 2 * len(SMALL)
    margin = 2 * 25 / CODES * 0.08
    assert usages == pytest.approx([(row >= margin).float().mean().item() * 100 for row in expected])
    quantizer.eval()(z)
    assert quantizer.record_hit == 2 * len(SMALL)


def test_initial_codes():
    quantizer = built()
    quantizer.eini(-3)
    assert quantizer.embedding.weight.abs().max() <= 3 / CODES
    quantizer.eini(0.01)
    assert 0.005 < quantizer.embedding.weight.std() < 0.02
    before = quantizer.embedding.weight.clone()
    quantizer.eini(0)
    assert torch.equal(before, quantizer.embedding.weight) and "S=4" in repr(quantizer)
