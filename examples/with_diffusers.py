"""The schedulers of diffusers, fused: in one pipeline, or in all code that uses diffusers.

    python examples/with_diffusers.py [--scheduler DDIMScheduler] [--steps 20]

A tiny network with random weights stands in for a trained one: what is shown is that the samples are the same and what
the sampler's share of the time was before and is now.
"""

import argparse
import time

import diffusers
import torch

import genfast


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    # Random weights make a chaotic loop, in which one rounding becomes 1% of the image; smaller ones do not.
    net.conv_out.weight.data.mul_(0.1)
    return net


def sample(pipe, steps: int):
    """Images of a pipeline, always from the same generator."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return torch.from_numpy(pipe(generator=generator, num_inference_steps=steps, output_type="np").images)


def microseconds(scheduler, steps: int, shape=(1, 4, 64, 64)) -> float:
    """Of one ``step``, the best of five loops over model outputs that cost nothing."""
    x, output = torch.randn(shape), torch.randn(shape)
    best = float("inf")
    for _ in range(5):
        scheduler.set_timesteps(steps)
        timesteps = list(scheduler.timesteps)
        scheduler.scale_model_input(x, timesteps[0])
        begin = time.perf_counter()
        for t in timesteps:
            scheduler.step(output, t, x)
        best = min(best, (time.perf_counter() - begin) / len(timesteps))
    return best * 1e6


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--scheduler", default="DDIMScheduler", help="a class of diffusers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)

    # One pipeline: everything else in the program stays as it is.
    pipe = diffusers.DDIMPipeline(network(), diffusers.DDIMScheduler())
    theirs = sample(pipe, options.steps)
    genfast.accelerate(pipe)
    difference = float((sample(pipe, options.steps) - theirs).abs().max())
    print(f"a pipeline before and after genfast.accelerate: images differ by at most {difference:.1e}")

    # All code that uses diffusers, within the block.
    before = microseconds(getattr(diffusers, options.scheduler)(), options.steps)
    with genfast.patch("diffusers") as patched:
        after = microseconds(getattr(diffusers, options.scheduler)(), options.steps)
    print(f"{len(patched.names)} classes were swapped by genfast.patch")
    print(f"{options.scheduler}.step: {before:.0f} us, with genfast {after:.0f} us: {before / after:.1f}x")
    return {"difference": difference, "ratio": before / after}


if __name__ == "__main__":
    main()
