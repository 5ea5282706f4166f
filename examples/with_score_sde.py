"""score_sde_pytorch's samplers, fused: predictor-corrector sampling and the probability-flow ODE.

python examples/with_score_sde.py [--steps 200]
"""

import argparse

import torch
from mixture import denoised, report

from genfast.dropin import score_sde


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    sde = score_sde.VPSDE(N=options.steps)
    shape = (2000, 2)

    def model(x, labels):  # predicts the noise, as models of the VP SDE do
        t = labels / 999
        mean, std = sde.marginal_prob(torch.ones(len(x)), t)
        mean, std = mean[:, None], std[:, None]
        return (x - mean * denoised(x, mean, std)) / std

    torch.manual_seed(0)
    sampler = score_sde.get_pc_sampler(
        sde,
        shape,
        score_sde.ReverseDiffusionPredictor,
        score_sde.LangevinCorrector,
        lambda x: x,
        snr=0.05,
        device="cpu",
    )
    x, calls = sampler(model)
    found = report(f"predictor-corrector, {calls} evaluations", x)
    try:
        x, calls = score_sde.get_ode_sampler(sde, shape, lambda x: x, device="cpu")(model)
    except ImportError as missing:
        print(missing)
    else:
        report(f"probability-flow ODE, {calls} evaluations", x)
    return found


if __name__ == "__main__":
    main()
