"""``genfast demo``: train a denoiser on real digits, sample it with five fused samplers, measure and draw the result.

One network serves all five, see ``network.py``; ``eager.py`` holds the same samplers in plain PyTorch. ``--text`` does
the same with text and four samplers, see ``text/``; ``--vq`` writes digits in two stages by codes, see ``vq/``;
``--ddp`` trains the denoiser on 2 ranks, see ``ddp/``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from genfast.backends import backend, choose
from genfast.samplers import Sampler, noise_schedule

NEEDS = {"sklearn": "scikit-learn", "PIL": "pillow"}


@dataclass(frozen=True)
class Entry:
    """One sampler of the demo: its name for people, the fused sampler and the eager loop's name."""

    title: str
    file: str
    build: Callable[[int], Sampler]
    steps: int


def _entries() -> list[Entry]:
    def vp(name: str, **options):
        return lambda steps: Sampler(name, "cosine", steps, prediction="v_prediction", **options)

    edm = noise_schedule("edm", sigma_min=0.01, sigma_max=40.0)
    return [
        Entry("DDPM", "ddpm", vp("ddpm", spacing="trailing"), 100),
        Entry("DDIM", "ddim", vp("ddim", spacing="trailing"), 30),
        Entry("EDM Heun", "edm_heun", lambda steps: Sampler("heun", edm, steps, prediction="sample"), 16),
        Entry("DPM-Solver++ 2M", "dpmpp_2m", vp("dpmpp_2m", spacing="karras"), 16),
        Entry(
            "rectified flow",
            "rectified_flow",
            lambda steps: Sampler("flow_euler", "flow", steps, prediction="flow_prediction"),
            30,
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 if it went well, 2 if a package is missing."""
    parser = argparse.ArgumentParser(prog="genfast demo", description=__doc__.split(": ", 1)[1].split("\n")[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--text", action="store_true", help="train a language model on text that is on the machine")
    kind.add_argument("--vq", action="store_true", help="train a VQ-VAE on the digits and a transformer on its codes")
    kind.add_argument(
        "--ddp", action="store_true", help="train on 2 local ranks, gradients in every format; no samples"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="training steps (default 2000, half a minute; text: two minutes; vq: 500; ddp: 500 per format)",
    )
    parser.add_argument("--samples", type=int, help="samples per class (default 50); with --text, texts (default 16)")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default 1.5); not of text")
    parser.add_argument("--prompt", help="begin every text with this; with --text only")
    parser.add_argument("--top-k", type=int, help="draw among so many codes (default 16); with --vq only")
    parser.add_argument("--top-p", type=float, help="draw among codes of this probability (default 0.95); as --top-k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of the pictures and texts")
    parser.add_argument("--backend", help="run the samplers on this backend")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the training (vq: a fifth), fewer samples and steps"
    )
    arguments = parser.parse_args(argv)
    if arguments.ddp:
        for name in ("samples", "guidance", "prompt", "backend"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name} does not go with --ddp")
    if arguments.text and arguments.guidance is not None:
        parser.error("--guidance is for digits, not for --text")
    if arguments.prompt is not None and not arguments.text:
        parser.error("--prompt goes with --text")
    for name in ("top_k", "top_p"):
        if getattr(arguments, name) is not None and not arguments.vq:
            parser.error(f"--{name.replace('_', '-')} goes with --vq")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    for name in ("steps", "samples", "top_k"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    needs = {module: package for module, package in NEEDS.items() if module == "PIL" or not arguments.text}
    missing = [package for module, package in needs.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"genfast demo needs {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    if arguments.text:
        return _text(arguments, parser)
    if arguments.vq:
        return _vq(arguments)
    if arguments.ddp:
        return _ddp(arguments)
    arguments.steps = 2000 if arguments.steps is None else arguments.steps
    arguments.samples = 50 if arguments.samples is None else arguments.samples
    arguments.guidance = 1.5 if arguments.guidance is None else arguments.guidance
    if arguments.quick:
        arguments.steps, arguments.samples = arguments.steps // 10, min(arguments.samples, 20)
    with backend(arguments.backend) if arguments.backend else contextlib.nullcontext():
        _run(arguments)
    return 0


def _text(arguments, parser: argparse.ArgumentParser) -> int:
    from genfast.demo import text
    from genfast.demo.text.data import NoText

    arguments.prompt = arguments.prompt or ""
    if arguments.samples is None:
        arguments.samples = 4 if arguments.quick else 16
    try:
        text.check_prompt(arguments.prompt)
    except ValueError as error:
        parser.error(f"--prompt: {error}")
    try:
        with backend(arguments.backend) if arguments.backend else contextlib.nullcontext():
            text.run(arguments, _progress)
    except NoText as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _vq(arguments) -> int:
    from genfast.demo import vq

    defaults = dict(steps=vq.STEPS, samples=50, guidance=1.5, top_k=16, top_p=0.95)
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.quick:
        arguments.samples = min(arguments.samples, 20)
    with backend(arguments.backend) if arguments.backend else contextlib.nullcontext():
        vq.run(arguments, _progress)
    return 0


def _ddp(arguments) -> int:
    if not torch.distributed.is_available():
        print("genfast demo --ddp needs a torch that was built with torch.distributed", file=sys.stderr)
        return 2
    from genfast.demo import ddp

    ddp.run(arguments)
    return 0


def _run(arguments) -> None:
    from genfast.demo import eager, pictures
    from genfast.demo.data import CLASSES, load_digits
    from genfast.demo.network import Model, train
    from genfast.demo.quality import Quality

    digits = load_digits()
    quality = Quality(digits)
    start = time.perf_counter()
    net = train(digits, arguments.steps, arguments.seed, _progress)
    print(f"trained on {len(digits.train)} digits, {arguments.steps} steps, {time.perf_counter() - start:.1f} s")
    print(
        f"real digits held out: classifier accuracy {quality.ceiling:.3f} (the ceiling), Frechet distance "
        f"{quality.floor:.2f} (the floor; noise has {quality.noise:.1f})\n"
    )

    labels = torch.arange(CLASSES).repeat_interleave(arguments.samples)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name, _ = choose("sampler_step", "sampler_step", torch.device("cpu"))
    print(f"{len(labels)} samples each, guidance {arguments.guidance}, fused on the backend {name!r}")
    print("seconds are of the whole loop, in brackets those outside the network; quality is of the fused samples")
    print("(at 8 x 8 pixels the network takes nearly all of the time; `genfast bench` times the kernels alone)")
    titles = (
        "sampler",
        "steps",
        "calls",
        "fused s",
        "",
        "eager s",
        "",
        "ratio outside",
        "difference",
        "accuracy",
        "Frechet",
    )
    row = "{:<16} {:>5} {:>5} {:>8} {:>9} {:>8} {:>9} {:>13} {:>10} {:>8} {:>7}"
    print(row.format(*titles), flush=True)
    strips = {"real": _some(digits.train, digits.train_labels, 10)}
    for entry in _entries():
        steps = max(entry.steps // 2, 4) if arguments.quick else entry.steps
        sampler = entry.build(steps)
        noise = sampler.initial_noise((len(labels), 1, 8, 8), generator=_generator(arguments.seed + 1))

        def model(sampler=sampler):
            return Model(net, labels, _levels(sampler), sampler.prediction)

        def fused(sampler=sampler, noise=noise, model=model):
            m = model()
            x, seconds = _timed(
                lambda: sampler(
                    m,
                    noise,
                    generator=_generator(arguments.seed + 2) if sampler.stochastic else None,
                    guidance=arguments.guidance,
                    progress=sys.stderr.isatty(),
                )
            )
            return x, seconds, m

        def plain(sampler=sampler, noise=noise, model=model, entry=entry):
            m = model()
            nodes = list(zip(sampler.alphas.tolist(), sampler.sigmas.tolist()))
            times = [torch.full((len(labels),), t).to(_time_dtype(sampler)) for t in sampler.trajectory.times.tolist()]
            loop = getattr(eager, entry.file)
            guided = eager.guided(m, arguments.guidance)
            x, seconds = _timed(lambda: loop(guided, noise, nodes, times, _generator(arguments.seed + 2)))
            return x, seconds, m

        x, ours, m = fused()
        y, theirs, n = plain()
        outside, outside_eager = ours - m.seconds, theirs - n.seconds
        difference = (x - y).abs().max().item()
        print(
            row.format(
                entry.title,
                sampler.steps,
                m.calls,
                f"{ours:.3f}",
                f"({outside:.4f})",
                f"{theirs:.3f}",
                f"({outside_eager:.4f})",
                f"{outside_eager / outside:.1f}x",
                f"{difference:.1e}",
                f"{quality.accuracy(x, labels):.3f}",
                f"{quality.distance(x):.2f}",
            ),
            flush=True,
        )
        shown = _some(x, labels, 10)
        pictures.save(pictures.grid(shown, 10), arguments.out / f"{entry.file}.png")
        strips[entry.title] = shown
    pictures.overview({k: v[::5] for k, v in strips.items()}, 20, arguments.out / "overview.png")
    print(f"\npictures: {', '.join(sorted(p.name for p in arguments.out.glob('*.png')))} in {arguments.out}/")


def _levels(sampler: Sampler):
    """Function of the model's times giving the schedule's (alpha, sigma)."""
    schedule = sampler.trajectory.schedule

    def levels(t: torch.Tensor):
        alpha, sigma = schedule.alpha_sigma(t.double().numpy())
        return torch.from_numpy(alpha).float(), torch.from_numpy(sigma).float()

    return levels


def _time_dtype(sampler: Sampler) -> torch.dtype:
    whole = sampler.trajectory.schedule.discrete and all(t == int(t) for t in sampler.timesteps)
    return torch.int64 if whole else torch.float32


def _some(images: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` images of every class, class by class."""
    return torch.cat([images[labels == c][:count] for c in labels.unique()])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


@contextlib.contextmanager
def _progress(total: int, title: str):
    """A tqdm bar on a terminal; nothing in a log file, or where tqdm is missing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield argparse.Namespace(update=lambda: None)
        return
    with tqdm(total=total, desc=title, leave=False, disable=None) as bar:
        yield bar
