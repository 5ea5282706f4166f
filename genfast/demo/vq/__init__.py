"""``genfast demo --vq``: digits in two stages, an autoencoder with a codebook and a transformer that writes its codes.

Stage one (``autoencoder.py``) turns a digit into a 4 x 4 grid of codes and back, stage two (``prior.py``) writes such
grids for a class, drawing with top-k and top-p. ``eager.py`` holds the quantiser and the sampling in plain PyTorch.
"""

from __future__ import annotations

import math
import statistics
import time
from functools import partial

import torch
from torch import Tensor

from genfast.backends import choose
from genfast.demo.data import CLASSES, Digits, load_digits
from genfast.demo.quality import Quality
from genfast.demo.vq import autoencoder, eager, pictures, prior
from genfast.demo.vq.autoencoder import BATCH, Autoencoder, perplexity, psnr
from genfast.demo.vq.prior import Choice, Prior
from genfast.demo.vq.times import compare, timed
from genfast.ops.vector_quantize import nearest_code

STEPS = 500
"""Of stage one, by default; stage two has half as many again."""


def run(arguments, progress) -> None:
    """The demo: ``steps``, ``samples``, ``guidance``, ``top_k``, ``top_p``, ``seed``, ``out`` and ``quick``."""
    steps = max(8, arguments.steps // 5) if arguments.quick else arguments.steps
    digits = load_digits()
    quality = Quality(digits)
    start = time.perf_counter()
    auto, errors = autoencoder.train(digits, steps, arguments.seed, progress)
    print(f"stage one, {_size(auto)}, trained on {len(digits.train)} digits: {_course(errors, 'squared error', start)}")
    said = _reconstruct(auto, digits, quality)
    start = time.perf_counter()
    net, losses = prior.train(auto, digits, steps * 3 // 2, arguments.seed, progress)
    print(f"\nstage two, {_size(net)}, trained on their codes: {_course(losses, 'nats per code', start)}")
    samples, labels, written = _sample(net, auto, digits, quality, arguments)
    with torch.no_grad():
        z = auto.encoder(digits.train[:BATCH])
    compare(z, auto.codebook, arguments.seed)
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
        bits = net.loss(digits.held_out_labels, auto.encode(digits.held_out)).item() / math.log(2)
    alone = math.log2(perplexity(code_counts(auto.encode(digits.train))))
    print(f"  bits per held-out code {bits:.2f} (by the codes' frequencies alone {alone:.2f})")
    labels = torch.arange(CLASSES).repeat_interleave(arguments.samples)
    name, _ = choose("token_sampling", "sample_tokens", torch.device("cpu"))
    print(f"\n{len(labels)} samples each, fused on the backend {name!r}; seconds of the whole loop, in brackets those")
    print("outside the network: guidance, top-p, top-k and the draw; quality is fused and eager. nearest: the mean")
    print(f"distance to the closest training digit, {nearest(digits.held_out, digits.train):.2f} for held-out digits")
    print("(with 64 codes to choose from the network takes most of the time, and for a query with 16 keys at most")
    print("PyTorch's attention is the faster one; larger sizes are below)")
    row = "{:<20} {:>8} {:>9} {:>8} {:>9} {:>13} {:>14} {:>14} {:>12}"
    print(row.format("", "fused s", "", "eager s", "", "ratio outside", "accuracy", "Frechet", "nearest"), flush=True)
    for title, choice in settings(arguments).items():
        parts = (
            partial(prior.sample, net, labels, choice, arguments.seed),
            partial(eager.sample, net, labels, choice, torch.Generator().manual_seed(arguments.seed)),
        )
        runs = [[timed(part) for part in parts] for _ in range(1 if arguments.quick else 2)]
        codes = [found for (found, _), _ in runs[0]]
        whole = [min(run[k][1] for run in runs) for k in (0, 1)]
        outside = [min(run[k][0][1] for run in runs) for k in (0, 1)]
        images = [auto.decode(found) for found in codes]
        accuracy, distance = ([f(x) for x in images] for f in (lambda x: quality.accuracy(x, labels), quality.distance))
        print(
            row.format(
                title,
                f"{whole[0]:.3f}",
                f"({outside[0]:.4f})",
                f"{whole[1]:.3f}",
                f"({outside[1]:.4f})",
                f"{outside[1] / outside[0]:.1f}x",
                "".join(f"{value:>7.3f}" for value in accuracy),
                "".join(f"{value:>7.2f}" for value in distance),
                "".join(f"{nearest(x, digits.train):>6.2f}" for x in images),
            ),
            flush=True,
        )
    ways = f"top-k {choice.top_k}, top-p {choice.top_p:g}, guidance {choice.guidance:g}"
    said = f"{ways}; the classifier agrees with {accuracy[0]:.1%}, Frechet distance {distance[0]:.2f}"
    return codes[0], labels, said


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


def _size(net: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in net.parameters()):,} parameters"


def _course(values: list[float], name: str, start: float) -> str:
    """What training did: from the mean of the first eighth of the steps to that of the last."""
    few = max(1, len(values) // 8)
    seconds = time.perf_counter() - start
    first, last = statistics.mean(values[:few]), statistics.mean(values[-few:])
    return f"{len(values)} steps, {seconds:.1f} s, {name} {first:.3f} -> {last:.3f}"
