"""Real data without a download: scikit-learn's handwritten digits, 1797 images of 8 x 8 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] float32 in [-1, 1] and labels [N] int64, split once and for all."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def load_digits() -> Digits:
    """The digits, a fifth of each class held out; the split depends on nothing but scikit-learn's order."""
    from sklearn.datasets import load_digits as load

    raw = load()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(raw.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(CLASSES):
        held_out[(labels == c).nonzero()[::5, 0]] = True
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])
