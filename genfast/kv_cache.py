"""Keys and values that live across denoising steps: appended, rewritten in place, cropped; contiguous or in pages.

All bookkeeping is arithmetic on tensors of the cache's own device, pages included, so that nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfast._registry import export
from genfast.cache_write import cache_write

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_HEAD = 256


@export("attention")
class KVCache:
    """Cached keys and values of a batch of sequences, each with a length of its own, for :func:`attention_cached`.

    Positions of a row are 0 ... lengths[b] - 1. On the CPU an argument out of range is an error. On a GPU finding out
    would make the host wait, so there what does not fit is dropped: positions outside of a row are not written, and a
    length stops at the capacity, or where the pages ran out.

    Args:
        batch: sequences.
        kv_heads: heads of keys and values.
        capacity: the most positions that a sequence can have.
        head_dim: numbers of a key, at most 256.
        value_dim: numbers of a value, by default head_dim.
        dtype: float32, bfloat16, float16 or float64.
        page_size: positions of a page. By default there are no pages: every sequence has room for its capacity. With
            pages it takes one when it grows into it, and gives it back when it is cropped or reset.
        pages: how many pages there are for all sequences, by default enough for the capacity of each.

    Attributes:
        lengths: int64 [B] on the device: how many positions of each row are filled.
        key_store, value_store: the memory. [B, Hkv, capacity, D]; or [pages + 1, Hkv, page_size, D], whose last page
            takes what is dropped.
        table: int32 [B, pages of a row], which page holds positions [i page_size, (i + 1) page_size); or None.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range; nothing is then changed.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        page_size: int | None = None,
        pages: int | None = None,
    ):
        value_dim = head_dim if value_dim is None else value_dim
        sizes = dict(batch=batch, kv_heads=kv_heads, capacity=capacity, head_dim=head_dim, value_dim=value_dim)
        sizes.update((k, n) for k, n in (("page_size", page_size), ("pages", pages)) if n is not None)
        for name, size in sizes.items():
            least, most = int(name != "batch"), LARGEST_HEAD if name.endswith("_dim") else 2**31 - 1
            if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}, got {size!r}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype}")
        if pages is not None and page_size is None:
            raise ValueError("pages is the number of pages of page_size positions; page_size is missing")
        self.batch, self.kv_heads, self.capacity = batch, kv_heads, capacity
        self.head_dim, self.value_dim, self.dtype, self.page_size = head_dim, value_dim, dtype, page_size
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.device = self.lengths.device
        if page_size is None:
            # One position more than is shown: it takes what is dropped.
            shape = (batch, kv_heads, capacity + 1)
            self.pages, self._columns, self.table = None, 0, None
        else:
            self._columns = -(-capacity // page_size)
            self.pages = batch * self._columns if pages is None else pages
            shape = (self.pages + 1, kv_heads, page_size)
            # A column more than is shown, and an entry of the list more than there are pages, for the same purpose.
            self._table = torch.full((batch, self._columns + 1), self.pages, dtype=torch.int32, device=device)
            self._free = torch.arange(self.pages, -1, -1, dtype=torch.int32, device=device).roll(-1)
            self._free_count = torch.full((), self.pages, device=device)
            self.table = self._table[:, : self._columns]
        keys, values = (torch.zeros(*shape, size, dtype=dtype, device=device) for size in (head_dim, value_dim))
        self.key_store, self.value_store = (t if page_size else t[:, :, :capacity] for t in (keys, values))
        self._memory = keys, values

    def append(self, k: Tensor, v: Tensor, counts: Tensor | int | None = None) -> None:
        """Store keys and values after the end of every row.

        Args:
            k: [B, Hkv, n, D], v: [B, Hkv, n, Dv], in the cache's dtype, on its device.
            counts: int or int64 [B], the first how many of the n are real; all by default.
        """
        self._append(*self._checked_append(k, v, counts))

    def rewrite(self, k: Tensor, v: Tensor, start: Tensor | int) -> None:
        """Store keys and values in place of those at positions start ... start + n - 1, which must be filled.

        Args:
            k: [B, Hkv, n, D], v: [B, Hkv, n, Dv], in the cache's dtype, on its device.
            start: int or int64 [B], for each row.
        """
        self._rewrite(*self._checked_rewrite(k, v, start))

    def crop(self, lengths: Tensor | int) -> None:
        """Forget the positions of each row from ``lengths`` (int or int64 [B]) on; a shorter row stays as it is."""
        lengths = self._per_row("lengths", lengths)
        if self._checks() and (lengths < 0).any():
            raise ValueError(f"lengths must be at least 0, got {lengths.tolist()}")
        self._shorten(torch.minimum(self.lengths, lengths.clamp(min=0)))

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Forget whole rows.

        Args:
            rows: which, as whole numbers or a bool [B]; all by default.
        """
        if rows is None:
            return self._shorten(torch.zeros_like(self.lengths))
        rows = torch.as_tensor(rows, device=self.device)
        if rows.dtype == torch.bool:
            if rows.shape != self.lengths.shape:
                raise ValueError(f"rows is bool {list(rows.shape)}; expected [{self.batch}]")
            return self._shorten(self.lengths.masked_fill(rows, 0))
        if rows.numel() == 0:
            return None
        if rows.is_floating_point() or rows.dim() != 1:
            raise TypeError(f"rows must be a list of whole numbers or bool [{self.batch}], got {rows.dtype}")
        rows = rows.long()
        if self._checks() and not ((rows >= 0) & (rows < self.batch)).all():
            raise ValueError(f"rows must be from 0 to {self.batch - 1}, got {rows.tolist()}")
        return self._shorten(self.lengths.index_fill(0, rows, 0))

    def keys(self, row: int) -> Tensor:
        """[Hkv, lengths[row], D], the keys of one row: a view, or a copy out of the pages. The host waits for it."""
        return self._row(self.key_store, row)

    def values(self, row: int) -> Tensor:
        """[Hkv, lengths[row], Dv], the values of one row, as :meth:`keys`."""
        return self._row(self.value_store, row)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.batch} rows of {self.capacity} x {self.kv_heads} x {self.head_dim}"
        text += "" if self.value_dim == self.head_dim else f" and {self.value_dim}"
        text += f", {dtype} on {self.device}"
        if self.page_size is not None:
            text += f", {self.pages} pages of {self.page_size}"
        # Elsewhere reading them would make the host wait.
        lengths = f", lengths {self.lengths.tolist()}" if self.device.type == "cpu" else ""
        return f"KVCache({text}{lengths})"

    # --- checks ---

    def _checks(self) -> bool:
        """Whether numbers in tensors can be looked at."""
        return self.device.type == "cpu" and not torch.compiler.is_compiling()

    def _checked_pair(self, k, v) -> None:
        for name, t, size in (("k", k, self.head_dim), ("v", v, self.value_dim)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
            if t.dtype != self.dtype:
                raise TypeError(f"{name} is {t.dtype}; expected {self.dtype}, as the cache")
            if t.dim() != 4 or (t.shape[0], t.shape[1], t.shape[3]) != (self.batch, self.kv_heads, size):
                raise ValueError(f"{name} is {list(t.shape)}; expected [{self.batch}, {self.kv_heads}, n, {size}]")
            if t.device != self.device:
                raise ValueError(f"{name} is on {t.device}; expected {self.device}, as the cache")
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"k has {k.shape[2]} positions and v {v.shape[2]}; expected as many")

    def _per_row(self, name: str, value) -> Tensor:
        """int64 [B] on the device."""
        if isinstance(value, Tensor):
            if value.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{name} must be whole numbers, got {value.dtype}")
            if value.dim() > 1 or (value.dim() == 1 and len(value) != self.batch) or value.device != self.device:
                raise ValueError(
                    f"{name} is {list(value.shape)} on {value.device}; expected [{self.batch}] on {self.device}"
                )
            return value.long().expand(self.batch)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number or int64 [{self.batch}], got {type(value).__name__}")
        return torch.full_like(self.lengths, value)

    def _checked_append(self, k, v, counts):
        """The arguments of :meth:`_append`."""
        self._checked_pair(k, v)
        n = k.shape[2]
        if counts is None:
            return k, v, self.lengths + n
        counts = self._per_row("counts", counts)
        if self._checks() and not ((counts >= 0) & (counts <= n)).all():
            raise ValueError(f"counts must be from 0 to {n}, the positions of k; got {counts.tolist()}")
        return k, v, self.lengths + counts.clamp(0, n)

    def _checked_rewrite(self, k, v, start):
        """The arguments of :meth:`_rewrite`."""
        self._checked_pair(k, v)
        start = self._per_row("start", start)
        if self._checks() and not ((start >= 0) & (start + k.shape[2] <= self.lengths)).all():
            raise ValueError(
                f"start is {start.tolist()}: positions start to start + {k.shape[2]} must be within the rows, which "
                f"have {self.lengths.tolist()}"
            )
        return k, v, start

    # --- work ---

    def _append(self, k: Tensor, v: Tensor, lengths: Tensor, rope=None) -> None:
        if self._checks() and (lengths > self.capacity).any():
            raise ValueError(f"the rows would have {lengths.tolist()} positions; the capacity is {self.capacity}")
        lengths = lengths.clamp(max=self.capacity)
        if self.page_size is not None:
            lengths = self._take_pages(lengths, k.shape[2])
        cache_write(k, v, *self._memory, self.table, self.lengths, lengths, rope)
        self.lengths.copy_(lengths)

    def _rewrite(self, k: Tensor, v: Tensor, start: Tensor, rope=None) -> None:
        cache_write(k, v, *self._memory, self.table, start, self.lengths, rope)

    def _shorten(self, lengths: Tensor) -> None:
        if self.page_size is not None:
            column = torch.arange(self._columns, device=self.device)
            given = (column >= self._pages_of(lengths)[:, None]) & (column < self._pages_of(self.lengths)[:, None])
            given = given.flatten()
            to = (self._free_count + given.cumsum(0) - 1).where(given, self.pages)
            self._free.scatter_(0, to, self.table.flatten())
            self._free_count += given.sum()
        self.lengths.copy_(lengths)

    def _pages_of(self, lengths: Tensor) -> Tensor:
        return torch.div(lengths + (self.page_size - 1), self.page_size, rounding_mode="floor")

    def _take_pages(self, lengths: Tensor, most: int) -> Tensor:
        """Pages for rows that grow to ``lengths``, by at most ``most``; the lengths for which there were pages."""
        have = self._pages_of(self.lengths)
        wanted = self._pages_of(lengths) - have
        if self._checks() and wanted.sum() > self._free_count:
            raise ValueError(
                f"the cache is out of pages: {int(wanted.sum())} of {self.page_size} positions are needed, "
                f"{int(self._free_count)} of {self.pages} are free"
            )
        before = wanted.cumsum(0) - wanted
        got = (self._free_count - before).clamp(min=0).minimum(wanted)
        j = torch.arange(-(-most // self.page_size) + 1, device=self.device)
        page = self._free[(self._free_count - 1 - before[:, None] - j).clamp(min=0)]
        column = (have[:, None] + j).where(j < got[:, None], self._columns)
        self._table.scatter_(1, column, page)
        self._free_count -= got.sum()
        return lengths.minimum((have + got) * self.page_size)

    def _row(self, store: Tensor, row: int) -> Tensor:
        length = int(self.lengths[row])
        if self.table is None:
            return store[row, :, :length]
        return store[self.table[row].long()].transpose(0, 1).flatten(1, 2)[:, :length]
