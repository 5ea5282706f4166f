"""The samplers of k-diffusion, fused: the same call, the same samples.

python examples/with_k_diffusion.py [--sampler sample_dpmpp_2m] [--steps 25]
"""

import argparse
import time

import torch
from mixture import denoised, report

from genfast.dropin import k_diffusion


def model(x, sigma):
    return denoised(x, 1.0, sigma[:, None])


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sampler", default="sample_dpmpp_2m")
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args(argv)
    sigmas = k_diffusion.get_sigmas_karras(options.steps, 0.02, 20.0)
    noise = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0)) * 20

    def run(module):
        torch.manual_seed(1)
        begin = time.perf_counter()
        x = getattr(module, options.sampler)(model, noise, sigmas, disable=True)
        return x, time.perf_counter() - begin

    run(k_diffusion)
    x, seconds = run(k_diffusion)
    found = report(f"{options.sampler}, {options.steps} steps", x)
    try:
        import k_diffusion.sampling as peer
    except ImportError as error:
        print(
            f"k-diffusion itself does not import here ({error}); `genfast.patch('k_diffusion')` would swap its samplers"
        )
        return found
    theirs, peer_seconds = run(peer)
    found["difference"] = float((x - theirs).abs().max())
    print(f"beside k-diffusion: samples differ by {found['difference']:.1e}; {peer_seconds / seconds:.1f}x its speed")
    return found


if __name__ == "__main__":
    main()
