"""The counter-based random numbers: known answers, agreement of the backends to the bit, and their distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import genfast
from genfast import backends
from genfast.random import normal_from_words, philox_words, reference_normal

ISAS = backends.machine_isas() or ("none",)


@pytest.fixture(params=ISAS)
def module(request):
    if request.param == "none":
        pytest.skip(backends.cpu_missing())
    with backends.instruction_set(request.param):
        yield backends.cpu_module()


# Published known-answer vectors of Philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    def tensor(value):
        return torch.tensor(value - 2**64 if value >= 2**63 else value)

    got = philox_words(
        tensor(key[0] | key[1] << 32), tensor(counter[0] | counter[1] << 32), tensor(counter[2]), tensor(counter[3])
    )
    assert tuple(int(w) for w in got) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("block", [0, 16, 2**32 - 16, 2**32, 2**40 + 32])
def test_kernel_words_are_the_reference_words(seed, block, module):
    got = np.zeros((4, 16), np.uint32)
    module.philox_words(seed, block, 3, 0xFFFFFFFE, got.ctypes.data)
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    want = philox_words(signed, torch.arange(block, block + 16), torch.tensor(3), torch.tensor(0xFFFFFFFE))
    assert (torch.stack(want).numpy() == got).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (2, 65), (1, 100_001), (5, 512), (2, 1537)])
def test_kernel_normals_are_the_reference_normals(shape, module):
    got = genfast.randn(*shape, seed=17, stream=2, offset=4)
    assert torch.equal(got, reference_normal(*shape, seed=17, stream=2, offset=4))


def test_normals_are_within_the_stated_error_of_mathematics():
    g = torch.Generator().manual_seed(0)
    w0, w1 = (torch.randint(0, 2**32, (1_000_000,), generator=g) for _ in range(2))
    w0[:64], w0[64:128] = torch.arange(64), 2**32 - 1 - torch.arange(64)
    w1[:64] = torch.arange(64) * 2**26
    u = (w0 | 1).float().double() * 2.0**-32
    radius = torch.sqrt(-2 * torch.log(u))
    turns = ((w1 & ~63) | 32).double() * 2.0**-32
    # Sines of an exactly reduced angle, so that float64 is good near the zeros too.
    quadrant = torch.round(turns * 4)
    rest = (turns - quadrant / 4) * 2 * math.pi
    sin, cos = rest.sin(), rest.cos()
    quadrant = quadrant.long() % 4
    true_cos = torch.stack([cos, -sin, -cos, sin]).gather(0, quadrant[None])[0]
    true_sin = torch.stack([sin, cos, -sin, -cos]).gather(0, quadrant[None])[0]
    for got, want in zip(normal_from_words(w0, w1), (radius * true_cos, radius * true_sin)):
        ulp = torch.from_numpy(np.spacing(want.abs().float().numpy())).double()
        assert (((got.double() - want).abs() / ulp) <= 2.5).all()


def test_distribution():
    """Moments, tails and a Kolmogorov-Smirnov test at a fixed seed; each bound has a false-alarm rate below 1e-4."""
    n = 1_000_000
    z = genfast.randn(10, n // 10, seed=123).double().flatten()
    for k, (moment, spread) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((z**k).mean().item() - moment) < 4 * math.sqrt(spread / n)
    cdf = torch.special.ndtr(z.sort().values)
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert max((grid - cdf).max(), (cdf - grid + 1 / n).max()) < 2.23 / math.sqrt(n)
    expected = n * 2 * 0.5 * math.erfc(4 / math.sqrt(2))
    assert abs((z.abs() > 4).sum().item() - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("distance", [1, 2, 16, 32, 48, 64, 1000])
def test_neighbours_are_uncorrelated(distance):
    z = genfast.randn(1, 400_000, seed=5)[0].double()
    n = z.numel() - distance
    assert abs((z[:n] * z[distance:]).mean().item()) < 4 / math.sqrt(n)
    assert abs((z[:n] ** 2 * z[distance:] ** 2).mean().item() - 1) < 4 * math.sqrt(8 / n)


def test_streams_seeds_and_samples_are_uncorrelated():
    draws = [
        genfast.randn(1, 100_000, seed=1),
        genfast.randn(1, 100_000, seed=2),
        genfast.randn(1, 100_000, seed=1 + 2**32),
        genfast.randn(1, 100_000, seed=1, stream=1),
        genfast.randn(1, 100_000, seed=1, offset=1),
    ]
    correlation = torch.corrcoef(torch.cat(draws))
    assert (correlation - torch.eye(len(draws))).abs().max() < 4.5 / math.sqrt(100_000)


def test_randn_arguments():
    assert genfast.randn((2, 3), seed=1).shape == (2, 3)
    assert genfast.randn(2, 3, seed=1, dtype=torch.bfloat16).dtype == torch.bfloat16
    out = torch.empty(2, 3)
    assert genfast.randn(seed=1, out=out) is out
    assert torch.equal(out, genfast.randn(2, 3, seed=torch.tensor(1)))
    assert genfast.randn(0, 3, seed=1).shape == (0, 3)
    with pytest.raises(TypeError, match="dtype must be one of"):
        genfast.randn(2, seed=1, dtype=torch.int32)
    with pytest.raises(ValueError, match="out has shape"):
        genfast.randn(3, 2, seed=1, out=out)
    with pytest.raises(TypeError, match="seed must be an int"):
        genfast.randn(2, seed="1")
