"""Sampling a trained flow, fused: ``ODESolver`` as in flow_matching, ``NeuralODE`` as in torchcfm.

python examples/with_flow_matching.py [--steps 50]
"""

import argparse

import torch
from mixture import denoised, report

from genfast.dropin.flow_matching import NeuralODE, ODESolver


def velocity(x, t):
    """Of x_t = (1 - t) noise + t data: (E[data | x_t] - x_t) / (1 - t), finite up to the end."""
    t = torch.as_tensor(t, dtype=x.dtype).clamp(max=1 - 1e-4)
    return (denoised(x, t, 1 - t) - x) / (1 - t)


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(argv)
    noise = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    x = ODESolver(velocity).sample(noise, step_size=1 / options.steps, method="midpoint")
    found = report(f"ODESolver, midpoint, {options.steps} steps", x)
    node = NeuralODE(lambda t, x: velocity(x, t), solver="rk4")
    states = node.trajectory(noise, torch.linspace(0, 1, options.steps // 2 + 1))
    report(f"NeuralODE, rk4, {len(states) - 1} steps", states[-1])
    return found


if __name__ == "__main__":
    main()
