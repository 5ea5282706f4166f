"""The numbers a sampler step needs: coefficients per step, computed once on the host in float64, kept on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genfast._registry import export

MAX_INPUTS = 8
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction", "score", "edm")
"""What a model's output may be; see :func:`x0_coefficients`."""


@export("sampler_step")
def x0_coefficients(prediction: str, alpha, sigma, *, sigma_data: float = 0.5) -> np.ndarray:
    """The two numbers that turn (x_t, model output) into x0: ``x0 = k[..., 0] * x_t + k[..., 1] * output``.

    ``x_t = alpha * x0 + sigma * eps``. Variance preserving: alpha^2 + sigma^2 = 1; variance exploding and EDM:
    alpha = 1; flow matching: alpha = 1 - t, sigma = t.

    Args:
        prediction: ``"epsilon"``; ``"sample"`` (x0 itself); ``"v_prediction"`` (alpha eps - sigma x0, Salimans and Ho
            2022); ``"flow_prediction"`` (eps - x0, rectified flow's velocity towards the noise); ``"score"`` (the
            gradient of the log density, -eps / sigma); ``"edm"`` (the raw network F of Karras et al. 2022, whose
            preconditioned output is c_skip x + c_out F).
        alpha, sigma: scalars or arrays of one shape [...], finite; sigma >= 0.
        sigma_data: the data's standard deviation, used by ``"edm"`` alone.

    Returns:
        float64 [..., 2].

    Raises:
        ValueError: an unknown prediction, or one that cannot give x0 at some of these levels (epsilon where alpha is 0,
            as at the last step of a zero terminal SNR schedule).
    """
    alpha, sigma = np.broadcast_arrays(np.asarray(alpha, np.float64), np.asarray(sigma, np.float64))
    if not (np.isfinite(alpha).all() and np.isfinite(sigma).all()):
        raise ValueError("alpha and sigma must be finite")
    if (sigma < 0).any():
        raise ValueError(f"sigma must not be negative, got {sigma.min()}")
    zero_alpha = (alpha == 0).any()
    if prediction in ("epsilon", "score", "edm") and zero_alpha:
        raise ValueError(
            f"a model that predicts {prediction} cannot give x0 where alpha is 0 (zero terminal SNR): "
            "x_t holds no signal to divide out; use v_prediction, flow_prediction or sample"
        )
    if prediction == "epsilon":
        k = 1 / alpha, -sigma / alpha
    elif prediction == "sample":
        k = np.zeros_like(alpha), np.ones_like(alpha)
    elif prediction == "v_prediction":
        norm = alpha**2 + sigma**2
        k = alpha / norm, -sigma / norm
    elif prediction == "flow_prediction":
        k = 1 / (alpha + sigma), -sigma / (alpha + sigma)
    elif prediction == "score":
        k = 1 / alpha, sigma**2 / alpha
    elif prediction == "edm":
        s = sigma / alpha
        k = sigma_data**2 / (s**2 + sigma_data**2) / alpha, s * sigma_data / np.sqrt(s**2 + sigma_data**2)
    else:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    return np.stack(k, axis=-1)


