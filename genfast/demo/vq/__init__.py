"""``genfast demo --vq``: digits in two stages, an autoencoder with a codebook and a transformer that writes its codes.

Stage one (``autoencoder.py``) turns a digit into a 4 x 4 grid of codes and back, stage two (``prior.py``) writes such
grids for a class, drawing with top-k and top-p. ``eager.py`` holds the quantiser and the sampling in plain PyTorch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from genfast.backends import choose
from genfast.demo.data import CLASSES, Digits, load_digits
from genfast.demo.quality import Quality
from genfast.demo.vq import autoencoder, eager, pictures, prior
from genfast.demo.vq.autoencoder import BATCH, COMMITMENT, DEAD, DECAY, Autoencoder, perplexity, psnr
from genfast.demo.vq.prior import Choice, Prior
from genfast.ops.code_update import ema_update_, quantize
from genfast.ops.vector_quantize import nearest_code

STEPS = 600
"""Of each stage, by default."""


def run(arguments, progress) -> None:
    """The demo: ``steps``, ``samples``, ``guidance``, ``top_k``, ``top_p``, ``seed``, ``out`` and ``quick``."""
    steps = max(8, arguments.steps // 10) if arguments.quick else arguments.steps
    digits = load_digits()
    quality = Quality(digits)
    start = time.perf_counter()
    auto, errors = autoencoder.train(digits, steps, arguments.seed, progress)
    print(f"stage one, {_size(auto)}, trained on {len(digits.train)} digits: {_course(errors, 'squared error', start)}")
    said = _reconstruct(auto, digits, quality)
    start = time.perf_counter()
    net, losses = prior.train(auto, digits, steps, arguments.seed, progress)
    print(f"\nstage two, {_size(net)}, trained on their codes: {_course(losses, 'nats per code', start)}")
    samples, labels, written = _sample(net, auto, digits, quality, arguments)
    _time_quantiser(auto, digits, arguments.seed)
    _draw(auto, digits, samples, labels, (*said, written), arguments)


def _reconstruct(auto: Autoencoder, digits: Digits, quality: Quality) -> tuple[str, str]:
    """Print how good the codes are; what the picture says of reconstructions and of codes."""
    x, counts = digits.held_out, code_counts(auto.encode(digits.train))
    back, mean = auto.decode(auto.encode(x)), digits.train.mean(0, keepdim=True)
    used = f"{int((counts > 0).sum())} of {len(counts)} used, perplexity {perplexity(counts):.1f}"
    decibel = f"{psnr(back, x):.1f} dB"
    print(f"  held-out digits from their codes: PSNR {decibel} (the mean digit for all: {psnr(mean, x):.1f} dB)")
    print(
        f"  classifier accuracy {quality.accuracy(back, digits.held_out_labels):.3f} (of the digits themselves "
        f"{quality.ceiling:.3f}), Frechet distance {quality.distance(back):.2f} (training digits {quality.floor:.2f})"
    )
    print(f"  codes of the training digits: {used}", flush=True)
    return decibel, used


def settings(arguments) -> dict[str, Choice]:
    """The ways to draw that are compared; the last one is drawn in the picture."""
    k, p, scale = arguments.top_k, arguments.top_p, arguments.guidance
    return {
        "all codes": Choice(1.0, None, None),
        f"top-k {k}": Choice(1.0, k, None),
        f"top-p {p:g}": Choice(1.0, None, p),
        "both": Choice(1.0, k, p),
        f"both, guidance {scale:g}": Choice(scale, k, p),
    }


def _sample(net: Prior, auto: Autoencoder, digits: Digits, quality: Quality, arguments) -> tuple[Tensor, Tensor, str]:
    """Print a table of samples; codes and labels of its last row, and what the picture says of them."""
    with torch.no_grad():
        bits = net.loss(digits.held_out_labels, auto.encode(digits.held_out)).item() / torch.tensor(2.0).log().item()
    alone = torch.tensor(perplexity(code_counts(auto.encode(digits.train)))).log2().item()
    print(f"  bits per held-out code {bits:.2f} (by the codes' frequencies alone {alone:.2f})")
    labels = torch.arange(CLASSES).repeat_interleave(arguments.samples)
    name, _ = choose("token_sampling", "sample_tokens", torch.device("cpu"))
    print(f"\n{len(labels)} samples each, fused on the backend {name!r}; seconds of the whole loop, in brackets those")
    print("outside the network: guidance, top-p, top-k and the draw; quality is fused and eager. nearest: the mean")
    print(
        f"distance to the closest training digit, which is {nearest(digits.held_out, digits.train):.2f} of held-out digits"
    )
    row = "{:<20} {:>8} {:>9} {:>8} {:>9} {:>13} {:>14} {:>14} {:>12}"
    print(row.format("", "fused s", "", "eager s", "", "ratio outside", "accuracy", "Frechet", "nearest"), flush=True)
    for title, choice in settings(arguments).items():
        generator = torch.Generator().manual_seed(arguments.seed)
        ours, theirs = (
            timed(lambda: prior.sample(net, labels, choice, arguments.seed)),
            timed(lambda: eager.sample(net, labels, choice, generator)),
        )
        images = [auto.decode(codes) for (codes, _), _ in (ours, theirs)]
        accuracy, distance = ([f(x) for x in images] for f in (lambda x: quality.accuracy(x, labels), quality.distance))
        print(
            row.format(
                title,
                f"{ours[1]:.3f}",
                f"({ours[0][1]:.4f})",
                f"{theirs[1]:.3f}",
                f"({theirs[0][1]:.4f})",
                f"{theirs[0][1] / ours[0][1]:.1f}x",
                "".join(f"{value:>7.3f}" for value in accuracy),
                "".join(f"{value:>7.2f}" for value in distance),
                "".join(f"{nearest(x, digits.train):>6.2f}" for x in images),
            ),
            flush=True,
        )
    return (
        ours[0][0],
        labels,
        f"{title}; the classifier agrees with {accuracy[0]:.1%}, Frechet distance {distance[0]:.2f}",
    )


def _time_quantiser(auto: Autoencoder, digits: Digits, seed: int) -> None:
    """Print a training step of the quantiser, fused and eager: lookup, losses, gradient and moving averages."""
    print("\nthe quantiser in training: lookup, losses, gradient, moving averages; medians, ms")
    row = "{:<52} {:>8} {:>8} {:>7}"
    print(row.format("", "fused", "eager", "ratio"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z = auto.encoder(digits.train[:BATCH])
    large = torch.randn(16, 256, 16, 16, generator=generator), torch.randn(1024, 256, generator=generator)
    for title, vectors, codebook in (("of this demo", z, auto.codebook), ("as of a VQGAN", *large)):
        parts = fused_step(vectors, codebook, seed), eager_step(vectors, codebook, seed)
        seconds: list[list[float]] = [[], []]
        for _ in range(5):
            for part, found in zip(parts, seconds):
                found.append(timed(part)[1])
        ours, theirs = (1000 * statistics.median(found) for found in seconds)
        count = vectors.numel() // vectors.shape[1]
        sizes = f"{title}: {count} vectors of {vectors.shape[1]}, {len(codebook)} codes"
        print(row.format(sizes, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}x"), flush=True)


def fused_step(z: Tensor, codebook: Tensor, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """A training step of the quantiser: (codes' indices, gradient of the sum of z_q and of the loss, codebook after)."""

    def step() -> tuple[Tensor, ...]:
        x, state = z.clone().requires_grad_(), _state(codebook)
        found = quantize(x, state[0], dim=1, gradient="rotation", commitment_weight=COMMITMENT, codebook_weight=0.0)
        (found.z_q.sum() + found.loss).backward()
        ema_update_(
            *state, x, found.indices, decay=DECAY, dim=1, threshold=DEAD, reset_cluster_size=1.0, seed=seed
        )  # fmt: skip
        return found.indices, x.grad, state[0]

    return step


def eager_step(z: Tensor, codebook: Tensor, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """The same in plain PyTorch."""

    def step() -> tuple[Tensor, ...]:
        x, state = z.clone().requires_grad_(), _state(codebook)
        found = eager.quantize(x, state[0], COMMITMENT)
        (found.z_q.sum() + found.loss).backward()
        eager.ema_update_(*state, x, found.indices, DECAY, DEAD, torch.Generator().manual_seed(seed))
        return found.indices, x.grad, state[0]

    return step


def _state(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A codebook with moving averages that agree with it."""
    return codebook.clone(), torch.ones(len(codebook)), codebook.clone()


def _draw(auto: Autoencoder, digits: Digits, codes: Tensor, labels: Tensor, figures, arguments) -> None:
    each = pictures.COLUMNS // CLASSES
    originals = pictures.by_class(digits.held_out, digits.held_out_labels, each)
    page = pictures.Page(
        originals,
        auto.decode(auto.encode(originals)),
        pictures.by_class(auto.decode(codes), labels, pictures.COLUMNS),
        (code_counts(auto.encode(digits.train)), code_counts(codes)),
        pictures.code_patches(auto),
        figures,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures.draw(page, arguments.out / "vq.png")
    print(f"\npicture: vq.png in {arguments.out}/")


def code_counts(codes: Tensor) -> Tensor:
    """int64 [CODES]: how often each occurs."""
    return torch.bincount(codes.flatten(), minlength=autoencoder.CODES)


def nearest(images: Tensor, others: Tensor) -> float:
    """Mean Euclidean distance of images to the closest of ``others``."""
    _, squared = nearest_code(images.flatten(1), others.flatten(1), return_distances=True)
    return squared.sqrt().mean().item()


def timed(function: Callable):
    """(what it returns, seconds)"""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _size(net: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in net.parameters()):,} parameters"


def _course(values: list[float], name: str, start: float) -> str:
    """What training did: from the mean of the first eighth of the steps to that of the last."""
    few = max(1, len(values) // 8)
    seconds = time.perf_counter() - start
    first, last = statistics.mean(values[:few]), statistics.mean(values[-few:])
    return f"{len(values)} steps, {seconds:.1f} s, {name} {first:.3f} -> {last:.3f}"
