"""Attention masks as structure: per query row at most two intervals of keys, O(L) numbers, never a dense matrix.

Every mask of the bidirectional and block-wise language models has this form. It is what the kernels read: from the
ends of a tile's intervals they tell whether a tile of keys is seen by no row (not loaded), by all (no mask code) or by
some.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from genfast import attention_ranges
from genfast._registry import export


@export("attention")
class AttentionMask:
    """Which keys each query may see: at most two half-open intervals of keys per query row.

    Made by one of the class methods (``full``, ``padding``, ``varlen``, ``causal``, ``block_causal``,
    ``block_diffusion``, ``prefix``, ``sliding_window``, ``intervals``, ``from_dense``, ``from_block_mask``); ``a & b``
    and ``a | b`` combine two where every row still has at most two intervals.

    Attributes:
        ranges: int32 [B, Lq, 4], (begin, end, begin, end) of each row's intervals: within [0, kv_len], in order, apart
            from one another; an empty one is (0, 0) and comes last. B is 1 where all sequences share the mask.
        kv_len: how many keys there are.
    """

    def __init__(self, ranges: Tensor, kv_len: int, description: str):
        self.ranges, self.kv_len, self.description = ranges, kv_len, description

    # --- what it can be made of ---

    @classmethod
    def full(cls, q_len: int, kv_len: int | None = None, *, device=None) -> AttentionMask:
        """Every query sees every key."""
        kv_len = q_len if kv_len is None else kv_len
        _check_lengths(q_len=q_len, kv_len=kv_len)
        ends = torch.full((1, q_len), kv_len, dtype=torch.int32, device=device)
        return cls(attention_ranges.from_the_first_key(ends), kv_len, "full")

    @classmethod
    def padding(
        cls, lengths: Tensor, kv_len: int, *, q_len: int | None = None, start: Tensor | None = None
    ) -> AttentionMask:
        """Keys [start, lengths) of each sequence: right padding, or left padding with ``start``.

        Args:
            lengths, start: int [B], the end and (0 by default) the beginning of the keys that are no padding.
        """
        q_len = kv_len if q_len is None else q_len
        _check_lengths(q_len=q_len, kv_len=kv_len)
        lengths = _whole("lengths", lengths, 1)
        begin = torch.zeros_like(lengths) if start is None else _whole("start", start, 1)
        if begin.shape != lengths.shape:
            raise ValueError(f"start is {list(begin.shape)}, lengths {list(lengths.shape)}; expected the same [B]")
        found = attention_ranges.one_each(begin, lengths, kv_len)
        return cls(found[:, None].expand(-1, q_len, -1).contiguous(), kv_len, "padding")

    @classmethod
    def varlen(cls, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None) -> AttentionMask:
        """Documents packed one after another in one row: a query sees the keys of its own document.

        Args:
            cu_seqlens: int [N + 1], where the documents' queries begin, from 0 to Lq, as in FlashAttention.
            cu_seqlens_k: the same of the keys, by default those of the queries.
        """
        cu_q = _whole("cu_seqlens", cu_seqlens, 1)
        cu_k = cu_q if cu_seqlens_k is None else _whole("cu_seqlens_k", cu_seqlens_k, 1)
        for name, cu in (("cu_seqlens", cu_q), ("cu_seqlens_k", cu_k)):
            if len(cu) < 1 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()) or len(cu) != len(cu_q):
                raise ValueError(f"{name} must rise from 0, with one entry more than there are documents")
        q_len, kv_len = int(cu_q[-1]), int(cu_k[-1])
        found = attention_ranges.one_each(cu_k[:-1], cu_k[1:], kv_len)
        return cls(found.repeat_interleave(cu_q.diff(), 0, output_size=q_len)[None], kv_len, "varlen")

    @classmethod
    def causal(cls, q_len: int, kv_len: int | None = None, *, q_offset: int | Tensor = 0, device=None) -> AttentionMask:
        """Query i, at position i + q_offset, sees the keys up to its own position."""
        mask = cls.block_causal(q_len, 1, kv_len=kv_len, q_offset=q_offset, device=device)
        return cls(mask.ranges, mask.kv_len, "causal")

    @classmethod
    def block_causal(
        cls, q_len: int, block: int, *, kv_len: int | None = None, q_offset: int | Tensor = 0, device=None
    ) -> AttentionMask:
        """Blocks in order: a query sees its own block of ``block`` positions and all before it.

        Args:
            q_offset: the position of query 0, an int or int [B].
        """
        kv_len = q_len if kv_len is None else kv_len
        _check_lengths(q_len=q_len, kv_len=kv_len)
        _check_block(block)
        at = attention_ranges.positions(q_len, kv_len, _offset(q_offset), device)
        # A block as long as the keys does what a longer one does.
        size = max(min(block, kv_len), 1)
        end = (at - at.remainder(size)).clamp_max_(kv_len - size).add_(size)
        return cls(attention_ranges.from_the_first_key(end), kv_len, f"block causal, blocks of {block}")

    @classmethod
    def block_diffusion(
        cls, length: int | Sequence[int] | Tensor, block: int, *, interleaved: bool = False, device=None
    ) -> AttentionMask:
        """The training mask of Block Diffusion over noised tokens x_t followed by clean ones x_0.

        A noised query sees its own block of x_t and the blocks of x_0 before it; a clean one sees its own block of x_0
        and those before it. The last block of a document may be short.

        Args:
            length: tokens of the sequence, or of each of the documents that share it: the row has twice as many.
            interleaved: x_t and x_0 of the first document, then of the second (by default all of x_t, then all of x_0).
        """
        _check_block(block)
        lengths = torch.as_tensor(length, device=device)
        lengths = _whole("length", lengths.reshape(-1), 1)
        counts = lengths.tolist()
        if min(counts, default=0) < 0:
            raise ValueError(f"length must not be negative, got {counts}")
        total = 2 * sum(counts)
        if total >= 2**31 - 1:
            raise ValueError(f"length: a row of {total} tokens is longer than {2**31 - 2}")
        found = attention_ranges.block_diffusion(lengths, counts, block, interleaved)
        several = f"{len(lengths)} documents{' interleaved' if interleaved else ''}, " if len(lengths) > 1 else ""
        return cls(found, total, f"block diffusion, {several}blocks of {block}")

    @classmethod
    def prefix(cls, prefix: int | Tensor, q_len: int, *, device=None) -> AttentionMask:
        """The first ``prefix`` positions (int or int [B]) see one another and are seen by all; the rest is causal."""
        _check_lengths(q_len=q_len)
        if isinstance(prefix, Tensor):
            prefix, device = _whole("prefix", prefix, 1)[:, None].clamp(0, q_len).to(torch.int32), prefix.device
        else:
            prefix = min(max(prefix, 0), q_len)
        end = torch.arange(1, q_len + 1, dtype=torch.int32, device=device)[None].clamp_min(prefix)
        return cls(attention_ranges.from_the_first_key(end), q_len, "prefix")

    @classmethod
    def sliding_window(
        cls, q_len: int, left: int, right: int, *, kv_len: int | None = None, q_offset: int = 0, device=None
    ) -> AttentionMask:
        """A query sees ``left`` keys before its own position, its own, and ``right`` after it."""
        kv_len = q_len if kv_len is None else kv_len
        _check_lengths(q_len=q_len, kv_len=kv_len)
        if left < 0 or right < 0:
            raise ValueError(f"left and right must not be negative, got {left} and {right}")
        begin, end = (attention_ranges.positions(q_len, kv_len, q_offset + k, device) for k in (-left, right + 1))
        found = attention_ranges.one_each(begin, end, kv_len)
        return cls(found, kv_len, f"sliding window, {left} before, {right} after")

    @classmethod
    def intervals(
        cls, begin: Tensor, end: Tensor, begin2: Tensor | None = None, end2: Tensor | None = None, *, kv_len: int
    ) -> AttentionMask:
        """The keys in [begin, end) or in [begin2, end2): int [Lq] or [B, Lq], clipped to [0, kv_len)."""
        _check_lengths(kv_len=kv_len)
        if (begin2 is None) != (end2 is None):
            raise ValueError("begin2 and end2 go together")
        given = [(begin, end)] if begin2 is None else [(begin, end), (begin2, end2)]
        shape = begin.shape
        for pair in given:
            for name, t in zip(("begin", "end"), pair):
                if _whole(name, t, None).shape != shape or t.dim() not in (1, 2):
                    raise ValueError(f"{name} is {list(t.shape)}; expected [Lq] or [B, Lq], all the same")
        shape = shape if len(shape) == 2 else (1, *shape)
        given = [tuple(t.long().reshape(shape) for t in pair) for pair in given]
        if begin2 is None:
            return cls(attention_ranges.one_each(*given[0], kv_len), kv_len, "intervals")
        return cls(attention_ranges.joined(given, kv_len), kv_len, "intervals")

    @classmethod
    def from_dense(cls, dense: Tensor) -> AttentionMask:
        """Of a bool matrix [Lq, Lk] or [B, Lq, Lk], True where a query sees a key.

        Raises:
            ValueError: a row has more than two runs of keys.
        """
        if not isinstance(dense, Tensor) or dense.dtype != torch.bool or dense.dim() not in (2, 3):
            raise TypeError("dense must be a bool tensor [Lq, Lk] or [B, Lq, Lk]")
        dense = dense if dense.dim() == 3 else dense[None]
        batch, q_len, kv_len = dense.shape
        rows = torch.nn.functional.pad(dense.flatten(0, 1), (1, 1))
        # Where a run begins or ends: few numbers, found in bytes instead of running sums of whole numbers.
        edges = rows[:, 1:] != rows[:, :-1]
        many = int(edges.count_nonzero()) > 4 * len(rows)
        row, place = edges[: 0 if many else None].nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(rows))
        if many or (counts.numel() and int(counts.max()) > 4):
            raise ValueError(
                "a row of dense has more than two runs of keys; an AttentionMask has two intervals per row"
            )
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        ranges = torch.zeros((len(rows), 4), dtype=torch.int32, device=dense.device)
        ranges[row, slot] = place.to(torch.int32)
        return cls(ranges.view(batch, q_len, 4), kv_len, "from a dense mask")

    @classmethod
    def from_block_mask(cls, block_mask) -> AttentionMask:
        """Of a BlockMask of FlexAttention: ``block_mask.mask_mod`` is evaluated, some rows at a time, where the blocks
        leave it a say. One that :meth:`to_block_mask` made gives back what it was made of.

        Raises:
            ValueError: a row has more than two runs of keys, or heads differ.
        """
        own = getattr(block_mask, "attention_mask", None)
        if isinstance(own, cls):
            return own
        q_len, kv_len = block_mask.seq_lengths
        batch, heads = block_mask.kv_num_blocks.shape[:2]
        device = block_mask.kv_num_blocks.device
        b, h, kv = (torch.arange(n, device=device) for n in (batch, heads, kv_len))
        q_block, kv_block = block_mask.BLOCK_SIZE
        kinds = _block_kinds(block_mask)[..., kv // kv_block]  # [B, H, blocks of queries, Lk]
        ranges = []
        mod = functools.reduce(lambda f, dims: torch.vmap(f, in_dims=dims), _EVERY_PAIR, block_mask.mask_mod)
        for first in range(0, q_len, 256):
            q = torch.arange(first, min(first + 256, q_len), device=device)
            kind = kinds[:, :, q // q_block]
            dense = (kind == 2) | ((kind == 1) & mod(b, h, q, kv))
            if bool((dense != dense[:, :1]).any()):
                raise ValueError("the heads of block_mask differ; an AttentionMask is the same for all heads")
            ranges.append(cls.from_dense(dense[:, 0]).ranges)
        found = torch.cat(ranges, 1) if ranges else torch.zeros((batch, 0, 4), dtype=torch.int32, device=device)
        return cls(found, kv_len, "from a BlockMask")

    # --- what can be asked of it ---

    @property
    def batch(self) -> int:
        """B, or 1 where all sequences share the mask."""
        return self.ranges.shape[0]

    @property
    def q_len(self) -> int:
        return self.ranges.shape[1]

    @property
    def device(self) -> torch.device:
        return self.ranges.device

    @property
    def density(self) -> float:
        """The share of pairs of a query and a key that are seen. Copies one number to the host."""
        pairs = self.batch * self.q_len * self.kv_len
        seen = (self.ranges[..., 1::2].long() - self.ranges[..., ::2].long()).sum()
        return int(seen) / pairs if pairs else 0.0

    def to(self, device) -> AttentionMask:
        """The same on another device; itself if it is there already."""
        ranges = self.ranges.to(device)
        return self if ranges is self.ranges else AttentionMask(ranges, self.kv_len, self.description)

    def to_dense(self) -> Tensor:
        """bool [B, Lq, Lk], O(L^2): for tests, and for what takes nothing else."""
        keys = torch.arange(self.kv_len, device=self.device)
        begin, end, begin2, end2 = (self.ranges[..., k, None] for k in range(4))
        return ((keys >= begin) & (keys < end)) | ((keys >= begin2) & (keys < end2))

    def tiles(self, q_tile: int, kv_tile: int) -> Tensor:
        """int8 [B, ceil(Lq / q_tile), ceil(Lk / kv_tile)]: 0 no pair of the tile is seen, 2 all are, 1 for the rest.

        What is seen partly may be all seen by chance (two intervals that only together cover it), never the opposite.
        """
        low, high = self.tile_bounds(q_tile)
        begin = torch.arange(0, self.kv_len, kv_tile, device=self.device)
        end = (begin + kv_tile).clamp_max(self.kv_len)
        some = (begin < high[..., 1::2, None]) & (end > low[..., ::2, None])
        every = (begin >= high[..., ::2, None]) & (end <= low[..., 1::2, None])
        return torch.where(every.any(-2), 2, some.any(-2).to(torch.int8)).to(torch.int8)

    def tile_bounds(self, q_tile: int) -> tuple[Tensor, Tensor]:
        """int32 [B, ceil(Lq / q_tile), 4] twice: the smallest and the largest of each end in a tile of rows.

        A row whose interval is empty says nothing about where keys are seen, but it keeps every tile from being full:
        in such tiles of rows the largest begin is kv_len, the smallest end 0.
        """
        batch, rows = self.batch, -(-self.q_len // q_tile)
        short = rows * q_tile - self.q_len
        empty = self.ranges[..., ::2] >= self.ranges[..., 1::2]  # [B, Lq, 2]
        begin, end = self.ranges[..., ::2], self.ranges[..., 1::2]

        def reduced(value: Tensor, of_empty: int, of_padding: int, reduce) -> Tensor:
            value = value.masked_fill(empty, of_empty)
            value = torch.nn.functional.pad(value, (0, 0, 0, short), value=of_padding)
            return reduce(value.view(batch, rows, q_tile, 2), 2)

        most, least = self.kv_len, 0
        low = (reduced(begin, most, most, torch.amin), reduced(end, least, most, torch.amin))
        high = (reduced(begin, most, least, torch.amax), reduced(end, least, least, torch.amax))
        return tuple(torch.stack(ends, -1).view(batch, rows, 4) for ends in (low, high))

    def to_block_mask(self, block_size: int = 128):
        """A BlockMask for ``torch.nn.attention.flex_attention``, from the tiles: no dense mask is made.

        It remembers this mask as its ``attention_mask``, by which genfast's drop-ins know it.
        """
        from torch.nn.attention.flex_attention import BlockMask

        tiles = self.tiles(block_size, block_size)[:, None]
        counts, indices = zip(*(_listed(tiles == kind) for kind in (1, 2)))
        # A tensor each: FlexAttention compiled for CPUs (torch 2.13) misreads a row that is taken out and then indexed.
        ends, shared = [t.contiguous() for t in self.ranges.unbind(-1)], self.batch == 1

        def mask_mod(b, h, q, k):
            b = b * 0 if shared else b
            begin, end, begin2, end2 = (t[b, q] for t in ends)
            return ((k >= begin) & (k < end)) | ((k >= begin2) & (k < end2))

        made = BlockMask.from_kv_blocks(
            counts[0], indices[0], counts[1], indices[1], BLOCK_SIZE=block_size, mask_mod=mask_mod,
            seq_lengths=(self.q_len, self.kv_len),
        )  # fmt: skip
        made.attention_mask = self
        return made

    def plot(self, size: int = 64, batch: int = 0) -> str:
        """A picture in text, at most ``size`` characters wide: '█' seen, '▒' seen in part, '·' not seen."""
        if not 0 <= batch < self.batch:
            raise ValueError(f"batch must be in [0, {self.batch}), got {batch}")
        q_tile, kv_tile = (max(-(-n // size), 1) for n in (self.q_len, self.kv_len))
        one = AttentionMask(self.ranges[batch : batch + 1], self.kv_len, self.description)
        return "\n".join("".join("·▒█"[k] for k in row) for row in one.tiles(q_tile, kv_tile)[0].tolist())

    def __repr__(self) -> str:
        many = f"{self.batch} x " if self.batch != 1 else ""
        return f"AttentionMask({self.description}: {many}{self.q_len} queries, {self.kv_len} keys, on {self.device})"

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """What both see."""
        ours, theirs = self._pairs(other)
        both = [(torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])) for a in ours for b in theirs]
        return self._combined(both, other, "and")

    def __or__(self, other: AttentionMask) -> AttentionMask:
        """What either sees."""
        ours, theirs = self._pairs(other)
        return self._combined([*ours, *theirs], other, "or")

    def _pairs(self, other):
        if not isinstance(other, AttentionMask):
            raise TypeError(f"expected an AttentionMask, got {type(other).__name__}")
        same = (self.q_len, self.kv_len, self.device) == (other.q_len, other.kv_len, other.device)
        if not same or (self.batch != other.batch and 1 not in (self.batch, other.batch)):
            raise ValueError(f"{self!r} and {other!r} do not go together")
        batch = max(self.batch, other.batch)
        found = []
        for mask in (self, other):
            begin, end, begin2, end2 = mask.ranges.expand(batch, -1, -1).unbind(-1)
            found.append([(begin, end), (begin2, end2)])
        return found

    def _combined(self, pairs, other, word: str) -> AttentionMask:
        description = f"({self.description}) {word} ({other.description})"
        return AttentionMask(attention_ranges.joined(pairs, self.kv_len), self.kv_len, description)


_EVERY_PAIR = ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None))


def _check_lengths(**lengths) -> None:
    for name, value in lengths.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31 - 1:
            raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")


def _check_block(block) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block must be a whole number of at least 1, got {block!r}")


def _whole(name: str, t, dims: int | None) -> Tensor:
    if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of whole numbers")
    if dims is not None and t.dim() != dims:
        raise ValueError(f"{name} is {list(t.shape)}; expected {dims} dimension")
    return t.long()


def _offset(q_offset: int | Tensor) -> int | Tensor:
    return _whole("q_offset", q_offset, 1) if isinstance(q_offset, Tensor) else q_offset


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which ones first) along the last dimension, int32, as a BlockMask wants them."""
    order = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _block_kinds(block_mask) -> Tensor:
    """int8 [B, H, blocks of queries, blocks of keys]: 0 not seen, 1 what ``mask_mod`` says, 2 seen."""
    columns = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    kinds = block_mask.kv_indices.new_zeros((*block_mask.kv_indices.shape[:3], columns + 1), dtype=torch.int8)
    listed = [(1, block_mask.kv_num_blocks, block_mask.kv_indices)]
    if block_mask.full_kv_num_blocks is not None:
        listed.append((2, block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
    for kind, counts, indices in listed:
        there = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        # The rest of the list means nothing: it goes into a column of its own.
        kinds.scatter_(-1, torch.where(there, indices, columns).long(), kind)
    return kinds[..., :-1]
