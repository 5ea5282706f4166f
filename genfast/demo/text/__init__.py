"""``genfast demo --text``: train a masked diffusion language model on this machine's text, write with four samplers.

The model is of characters, the text is Python's licence and documentation strings (``data.py``), and one network
(``network.py``) serves all four samplers; ``eager.py`` holds the same samplers in plain PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genfast import generate_block_diffusion, generate_llada, generate_mdlm, generate_sedd
from genfast.backends import choose
from genfast.demo.text import eager, pictures
from genfast.demo.text.data import ALPHABET, MASK, Corpus, decode, encode, load_corpus
from genfast.demo.text.network import BLOCK, LENGTH, Network, log_score
from genfast.demo.text.quality import bits_per_character, known_words, simpler_models
from genfast.demo.text.train import STEPS, fast_bfloat16, train
from genfast.samplers import TextSample

TEMPERATURE = {"llada": 0.8, "sedd": 0.5, "mdlm": 0.5, "block_diffusion": 0.8}
"""Of the network's distributions. To write the most confident characters first makes text plainer by itself."""
SHOWN = 3
"""Texts of a sampler in the picture and on the screen."""


@dataclass(frozen=True)
class Entry:
    """One sampler: its name for people and for files, the model it wants, and how it is called.

    ``fused(model, prompt, room, steps, seed)`` and ``eager(model, x, start, steps, generator)``.
    """

    title: str
    file: str
    model: Callable[[Network], Callable]
    fused: Callable[..., TextSample]
    eager: Callable[..., Tensor]


def entries() -> list[Entry]:
    def same(net: Network) -> Network:
        return net

    def llada(model, prompt, room, steps, seed):
        return generate_llada(
            model,
            prompt,
            gen_length=room,
            block_length=room,
            steps=steps,
            temperature=TEMPERATURE["llada"],
            mask_id=MASK,
            seed=seed,
        )

    def sedd(model, prompt, room, steps, seed):
        return generate_sedd(model, prompt, length=room, steps=steps, mask_id=MASK, seed=seed)

    def mdlm(model, prompt, room, steps, seed):
        return generate_mdlm(
            model, prompt, length=room, steps=steps, temperature=TEMPERATURE["mdlm"], mask_id=MASK, seed=seed
        )

    def block_diffusion(model, prompt, room, steps, seed):
        return generate_block_diffusion(
            model,
            prompt,
            gen_length=room,
            block_length=BLOCK,
            steps=block_steps(steps),
            temperature=TEMPERATURE["block_diffusion"],
            remasking="low_confidence_static",
            mask_id=MASK,
            seed=seed,
        )

    def score(net: Network) -> Callable:
        return log_score(net, TEMPERATURE["sedd"])

    def eager_mdlm(model, x, start, steps, generator):
        return eager.mdlm(model, x, start, steps, TEMPERATURE["mdlm"], generator)

    def eager_llada(model, x, start, steps, generator):
        return eager.llada(model, x, start, steps, TEMPERATURE["llada"], generator)

    def eager_blocks(model, x, start, steps, generator):
        temperature = TEMPERATURE["block_diffusion"]
        return eager.block_diffusion(model, x, start, block_steps(steps), temperature, generator, BLOCK)

    return [
        Entry("LLaDA", "llada", same, llada, eager_llada),
        Entry("SEDD", "sedd", score, sedd, eager.sedd),
        Entry("MDLM", "mdlm", same, mdlm, eager_mdlm),
        Entry("block diffusion", "block_diffusion", same, block_diffusion, eager_blocks),
    ]


