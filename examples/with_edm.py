"""EDM's sampler, fused: ``edm_sampler(net, latents)`` as in its generate.py.

python examples/with_edm.py [--steps 18] [--churn 10]
"""

import argparse

import torch
from mixture import denoised, report

from genfast.dropin.edm import ablation_sampler, edm_sampler


class Net(torch.nn.Module):
    """What the samplers ask of a network of EDM."""

    sigma_min, sigma_max = 0.002, 80.0

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None):
        return denoised(x, 1.0, sigma)


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--churn", type=float, default=10.0)
    options = parser.parse_args(argv)
    latents = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    found = report("edm_sampler", edm_sampler(Net(), latents, num_steps=options.steps))
    torch.manual_seed(0)
    churned = edm_sampler(Net(), latents, num_steps=options.steps, S_churn=options.churn, S_noise=1.003)
    report("edm_sampler with churn", churned)
    seeded = edm_sampler(Net(), latents, num_steps=options.steps, S_churn=options.churn, S_noise=1.003, seed=1)
    report("edm_sampler with churn drawn in the kernel", seeded)
    general = ablation_sampler(Net(), latents, num_steps=options.steps, schedule="vp", scaling="vp")
    report("ablation_sampler, VP schedule and scaling", general)
    return found


if __name__ == "__main__":
    main()
