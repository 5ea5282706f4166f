"""How good the samples are: a classifier's opinion of their classes, and a Frechet distance to real digits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genfast.demo.data import Digits

COMPONENTS = 20


class Quality:
    """A classifier and a feature space, both fitted on the training digits only.

    Attributes:
        ceiling: the classifier's accuracy on the held-out digits.
        floor: Frechet distance between training and held-out digits: what perfect samples would have.
        noise: Frechet distance of clipped white noise, for scale.
    """

    def __init__(self, digits: Digits):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        train, self._held_out = _flat(digits.train), _flat(digits.held_out)
        self._classifier = SVC(gamma=0.05, C=10).fit(train, digits.train_labels.numpy())
        self._features = PCA(COMPONENTS, random_state=0).fit(train)
        self.ceiling = self.accuracy(digits.held_out, digits.held_out_labels)
        self.floor = self.distance(digits.train)
        noise = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        self.noise = self.distance(noise)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images that the classifier puts into their class."""
        return float((self._classifier.predict(_flat(images)) == labels.numpy()).mean())

    def distance(self, images: Tensor) -> float:
        """Frechet distance to the held-out digits in the feature space."""
        features = self._features.transform
        return frechet_distance(features(_flat(images)), features(self._held_out))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between normal fits of two samples [N, D] (Dowson and Landau 1982).

    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), with the root taken as that of A^(1/2) B A^(1/2), which is
    symmetric and has the same trace.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ cov_b @ root)
    gap = a.mean(axis=0) - b.mean(axis=0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(middle, 0, None)).sum())


def _flat(images: Tensor) -> np.ndarray:
    return images.flatten(1).clamp(-1, 1).double().numpy()
