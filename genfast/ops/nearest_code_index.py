"""``NearestCode``: a codebook that is searched again and again, with the methods of faiss's flat indices.

It has no kernels of its own: it keeps what ``nearest_code`` packs. Its tests are with the CPU kernel of that op,
whose benchmark also stands for it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genfast._registry import export
from genfast.backends import choose
from genfast.ops._codes import check_vectors
from genfast.ops.vector_quantize import FAMILY, MOST_NEIGHBOURS, nearest_code
from genfast.reference.vector_quantize import METRICS


@export(FAMILY)
class NearestCode:
    """A codebook to search many times: ``search(x, k)`` as faiss's ``IndexFlatL2`` and ``IndexFlatIP`` have it, exact.

    On the CPU the codes are rearranged for the search once, at the first search after they have changed. What comes
    in as numpy goes out as numpy, what comes in as a tensor goes out as tensors.

    Args:
        codebook: [K, D], numpy or torch, copied; or the number D for an index without codes, as faiss's constructors.
        metric: ``"l2"`` (``IndexFlatL2``), ``"dot"`` (``IndexFlatIP``) or ``"cosine"``.

    Attributes:
        d: D.
        ntotal: how many codes there are.
        metric: as given.
        codebook: the codes, [ntotal, D].
    """

    def __init__(self, codebook, *, metric: str = "l2"):
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
        self.metric = metric
        self._prepared: tuple | None = None
        if isinstance(codebook, int):
            if codebook < 1:
                raise ValueError(f"codebook is {codebook}; expected codes, or the number of their dimensions")
            self.d = codebook
            self.codebook = torch.empty(0, codebook)
        else:
            codes = self._vectors("codebook", codebook, None)
            self.d = codes.shape[1]
            self.codebook = codes.clone(memory_format=torch.contiguous_format)

    @property
    def ntotal(self) -> int:
        return len(self.codebook)

    def add(self, x) -> None:
        """Append the codes x [n, D]."""
        x = self._vectors("x", x, self.d)
        base = self.codebook if len(self.codebook) else self.codebook.to(x)
        self.codebook = torch.cat([base, x.to(base)])
        self._prepared = None

    def reset(self) -> None:
        """Remove all codes."""
        self.codebook = self.codebook[:0].clone()
        self._prepared = None

    def reconstruct(self, key: int):
        """The code number ``key``, as numpy."""
        if not 0 <= key < self.ntotal:
            raise ValueError(f"key must be from 0 to {self.ntotal - 1}, got {key}")
        return self.codebook[key].float().cpu().numpy()

    def search(self, x, k: int):
        """The k nearest codes of each row of x [n, D], k up to 16.

        Returns:
            (distances float32 [n, k], indices int64 [n, k]), nearest first: squared distances, inner products or
            cosines. Where there are fewer than k codes, or a row is not finite, the index is -1.
        """
        rows = self._vectors("x", x, self.d)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_NEIGHBOURS:
            raise ValueError(f"k must be a whole number from 1 to {MOST_NEIGHBOURS}, got {k!r}")
        indices = torch.full((len(rows), k), -1, dtype=torch.int64, device=rows.device)
        distances = torch.full((len(rows), k), torch.inf if self.metric == "l2" else -torch.inf, device=rows.device)
        found = min(k, self.ntotal)
        if found:
            self._search(rows, found, distances, indices)
        if isinstance(x, Tensor):
            return distances, indices
        return distances.numpy(), indices.numpy()

    def _search(self, rows: Tensor, k: int, distances: Tensor, indices: Tensor) -> None:
        name, function = choose(FAMILY, "nearest_code", rows.device)
        if name != "cpu" or torch.float64 in (rows.dtype, self.codebook.dtype):
            found, scores = nearest_code(
                rows, self.codebook, metric=self.metric, k=k, nonfinite="index", return_distances=True
            )
        else:
            codes = self.codebook[None]
            pack = choose(FAMILY, "pack_codes", rows.device)[1]
            if self._prepared is None or self._prepared[0] is not pack:
                self._prepared = (pack, pack(codes, self.metric))
            found = torch.empty(1, len(rows), 1, k, dtype=torch.int64)
            scores = torch.empty(1, len(rows), 1, k)
            function(
                rows[None, :, None], codes, metric=self.metric, exact=True, indices=found, distances=scores,
                packed=self._prepared[1],
            )  # fmt: skip
        indices[:, :k], distances[:, :k] = found.view(-1, k), scores.view(-1, k)

    def _vectors(self, name: str, x, size: int | None) -> Tensor:
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(np.ascontiguousarray(x))
        check_vectors(name, x)
        if x.dim() != 2 or (size is not None and x.shape[1] != size) or (size is None and x.shape[1] == 0):
            raise ValueError(f"{name} is {list(x.shape)}; expected [n, {size or 'D'}]")
        if size is not None and len(self.codebook) and x.device != self.codebook.device:
            raise ValueError(f"{name} is on {x.device}; expected {self.codebook.device}, as the codebook")
        return x.detach()
