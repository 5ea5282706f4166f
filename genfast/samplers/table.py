"""The samplers: one row each. Adding a sampler is adding a row.

Every method here moves along x_t = alpha_t x0 + sigma_t eps. A model's output m, whatever it predicts, gives the data
estimate x0 = k_x x + k_m m (:func:`genfast.x0_coefficients`), and with it the noise eps = (x - alpha x0) / sigma
and the score -eps / sigma. An ancestral step is the posterior mean of two normals, linear in x and x0; an ODE or SDE
step is x plus multiples of x0, eps and noise; a multistep method adds estimates that it kept; a Runge-Kutta method adds
its intermediate points. So every step of every sampler is

    out  = sum_i c_i x_i + c_x0 x0 + c_noise z
    kept = sum_i d_i x_i + d_x0 x0

over at most 8 tensors x_i, which is what :func:`genfast.sampler_step` computes. What is not linear (clipping,
thresholding, guidance rescale, a learned variance) acts on m, x0 or z before the sum, inside the same op; eps always
belongs to the clipped x0. Where a step ends without noise, eps has no meaning at its end, so that methods that would
evaluate the model there (Heun, RK4, PNDM's warm-up) take x0 itself instead, as Karras et al. do.

A row's function gives, for step i of a trajectory, its stages as combinations with float64 weights. They are computed
once per trajectory, turned into step tables (``program.py``) and run by one loop (``sampler.py``), which knows no
sampler by name. Options are the function's keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from genfast.samplers import multistep as ms
from genfast.samplers import ode
from genfast.samplers import single_step as ss
from genfast.samplers.linear import Stage


@dataclass(frozen=True)
class Row:
    """One sampler.

    Args:
        stages: ``(trajectory, i, **options) -> list[Stage]``.
        evaluations: of the model per step (a first or last step may differ).
        order: of convergence in the step size with the default options and no noise; the first steps of a method with
            a history are of lower order, as are its last ones with ``lower_order_final``.
        keeps: how many earlier evaluations it remembers.
        noise: when it draws noise: ``"never"``, ``"always"`` or the option that turns it on.
        source: the paper.
        finite_ratio: it integrates in sigma / alpha or its logarithm, so the trajectory may not start without signal.
        adaptive: it chooses its own steps between the trajectory's nodes (``ode.py``).
    """

    stages: Callable[..., list[Stage]]
    evaluations: int
    order: int
    keeps: int
    noise: str
    source: str
    finite_ratio: bool = False
    adaptive: bool = False

    @property
    def options(self) -> dict[str, object]:
        """Names and defaults of the sampler's own options."""
        parameters = inspect.signature(self.stages).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


_DPMPP = "Lu et al. 2022, arXiv:2211.01095"
_EDM = "Karras et al. 2022, arXiv:2206.00364"
_SDE = "Song et al. 2021, arXiv:2011.13456"
_FLOW = "Liu et al. 2023, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747"

SAMPLERS: dict[str, Row] = {
    # name                  function              evals order keeps noise     source
    "ddpm": Row(ss.ddpm, 1, 1, 0, "always", "Ho et al. 2020, arXiv:2006.11239; Nichol and Dhariwal 2021"),
    "ddim": Row(ss.ddim, 1, 1, 0, "eta", "Song et al. 2021, arXiv:2010.02502"),
    "euler": Row(ss.euler, 1, 1, 0, "s_churn", _EDM),
    "heun": Row(ss.heun, 2, 2, 0, "s_churn", _EDM, finite_ratio=True),
    "euler_ancestral": Row(ss.euler_ancestral, 1, 1, 0, "eta", "k-diffusion; Song et al. 2021, arXiv:2010.02502"),
    "dpmpp_2m": Row(ms.dpmpp_2m, 1, 2, 1, "never", _DPMPP),
    "dpmpp_3m": Row(ms.dpmpp_3m, 1, 2, 2, "never", _DPMPP),
    "dpmpp_2s": Row(ms.dpmpp_2s, 2, 2, 0, "eta", _DPMPP, finite_ratio=True),
    "dpmpp_2m_sde": Row(ms.dpmpp_2m_sde, 1, 2, 1, "eta", _DPMPP),
    "dpmpp_3m_sde": Row(ms.dpmpp_3m_sde, 1, 2, 2, "eta", _DPMPP),
    "unipc": Row(ms.unipc, 1, 3, 3, "never", "Zhao et al. 2023, arXiv:2302.04867"),
    "lms": Row(ms.lms, 1, 4, 3, "never", "k-diffusion; Adams-Bashforth of variable step", finite_ratio=True),
    "deis": Row(ms.deis, 1, 3, 3, "never", "Zhang and Chen 2023, arXiv:2204.13902", finite_ratio=True),
    "pndm": Row(ms.pndm, 1, 2, 3, "never", "Liu et al. 2022, arXiv:2202.09778", finite_ratio=True),
    "lcm": Row(ss.lcm, 1, 1, 0, "always", "Luo et al. 2023, arXiv:2310.04378"),
    "tcd": Row(ss.tcd, 1, 1, 0, "eta", "Zheng et al. 2024, arXiv:2402.19159"),
    "euler_maruyama": Row(ss.euler_maruyama, 1, 1, 0, "always", _SDE, finite_ratio=True),
    "reverse_diffusion": Row(ss.reverse_diffusion, 1, 1, 0, "always", _SDE),
    "ode_euler": Row(ss.ode_euler, 1, 1, 0, "never", _SDE),
    "ode_heun": Row(ss.ode_heun, 2, 2, 0, "never", _SDE),
    "ode_rk4": Row(ss.ode_rk4, 4, 4, 0, "never", _SDE),
    "ode_rk45": Row(ode.ode_rk45, 6, 5, 0, "never", _SDE + "; Dormand and Prince 1980", adaptive=True),
    "flow_euler": Row(ss.flow_euler, 1, 1, 0, "never", _FLOW),
    "flow_heun": Row(ss.flow_heun, 2, 2, 0, "never", _FLOW),
    "flow_midpoint": Row(ss.flow_midpoint, 2, 2, 0, "never", _FLOW),
}


def checked_row(name: str, options: dict) -> Row:
    """The row of a sampler, its options' names checked."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {name!r}")
    row = SAMPLERS[name]
    for option in options:
        if option not in row.options:
            known = ", ".join(row.options) or "none"
            raise ValueError(f"sampler {name!r} has no option {option!r}; its options are: {known}")
    return row


def markdown() -> str:
    """The table as it is printed by ``python -m genfast.samplers``."""
    lines = [
        "| sampler | model evaluations per step | order | kept | noise | options | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in SAMPLERS.items():
        options = ", ".join(f"{k}={v!r}" for k, v in row.options.items())
        evaluations = "adaptive" if row.adaptive else row.evaluations
        lines.append(f"| {name} | {evaluations} | {row.order} | {row.keeps} | {row.noise} | {options} | {row.source} |")
    return "\n".join(lines)
