"""Masks as intervals: against their dense definitions, conversions, tiles, combinations, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast import AttentionMask, attention_ranges


def block_diffusion(lengths, block, interleaved):
    """By the definition, pair by pair."""
    halves = [[(d, half, i // block) for i in range(n)] for half in (0, 1) for d, n in enumerate(lengths)]
    if interleaved:
        halves = [halves[d + half * len(lengths)] for d in range(len(lengths)) for half in (0, 1)]
    row = [place for part in halves for place in part]
    return torch.tensor(
        [
            [
                d == e and ((i == j and h == g) or (h == 0 and g == 1 and i > j) or (h == 1 and g == 1 and i >= j))
                for e, g, j in row
            ]
            for d, h, i in row
        ],
        dtype=torch.bool,
    ).reshape(len(row), len(row))


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths, st.integers(1, 14), st.booleans())
def test_block_diffusion(lengths, block, interleaved):
    mask = AttentionMask.block_diffusion(lengths, block, interleaved=interleaved)
    assert torch.equal(mask.to_dense()[0], block_diffusion(lengths, block, interleaved))
    check_form(mask)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(1, 400) | st.just(2**40), st.booleans())
def test_block_by_block_is_row_by_row(lengths, block, interleaved):
    """The ranges that are made of whole blocks, against the general way with the intervals of each row."""
    mask = AttentionMask.block_diffusion(torch.tensor(lengths, dtype=torch.int32), block, interleaved=interleaved)
    total, begin, rows = sum(lengths), 0, ([], [])
    for n in lengths:
        noised, clean = (2 * begin, 2 * begin + n) if interleaved else (begin, total + begin)
        at = torch.arange(n)
        block_begin = at // block * block
        block_end = (block_begin + block).clamp_max(n)
        nothing = torch.zeros_like(at)
        rows[0].append([noised + block_begin, noised + block_end, clean + nothing, clean + block_begin])
        rows[1].append([clean + nothing, clean + block_end, nothing, nothing])
        begin += n
    parts = [part for pair in zip(*rows) for part in pair] if interleaved else [*rows[0], *rows[1]]
    ends = torch.cat([torch.stack(part) for part in parts], 1)[:, None] if parts else torch.zeros(4, 1, 0).long()
    assert torch.equal(mask.ranges, attention_ranges.joined([tuple(ends[:2]), tuple(ends[2:])], 2 * total))
    assert mask.ranges.is_contiguous() and mask.kv_len == 2 * total


numbers = st.integers(-20, 40) | st.sampled_from([-(2**40), 2**40])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 12), st.integers(0, 14), st.lists(numbers, min_size=8, max_size=8), st.booleans())
def test_any_numbers(q_len, kv_len, drawn, as_tensor):
    """Offsets, lengths and windows beyond the keys, and beyond int32, mean what they say."""
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    offset, block, prefix, left, right = drawn[0], abs(drawn[1]) + 1, drawn[2], abs(drawn[3]), abs(drawn[4])
    at = i + offset
    given = torch.tensor([offset]) if as_tensor else offset
    begin, end = torch.tensor(drawn[:4]), torch.tensor(drawn[4:])
    cu_q, cu_k = (torch.arange(4) * n for n in (q_len, kv_len))
    cases = [
        (AttentionMask.causal(q_len, kv_len, q_offset=given), j <= at),
        (
            AttentionMask.block_causal(q_len, block, kv_len=kv_len, q_offset=given),
            j < (at.div(block, rounding_mode="floor") + 1) * block,
        ),
        (
            AttentionMask.sliding_window(q_len, left, right, kv_len=kv_len, q_offset=offset),
            (j >= at - left) & (j <= at + right),
        ),
        (
            AttentionMask.prefix(torch.tensor([prefix]) if as_tensor else prefix, q_len),
            torch.arange(q_len) < (i + 1).clamp_min(prefix),
        ),
        (
            AttentionMask.padding(end, kv_len, q_len=q_len, start=begin if as_tensor else None),
            (((j >= begin[:, None]) | (not as_tensor)) & (j >= 0) & (j < end[:, None]))[:, None],
        ),
        (
            AttentionMask.varlen(cu_q, cu_k),
            torch.block_diag(*torch.ones(3, q_len, kv_len)).bool(),
        ),
        (AttentionMask.full(q_len, kv_len), j >= 0),
    ]
    for mask, dense in cases:
        assert torch.equal(mask.to_dense(), dense.expand(mask.batch, mask.q_len, -1)), mask
        check_form(mask)


def check_form(mask):
    """Intervals in order, apart, empty ones last; conversions give the same mask back; tiles tell the truth."""
    dense = mask.to_dense()
    begin, end, begin2, end2 = mask.ranges.unbind(-1)
    assert mask.ranges.dtype == torch.int32 and mask.ranges.is_contiguous()
    assert ((begin < end) | ((begin == 0) & (end == 0))).all()
    assert ((end < begin2) & (begin2 < end2) | ((begin2 == 0) & (end2 == 0))).all()
    assert mask.density == (dense.double().mean().item() if dense.numel() else 0.0)
    assert torch.equal(AttentionMask.from_dense(dense).ranges, mask.ranges)
    for q_tile, kv_tile in ((1, 1), (3, 4), (8, 5), (64, 64)):
        tiles = mask.tiles(q_tile, kv_tile)
        assert tiles.shape == (mask.batch, -(-mask.q_len // q_tile), -(-mask.kv_len // kv_tile))
        for b in range(mask.batch):
            for i in range(tiles.shape[1]):
                for j in range(tiles.shape[2]):
                    part = dense[b, i * q_tile : (i + 1) * q_tile, j * kv_tile : (j + 1) * kv_tile]
                    kind = int(tiles[b, i, j])
                    assert kind == 1 or (kind == (2 if part.all() else 0) and (part.all() or not part.any()))


def test_every_structure_against_its_definition():
    i, j = torch.arange(13)[:, None], torch.arange(17)[None]
    square = torch.arange(13)[None]
    starts, ends = torch.tensor([0, 3, 17]), torch.tensor([17, 9, 17])
    two = torch.tensor([0, 5])
    for mask, dense in (
        (AttentionMask.full(13, 17), torch.ones(13, 17, dtype=torch.bool)),
        (
            AttentionMask.padding(ends, 17, q_len=13, start=starts),
            ((j >= starts[:, None, None]) & (j < ends[:, None, None])).expand(3, 13, 17),
        ),
        (AttentionMask.causal(13, 17, q_offset=4), j <= i + 4),
        (AttentionMask.block_causal(13, 4, kv_len=17), j < (i // 4 + 1) * 4),
        (AttentionMask.block_causal(13, 4, q_offset=two), square < ((i + two[:, None, None]) // 4 + 1) * 4),
        (AttentionMask.block_causal(13, 4, q_offset=-3), square < ((i - 3).div(4, rounding_mode="floor") + 1) * 4),
        (
            AttentionMask.prefix(torch.tensor([0, 6]), 13),
            square < (i + 1).clamp_min(torch.tensor([0, 6])[:, None, None]),
        ),
        (AttentionMask.sliding_window(13, 3, 1, kv_len=17, q_offset=4), (j >= i + 1) & (j <= i + 5)),
        (
            AttentionMask.varlen(torch.tensor([0, 4, 4, 13]), torch.tensor([0, 2, 10, 17])),
            torch.where(i < 4, j < 2, j >= 10),
        ),
        (
            AttentionMask.intervals(i[:, 0] - 3, i[:, 0], i[:, 0] + 2, i[:, 0] * 2, kv_len=17),
            ((j >= i - 3) & (j < i)) | ((j >= i + 2) & (j < 2 * i)),
        ),
    ):
        assert torch.equal(mask.to_dense(), dense.expand(mask.batch, -1, -1)), mask
        check_form(mask)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_combinations(q_len, kv_len, seed):
    draw = torch.Generator().manual_seed(seed)

    def one():
        begin, end = torch.randint(-3, kv_len + 4, (2, 2, q_len), generator=draw)
        return AttentionMask.intervals(begin, end, kv_len=kv_len)

    a, b = one(), one()
    either = a | b
    for mask, dense in (
        (a & b, a.to_dense() & b.to_dense()),
        (either, a.to_dense() | b.to_dense()),
        (either & a, a.to_dense()),
    ):
        assert torch.equal(mask.to_dense(), dense)
        check_form(mask)


def test_flex_attention_masks_there_and_back():
    for mask in (
        AttentionMask.block_diffusion([70, 41], 16, interleaved=True),
        AttentionMask.padding(torch.tensor([5, 200, 0]), 200, q_len=130),
        AttentionMask.block_causal(300, 32),
    ):
        block_mask = mask.to_block_mask(64)
        assert AttentionMask.from_block_mask(block_mask) is mask
        del block_mask.attention_mask
        assert torch.equal(AttentionMask.from_block_mask(block_mask).ranges, mask.ranges)
        tiles = mask.tiles(64, 64)
        assert torch.equal(block_mask.to_dense()[:, 0].bool(), tiles > 0)


def test_compiled_flex_attention_sees_what_the_mask_says():
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(2, 2, 128, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(flex_attention, dynamic=False)
    for mask in (AttentionMask.block_diffusion(64, 16), AttentionMask.padding(torch.tensor([70, 128]), 128)):
        dense = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask.to_dense()[:, None])
        with torch.no_grad():
            torch.testing.assert_close(compiled(q, q, q, block_mask=mask.to_block_mask()), dense)


def test_pictures():
    mask = AttentionMask.block_causal(8, 2)
    assert mask.plot(4) == "█···\n██··\n███·\n████"
    assert mask.plot(2) == "▒·\n█▒"
    assert "block causal, blocks of 2: 8 queries, 8 keys" in repr(mask)
    assert "3 x 4 queries, 9 keys" in repr(AttentionMask.padding(torch.tensor([1, 2, 3]), 9, q_len=4))
    with pytest.raises(ValueError, match="batch"):
        mask.plot(4, batch=1)


def test_memory_is_linear():
    mask = AttentionMask.block_diffusion(16384, 32)
    assert mask.ranges.numel() == 4 * 32768
    assert mask.density == 0.25 + 32 / (4 * 16384)


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: AttentionMask.full(-1), "q_len"),
        (lambda: AttentionMask.full(3, 2.0), "kv_len"),
        (lambda: AttentionMask.padding([1, 2], 3), "lengths"),
        (lambda: AttentionMask.padding(torch.ones(2), 3), "lengths"),
        (lambda: AttentionMask.padding(torch.ones(2).long(), 3, start=torch.zeros(3).long()), "start"),
        (lambda: AttentionMask.varlen(torch.tensor([0, 4, 3])), "cu_seqlens"),
        (lambda: AttentionMask.varlen(torch.tensor([1, 4])), "cu_seqlens"),
        (lambda: AttentionMask.varlen(torch.tensor([0, 4]), torch.tensor([0, 1, 2])), "cu_seqlens_k"),
        (lambda: AttentionMask.block_causal(4, 0), "block"),
        (lambda: AttentionMask.block_diffusion([3, -1], 2), "length"),
        (lambda: AttentionMask.block_diffusion([2**29, 2**29], 2), "longer than"),
        (lambda: AttentionMask.block_causal(4, 1, q_offset=torch.zeros(1)), "q_offset"),
        (lambda: AttentionMask.sliding_window(4, -1, 0), "left"),
        (lambda: AttentionMask.intervals(torch.zeros(3).long(), torch.zeros(4).long(), kv_len=5), "end"),
        (lambda: AttentionMask.intervals(*torch.zeros(2, 3).long(), torch.zeros(3).long(), kv_len=5), "end2"),
        (lambda: AttentionMask.from_dense(torch.ones(2, 2)), "dense"),
        (lambda: AttentionMask.from_dense(torch.tensor([[True, False, True, False, True]])), "two runs"),
        (lambda: AttentionMask.full(3) & AttentionMask.full(4), "go together"),
        (lambda: AttentionMask.full(3) & None, "AttentionMask"),
        (
            lambda: (
                AttentionMask.from_dense(torch.tensor([[True, False, True, False, False]]))
                | AttentionMask.from_dense(torch.tensor([[False, False, False, False, True]]))
            ),
            "two intervals",
        ),
    ],
)
def test_refusals(make, error):
    with pytest.raises((TypeError, ValueError), match=error):
        make()