@export("sampler_step")
class StepTable:
    """Coefficients of every step of a sampler, on a device, in the layout that the ``sampler_step`` kernels read.

    One row is one step, with ``n`` inputs ``x_i``, standard normal noise ``z`` and the model's data estimate ``x0``::

        x0     = to_x0[0] * x_0 + to_x0[1] * x_1                      (then clipped or thresholded, if asked)
        out    = sum_i coefficients[i] * x_i + x0_scale * x0 + noise * s * z
        second = sum_i second[i] * x_i + second_x0 * x0 + second_noise * s * z
        s      = exp(log_std[0] + log_std[1] * log_variance)          (1 without ``log_std``)

    Args:
        coefficients: [rows, n] or [n], 1 <= n <= 8 (0 columns are allowed when there is noise).
        x0: [rows] or a scalar: the weight of x0 in ``out``. Needs ``to_x0``.
        noise: [rows] or a scalar: the weight of the noise.
        second, second_x0, second_noise: the same for the second output; any of them makes the op return two tensors.
        to_x0: [rows, 2] or [2]: how x0 comes from the first two inputs, see :func:`x0_coefficients`.
        log_std: [rows, 2] or [2]: offset and slope of the log of an elementwise standard deviation in a
            ``log_variance`` input (the learned range of improved DDPM).
        device: where the table lives; the device of a tensor argument by default, else the CPU.

    Arrays are checked for NaN and infinity on the host. Tensors on a GPU are taken as they are, without a
    synchronisation, so a table can be made from values computed there.

    Attributes:
        data: float64 [rows, 2 n + 8]: coefficients, x0, noise, second, second_x0, second_noise, to_x0, log_std.
        rows, inputs: the two sizes; has_x0, has_noise, has_second, has_log_std: which parts are in use.
        noisy: per row, whether its noise weights are non-zero, or None if the values are only on a GPU.

    Raises:
        ValueError: shapes that do not fit together, more than 8 inputs, or values that are not finite.
    """

    def __init__(
        self,
        coefficients,
        *,
        x0=None,
        noise=None,
        second=None,
        second_x0=None,
        second_noise=None,
        to_x0=None,
        log_std=None,
        device: torch.device | str | None = None,
    ):
        parts = dict(
            coefficients=coefficients,
            x0=x0,
            noise=noise,
            second=second,
            second_x0=second_x0,
            second_noise=second_noise,
            to_x0=to_x0,
            log_std=log_std,
        )
        given = {k: _as_float64(k, v) for k, v in parts.items() if v is not None}
        matrix = {"coefficients", "second", "to_x0", "log_std"}
        shaped = {}
        for name, value in given.items():
            if value.ndim > (2 if name in matrix else 1):
                raise ValueError(f"{name} has shape {list(value.shape)}; {_expected(name)}")
            if name in matrix:
                if value.ndim == 0:
                    raise ValueError(f"{name} is a scalar; {_expected(name)}")
                shaped[name] = value if value.ndim == 2 else value[None]
            else:
                shaped[name] = value.reshape(-1, 1)
        n = shaped["coefficients"].shape[1]
        if n > MAX_INPUTS:
            raise ValueError(f"coefficients has {n} columns; a step takes at most {MAX_INPUTS} inputs")
        if n == 0 and noise is None:
            raise ValueError("coefficients has no columns and there is no noise: nothing to compute")
        rows = max(v.shape[0] for v in shaped.values())
        for name, value in shaped.items():
            columns = {"coefficients": n, "second": n, "to_x0": 2, "log_std": 2}.get(name, 1)
            if value.shape[1] != columns or value.shape[0] not in (1, rows):
                raise ValueError(
                    f"{name} has shape {list(given[name].shape)}; expected {columns} columns and 1 or {rows} rows"
                )
        for name, needs, why in (
            ("x0", "to_x0", "x0 must be made from the inputs"),
            ("second_x0", "to_x0", "x0 must be made from the inputs"),
            ("log_std", "noise", "it scales the noise"),
            ("second_noise", "noise", "the second output shares the noise of the first"),
        ):
            if name in shaped and needs not in shaped:
                raise ValueError(f"{name} needs {needs}: {why}")
        if "to_x0" in shaped:
            if n < 2:
                raise ValueError(f"to_x0 needs two inputs, the state and the model output; there are {n}")
            if "x0" not in shaped and "second_x0" not in shaped:
                raise ValueError("to_x0 is given but neither x0 nor second_x0 uses it")

        columns = (("coefficients", n), ("x0", 1), ("noise", 1), ("second", n), ("second_x0", 1), ("second_noise", 1))
        columns += (("to_x0", 2), ("log_std", 2))
        tensors = [v for v in given.values() if isinstance(v, Tensor)]
        self.noisy: tuple[bool, ...] | None = None
        if not tensors:
            data = np.zeros((rows, 2 * n + 8))
            at = 0
            for name, width in columns:
                if name in shaped:
                    data[:, at : at + width] = shaped[name]
                at += width
            # The noise weights are in columns n + 1 and 2 n + 3.
            self.noisy = tuple(data[:, [n + 1, 2 * n + 3]].any(axis=1).tolist())
            self._data: Tensor = torch.from_numpy(data)
            if device is not None:
                self._data = self._data.to(device)
        else:
            target = torch.device(device) if device is not None else tensors[0].device
            pieces = []
            for name, width in columns:
                value = torch.as_tensor(shaped.get(name, np.zeros((1, width))))
                pieces.append(value.to(target).expand(rows, width))
            self._data = torch.cat(pieces, dim=1).contiguous()
        self.rows = rows
        self.inputs = n
        self.has_x0 = "to_x0" in shaped
        self.has_noise = "noise" in shaped
        self.has_second = any(k in shaped for k in ("second", "second_x0", "second_noise"))
        self.has_log_std = "log_std" in shaped
        self._host: tuple | None = None
        self._copies: dict[torch.device, StepTable] = {}

    @property
    def data(self) -> Tensor:
        """float64 [rows, 2 n + 8], read-only as an attribute: the host remembers which rows have noise."""
        return self._data

    def describe_to_host(self) -> None:
        """Keep what the native hot path reads, once per table: data, rows, inputs, flags, noise per row."""
        if self.data.device.type == "cpu" and self.noisy is not None:
            flags = self.has_x0 | self.has_noise << 1 | self.has_second << 2 | self.has_log_std << 3
            self._host = (self.data, self.rows, self.inputs, flags, bytes(self.noisy))

    def to(self, device: torch.device | str) -> StepTable:
        """The same table on another device (itself if it is there already), copied there once."""
        device = torch.device(device)
        if device == self.data.device:
            return self
        copy = self._copies.get(device)
        if copy is None:
            copy = object.__new__(StepTable)
            copy.__dict__.update(self.__dict__, _data=self.data.to(device), _host=None, _copies={})
            self._copies[device] = copy
        return copy

    def __repr__(self) -> str:
        parts = [k for k in ("x0", "noise", "second", "log_std") if getattr(self, f"has_{k}")]
        extras = f", with {', '.join(parts)}" if parts else ""
        return f"StepTable({self.rows} rows, {self.inputs} inputs{extras}, on {self.data.device})"


