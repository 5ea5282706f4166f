"""Hugging Face's EnCodec and DAC with the lookup of ``genfast.dropin.encodec``: the same codes and the same sound."""

import copy
import subprocess
import sys

import pytest
import torch

from genfast.dropin import patching

pytest.importorskip("transformers")
try:
    patching.PEERS["transformers"].check()
except ImportError as unsupported:
    pytest.skip(str(unsupported), allow_module_level=True)

import transformers

import genfast.dropin.encodec as ours
from genfast.ops.vector_quantize import nearest_code


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch):
    """The metric of every lookup of ours."""
    found = []

    def nearest(*args, **kwargs):
        found.append(kwargs.get("metric", "l2"))
        return wanted(*args, **kwargs)

    wanted = ours.nearest
    monkeypatch.setattr(ours, "nearest", nearest)
    return found


def encodec():
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        hidden_size=16, codebook_dim=16, codebook_size=64, num_filters=4, upsampling_ratios=[4, 2], num_lstm_layers=1,
        target_bandwidths=[24.0, 48.0], sampling_rate=8000,
    )  # fmt: skip
    model = transformers.EncodecModel(config).eval()
    with torch.no_grad():
        vectors = model.encoder(randn(2, 1, 800))
    centre, spread = vectors.mean((0, 2)), vectors.std((0, 2))
    for i, layer in enumerate(model.quantizer.layers):
        layer.codebook.embed.copy_(randn(64, 16, seed=i) * spread * 0.7**i + (centre if i == 0 else 0))
    return model


def dac():
    torch.manual_seed(0)
    config = transformers.DacConfig(
        encoder_hidden_size=8, downsampling_ratios=[2, 4], decoder_hidden_size=32, n_codebooks=3, codebook_size=64,
        codebook_dim=8, hidden_size=32,
    )  # fmt: skip
    return transformers.DacModel(config).eval()


def test_encodec(calls):
    model = encodec()
    sound = randn(2, 1, 800)
    expected = model(sound, bandwidth=24.0)
    mine = ours.replace(copy.deepcopy(model))
    got = mine(sound, bandwidth=24.0)
    assert len(calls) == got.audio_codes.shape[2] > 1 and set(calls) == {"l2"}
    assert got.audio_codes.unique().numel() > 20
    assert torch.equal(got.audio_codes, expected.audio_codes)
    torch.testing.assert_close(got.audio_values, expected.audio_values, rtol=0, atol=0)
    assert list(mine.state_dict()) == list(model.state_dict())
    rows = randn(50, 16)
    book, theirs = mine.quantizer.layers[0].codebook, model.quantizer.layers[0].codebook
    assert torch.equal(book.quantize(rows), theirs.quantize(rows))
    assert torch.equal(book.encode(rows.view(5, 10, 16)), theirs.encode(rows.view(5, 10, 16)))


def test_dac_in_eval_and_training(calls):
    model = dac()
    mine = ours.replace(copy.deepcopy(model))
    sound = randn(2, 1, 640)
    for mode in (False, True):
        results = []
        for m in (model.train(mode), mine.train(mode)):
            torch.manual_seed(1)
            m.zero_grad()
            out = m(sound)
            loss = out.audio_values.square().mean()
            if out.loss is not None:
                loss = loss + out.loss.mean()
            loss.backward()
            results.append((out, [p.grad for p in m.parameters()]))
        (expected, wanted), (got, grads) = results
        assert torch.equal(got.audio_codes, expected.audio_codes) and got.audio_codes.unique().numel() > 20
        for name in ("audio_values", "quantized_representation", "projected_latents"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)
        for a, b in zip(grads, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert set(calls) == {"cosine"} and len(calls) == 6


def test_dac_from_latents(calls):
    model = dac()
    mine = ours.replace(copy.deepcopy(model))
    latents = randn(2, 24, 30)
    for a, b in zip(mine.quantizer.from_latents(latents), model.quantizer.from_latents(latents)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(calls) == 3


def test_half_precision_takes_the_nearest():
    """The peer's distances in bfloat16 have three digits."""
    model = ours.replace(encodec().to(torch.bfloat16))
    book = model.quantizer.layers[0].codebook
    rows = randn(200, 16).to(torch.bfloat16)
    squares = (rows[:, None].double() - book.embed.double()).square().sum(2)
    assert torch.equal(book.quantize(rows), squares.argmin(1))


def test_where_the_peer_disagrees_the_gap_is_below_its_rounding():
    """It compares |z|^2 - 2 z e + |e|^2 in float32, here far from zero."""
    model = encodec()
    theirs = model.quantizer.layers[0].codebook
    theirs.embed.add_(300)
    z = randn(3000, 16) + 300
    expected = theirs.quantize(z)
    got = ours.replace(model).quantizer.layers[0].codebook.quantize(z)
    assert torch.equal(got, nearest_code(z, theirs.embed))
    squares = (z[:, None].double() - theirs.embed.double()).square().sum(2)
    gap = (squares.gather(1, expected[:, None]) - squares.gather(1, got[:, None]))[:, 0]
    assert (got != expected).any()
    rounding = 4 * 16 * 2.0**-24 * (z.double().square().sum(1) + theirs.embed.double().square().sum(1).max())
    assert bool((gap >= 0).all()) and bool((gap <= rounding).all())


def test_restored_and_refused():
    model = encodec()
    names = [type(m).__module__ for m in model.modules()]
    assert ours.replace(model) is model and ours.replace(model) is model  # twice does nothing more
    assert sum(type(m).__module__ == "genfast.dropin.encodec" for m in model.modules()) == 2 * len(
        model.quantizer.layers
    )
    assert ours.restore(model) is model
    assert [type(m).__module__ for m in model.modules()] == names
    with pytest.raises(ValueError, match="Linear has no codebook"):
        ours.replace(torch.nn.Linear(2, 2))


def test_saved_as_the_peers(tmp_path):
    model = ours.replace(encodec())
    model.save_pretrained(tmp_path)
    again = transformers.EncodecModel.from_pretrained(tmp_path)
    sound = randn(1, 1, 400)
    assert torch.equal(again(sound, bandwidth=24.0).audio_codes, model(sound, bandwidth=24.0).audio_codes)


def test_the_peer_is_imported_only_when_asked_for():
    code = "import genfast, genfast.dropin.taming, sys; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