def block_steps(steps: int) -> int:
    """Steps of a block, of those of a whole text."""
    return -(-steps * BLOCK // LENGTH)


class Timed:
    """A model that adds up what it costs: ``seconds`` and ``calls``."""

    def __init__(self, model: Callable):
        self.model, self.seconds, self.calls = model, 0.0, 0

    def __call__(self, *args, **options):
        start = time.perf_counter()
        answer = self.model(*args, **options)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return answer


def check_prompt(text: str) -> str:
    """A prompt, lower-cased, at the beginning of a paragraph; ValueError if the model cannot continue it."""
    prompt = "\n" + text.lower()
    unknown = sorted(set(prompt) - set(ALPHABET))
    if unknown:
        raise ValueError(f"the model does not know {', '.join(map(repr, unknown))}")
    if len(prompt) > LENGTH // 2:
        raise ValueError(f"a prompt has at most {LENGTH // 2 - 1} characters, got {len(text)}")
    return prompt


def run(arguments, progress) -> None:
    """The demo: ``steps`` (None for the default), ``samples``, ``seed``, ``out``, ``quick`` and ``prompt``."""
    prompt = check_prompt(arguments.prompt)
    start = time.perf_counter()
    corpus = load_corpus()
    print(
        f"{len(corpus.train):,} characters of {corpus.documents[0]} documents to learn from, {len(corpus.held_out):,} "
        f"of {corpus.documents[1]} others held out ({time.perf_counter() - start:.1f} s)"
    )
    bfloat16 = fast_bfloat16()
    steps = arguments.steps if arguments.steps is not None else STEPS[bfloat16]
    if arguments.quick:
        steps = max(1, steps // 10)
    start = time.perf_counter()
    net = train(corpus, steps, arguments.seed, progress, bfloat16)
    size = sum(p.numel() for p in net.parameters())
    print(
        f"{size:,} parameters trained in {steps} steps, {'bfloat16' if bfloat16 else 'float32'}, "
        f"{time.perf_counter() - start:.1f} s",
        flush=True,
    )
    _report_bits(net, corpus, arguments)
    _write(net, corpus, prompt, arguments)


def _report_bits(net: Network, corpus: Corpus, arguments) -> None:
    windows = 64 if arguments.quick else 256
    bits = {
        "whole texts (LLaDA, SEDD, MDLM)": bits_per_character(net, corpus.held_out, False, windows=windows),
        "blocks of 16 (block diffusion)": bits_per_character(net, corpus.held_out, True, windows=windows),
        **simpler_models(corpus),
    }
    print("\nbits per held-out character (of the network an upper bound, by Monte Carlo)")
    for name, value in bits.items():
        print(f"  {name:<34} {value:.2f}")


def _write(net: Network, corpus: Corpus, prompt: str, arguments) -> None:
    room = LENGTH - len(prompt)
    steps = room // 4 if arguments.quick else room
    ids = encode(prompt).expand(arguments.samples, -1).contiguous()
    masked = torch.cat([ids, torch.full((len(ids), room), MASK)], 1)
    name, _ = choose("token_sampling", "sample_tokens", torch.device("cpu"))
    print(f"\n{len(ids)} texts of {room} characters each, {steps} steps, fused on the backend {name!r}")
    print("words: the share of letters in words of the training text, fused and eager; the held-out text has ", end="")
    print(f"{known_words([decode(corpus.held_out)], corpus):.2f}")
    print("(with 64 characters to choose from the network takes most of the time; `genfast bench token_sampling` times")
    print("the samplers' own work at the sizes of real vocabularies)")
    row = "{:<16} {:>6} {:>14} {:>14} {:>13} {:>13} {:>8} {:>9} {:>11}"
    print(row.format("", "calls", "fused char/s", "eager char/s", "network", "outside, ms", "", "", "words"))
    print(row.format("", "", "", "", "fused  eager", "fused  eager", "ratio", "", "fused eager"), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    panels = []
    for entry in entries():

        def fused(entry=entry):
            model = Timed(entry.model(net))
            found, seconds = _timed(lambda: entry.fused(model, ids, room, steps, arguments.seed))
            return found, seconds, model

        def plain(entry=entry):
            model = Timed(entry.model(net))
            generator = torch.Generator().manual_seed(arguments.seed)
            found, seconds = _timed(lambda: entry.eager(model, masked, len(prompt), steps, generator))
            return found, seconds, model

        runs = [(fused(), plain()) for _ in range(1 if arguments.quick else 2)]
        (found, _, model), (other, _, _) = runs[-1]
        whole = [min(run[k][1] for run in runs) for k in (0, 1)]
        outside = [min(run[k][1] - run[k][2].seconds for run in runs) for k in (0, 1)]
        texts = [decode(found.tokens[:, found.start :][b]) for b in range(len(ids))]
        begun = [prompt + text for text in texts]
        others = [decode(text) for text in other]
        print(
            row.format(
                entry.title,
                model.calls,
                f"{len(ids) * room / whole[0]:,.0f}",
                f"{len(ids) * room / whole[1]:,.0f}",
                "  ".join(f"{1 - o / w:5.0%}" for o, w in zip(outside, whole)),
                "  ".join(f"{1000 * o:5.0f}" for o in outside),
                f"{outside[1] / outside[0]:.1f}x",
                "",
                "  ".join(f"{known_words(written, corpus):.2f}" for written in (begun, others)),
            ),
            flush=True,
        )
        (arguments.out / f"{entry.file}.txt").write_text("\n\n".join(text.strip("\n") for text in begun) + "\n")
        order = found.order.tolist()
        panels.append(pictures.Panel(entry.title, begun[:SHOWN], order[:SHOWN], found.steps))
    for panel in panels:
        print(f"\n{panel.title}")
        for text in panel.texts:
            print("  " + text.strip("\n").replace("\n", "\n  "))
    pictures.draw(panels, arguments.out / "unmasking.png")
    files = ", ".join(f"{entry.file}.txt" for entry in entries())
    print(f"\nall texts: {files}; the order in which characters were written: unmasking.png; in {arguments.out}/")


@torch.no_grad()
def _timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start