def quantile_rank(ratio: float, count: int, dtype: torch.dtype) -> tuple[int, float]:
    """Index below and weight above of the linearly interpolated ``ratio`` quantile of ``count`` sorted values.

    The product is rounded as ``torch.quantile`` rounds it, to the dtype of the computation, so that thresholds agree
    with peers; past 2^24 values, which float32 cannot count and torch refuses, it stays in float64.
    """
    if dtype == torch.float32 and count <= 2**24:
        rank = float(np.float32(ratio) * np.float32(count - 1))
    else:
        rank = ratio * (count - 1)
    below = min(math.floor(rank), count - 1)
    return below, rank - below


def _expected(name: str) -> str:
    return {
        "coefficients": "expected [rows, n] or [n]",
        "second": "expected [rows, n] or [n]",
        "to_x0": "expected [rows, 2] or [2]",
        "log_std": "expected [rows, 2] or [2]",
    }.get(name, "expected [rows] or a scalar")


def _as_float64(name: str, value) -> np.ndarray | Tensor:
    """float64: an array, checked to be finite, of what is on the host; a tensor of what is on a GPU."""
    if isinstance(value, Tensor):
        value = value.detach().to(torch.float64)
        if value.device.type != "cpu":
            return value
        value = value.numpy()
    else:
        if isinstance(value, Sequence) and any(isinstance(v, Tensor) for v in value):
            raise TypeError(f"{name} is a sequence of tensors; stack them into one tensor")
        try:
            value = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must hold numbers: {error}") from None
    if not np.isfinite(value).all():
        row = int(np.flatnonzero(~np.isfinite(value.reshape(len(value) if value.ndim else 1, -1)).all(axis=1))[0])
        raise ValueError(f"{name} must be finite; row {row} is not")
    return value
