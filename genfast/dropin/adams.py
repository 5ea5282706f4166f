"""The weights of linear multistep methods on steps of any length."""

from __future__ import annotations

import functools

import numpy as np

_gauss = functools.cache(np.polynomial.legendre.leggauss)


def adams_weights(sigmas: np.ndarray, order: int) -> np.ndarray:
    """float64 [steps, order]: w[i, k] is the integral over [sigma_i, sigma_i+1] of the Lagrange polynomial of point k.

    The points of step i are sigma_i, sigma_i-1, .., at most ``order`` of them and none before the first; the weights of
    those that are missing are 0. Gauss's rule with n nodes is exact up to degree 2 n - 1, so there is no error but
    rounding.

    Args:
        sigmas: float64 [steps + 1].
    """
    count = len(sigmas) - 1
    x, w = _gauss(order // 2 + 1)
    width = np.diff(sigmas)
    nodes = sigmas[:-1, None] + width[:, None] * (x + 1) / 2  # [steps, nodes]
    k = np.arange(order)
    at = np.arange(count)[:, None] - k
    there = at >= 0
    points = sigmas[np.maximum(at, 0)]  # [steps, order]
    own = points[:, :, None] - points[:, None, :]  # [steps, k, j]
    skip = (k[:, None] == k) | ~there[:, None, :] | ~there[:, :, None]
    with np.errstate(all="ignore"):  # levels that repeat have no such polynomial; the peer divides by 0 too
        ratio = (nodes[:, None, None, :] - points[:, None, :, None]) / np.where(skip, 1.0, own)[..., None]
        value = np.where(skip[..., None], 1.0, ratio).prod(2)  # [steps, k, nodes]
        return np.where(there, width[:, None] / 2 * (value @ w), 0.0)
