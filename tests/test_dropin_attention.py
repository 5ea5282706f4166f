"""PyTorch's attention functions by our name: the same numbers, from our kernels where they should be."""

import gc
import inspect

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention as sdpa

import genfast
from genfast import AttentionMask, backends
from genfast.dropin import attention as ours

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PyTorch's prototypes

MASKS = {
    "causal": AttentionMask.causal(64),
    "block causal": AttentionMask.block_causal(64, 8),
    "block diffusion": AttentionMask.block_diffusion(32, 8),
    "padding": AttentionMask.padding(torch.tensor([64, 40]), 64, start=torch.tensor([0, 7])),
    "unseen": AttentionMask.padding(torch.tensor([64, 0]), 64),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
SCATTERED = torch.arange(64) % 3 == torch.arange(64)[:, None] % 3
"""More than two runs per row."""


@pytest.fixture
def calls(monkeypatch):
    """The masks that genfast.attention was called with; every dense mask is worth reading."""
    found = []

    def attention(*args, mask, **kwargs):
        found.append(mask)
        return genfast.attention(*args, mask=mask, **kwargs)

    monkeypatch.setattr(ours, "attention", attention)
    monkeypatch.setattr(ours, "LEAST_WORK", 0)
    return found


def qkv(heads=4, key_heads=4, length=64, dtype=torch.float32, grad=False, batch=2, size=32):
    draw = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, size), (batch, key_heads, 64, size), (batch, key_heads, 64, size)]
    return [torch.randn(s, generator=draw).to(dtype).requires_grad_(grad) for s in shapes]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


def agree(f, g, q, k, v):
    """Outputs and gradients."""
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (f, g):
        out = function(q, k, v)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for a, b in zip(*results):
        close(a, b)


def names(function):
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


def test_signature_of_flex_attention():
    theirs = names(flex.flex_attention)
    assert names(ours.flex_attention)[: len(theirs)] == theirs


def test_names_of_the_package():
    assert genfast.dropin.flex_attention is ours.flex_attention
    assert genfast.dropin.scaled_dot_product_attention is ours.scaled_dot_product_attention
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        _ = genfast.dropin.attend


# --- scaled_dot_product_attention ------------------------------------------------------------------------------------


@masks
@pytest.mark.parametrize("form", ["structure", "bool", "-inf", "seen once, bool"])
def test_sdpa_with_a_mask(mask, form, calls):
    dense = mask.to_dense()[:, None]
    if form == "-inf":
        dense = torch.zeros(dense.shape).masked_fill(~dense, -torch.inf)
    given = mask if form == "structure" else dense
    q, k, v = qkv(grad=True)
    agree(lambda *t: ours.scaled_dot_product_attention(*t, given), lambda *t: sdpa(*t, dense), q, k, v)
    assert len(calls) == 1 and torch.equal(calls[0].ranges, mask.ranges)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_sdpa_without_a_mask(causal, key_heads, calls):
    arguments = dict(is_causal=causal, scale=0.3, enable_gqa=key_heads != 4)
    for length in (64, 48):
        agree(
            lambda *t: ours.scaled_dot_product_attention(*t, **arguments),
            lambda *t: sdpa(*t, **arguments),
            *qkv(key_heads=key_heads, length=length, grad=True),
        )
    assert len(calls) == 2 and all((mask is not None) == causal for mask in calls)


def test_sdpa_masks_that_broadcast(calls):
    q, k, v = qkv()
    keys = torch.ones(2, 64, dtype=torch.bool)
    keys[0, 50:] = keys[1, :9] = False
    tril = torch.ones(64, 64, dtype=torch.bool).tril()
    rows = torch.arange(64)[:, None] > 3
    given = [keys[:, None, None], tril, tril[None], tril[None, None].expand(2, 4, 64, 64), rows]
    for dense in given:
        close(ours.scaled_dot_product_attention(q, k, v, dense), sdpa(q, k, v, dense))
    assert [mask.batch for mask in calls] == [2, 1, 1, 1, 1]


def test_sdpa_fully_masked_rows_are_zero_in_both():
    q, k, v = qkv()
    dense = MASKS["unseen"].to_dense()[:, None]
    assert not sdpa(q, k, v, dense)[1].any()
    assert not ours.scaled_dot_product_attention(q, k, v, MASKS["unseen"])[1].any()


def test_a_dense_mask_is_read_once_and_again_when_it_has_changed(calls, monkeypatch):
    q, k, v = qkv()
    dense = torch.ones(64, 64, dtype=torch.bool).tril()
    for _ in range(2):
        ours.scaled_dot_product_attention(q, k, v, dense)
    assert calls[0] is calls[1]
    monkeypatch.setattr(ours, "LEAST_WORK", 2**60)
    ours.scaled_dot_product_attention(q, k, v, dense)  # known, so it is worth it
    ours.scaled_dot_product_attention(q, k, v, dense.clone())
    assert len(calls) == 3
    monkeypatch.setattr(ours, "LEAST_WORK", 0)
    dense[:, :4] = True
    close(ours.scaled_dot_product_attention(q, k, v, dense), sdpa(q, k, v, dense))
    assert len(calls) == 4 and calls[3] is not calls[2]
    assert dense in ours._of_tensors
    del dense
    gc.collect()
    assert not any(t.shape == (64, 64) for t in ours._of_tensors)


def test_masks_of_inference_mode_serve_in_training(calls):
    q, k, v = qkv(grad=True)
    dense = torch.ones(64, 64, dtype=torch.bool).tril()
    ours._causal.cache_clear()
    with torch.inference_mode():
        ours.scaled_dot_product_attention(q, k, v, dense)
        ours.scaled_dot_product_attention(q, k, v, is_causal=True)
        made_there = dense.clone()
        for change in (False, True):  # which such a tensor does not tell
            made_there[:, :4] = change
            close(ours.scaled_dot_product_attention(q, k, v, made_there), sdpa(q, k, v, made_there))
    for arguments in (dict(attn_mask=dense), dict(is_causal=True)):
        ours.scaled_dot_product_attention(q, k, v, **arguments).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpa_in_half_precision_and_autocast(dtype, calls):
    q, k, v = qkv()
    halves = [t.to(dtype) for t in (q, k, v)]
    out = ours.scaled_dot_product_attention(*halves, is_causal=True)
    wide = sdpa(*(t.double() for t in halves), is_causal=True)
    theirs = sdpa(*halves, is_causal=True)
    assert out.dtype == dtype
    assert (out - wide).abs().max() <= 2 * (theirs - wide).abs().max() + torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        assert torch.equal(ours.scaled_dot_product_attention(q, k, v, is_causal=True), out)
        assert ours.flex_attention(q, k, v).dtype == dtype
        assert ours.scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64


def fallbacks():
    q, k, v = qkv()
    per_head = torch.rand(1, 4, 64, 64) > 0.5
    bias = torch.randn(64, 64)
    least = torch.zeros(64, 64)
    least[3] = torch.finfo(torch.float32).min  # that row sees all keys
    learned = torch.zeros(64, 64, requires_grad=True)
    wide = [torch.randn(1, 1, 64, 300) for _ in range(3)]
    yield "bias", (q, k, v, bias), {}
    yield "least number in a whole row", (q, k, v, least), {}
    yield "a learned bias", (q, k, v, learned), {}
    yield "more than two runs", (q, k, v, SCATTERED), {}
    yield "heads differ", (q, k, v, per_head), {}
    yield "float64", tuple(t.double() for t in (q, k, v)), dict(is_causal=True)
    yield "large heads", wide, {}
    yield "three dimensions", (q[0], k[0], v[0]), {}
    yield "batch that broadcasts", (q, k[:1], v[:1]), {}
    yield "a mask and is_causal", (q, k, v, torch.ones(64, 64, dtype=torch.bool)), dict(is_causal=True)


FALLBACKS = {name: rest for name, *rest in fallbacks()}


@pytest.mark.parametrize("name", FALLBACKS)
def test_sdpa_falls_back(name, calls):
    arguments, options = FALLBACKS[name]
    assert torch.equal(ours.scaled_dot_product_attention(*arguments, **options), sdpa(*arguments, **options))
    assert not calls


@pytest.mark.parametrize("queries", [0, 1, 5])
def test_few_queries_of_a_decoding_step(queries, calls):
    q, k, v = qkv()
    q = q[:, :, :queries]
    seen = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    seen[1, ..., :9] = False
    for mask in (None, seen):
        close(ours.scaled_dot_product_attention(q, k, v, mask), sdpa(q, k, v, mask))
    assert calls


def test_sdpa_falls_back_to_their_dropout_and_transforms(calls):
    q, k, v = qkv()
    for given, dense in ((MASKS["causal"], MASKS["causal"].to_dense()[:, None]), (None, None)):
        results = []
        for function, mask in ((ours.scaled_dot_product_attention, given), (sdpa, dense)):
            torch.manual_seed(0)
            results.append(function(q, k, v, mask, 0.5))
        assert torch.equal(*results)
    per_row = torch.vmap(lambda q, k, v: ours.scaled_dot_product_attention(q[None], k[None], v[None])[0])
    close(per_row(q, k, v), sdpa(q, k, v))
    nested = torch.nested.nested_tensor([q[0].transpose(0, 1), q[1, :, :5].transpose(0, 1)], layout=torch.jagged)
    nested = nested.transpose(1, 2)
    assert ours.scaled_dot_product_attention(nested, nested, nested).is_nested
    assert not calls


def test_sdpa_refusals():
    q, k, v = qkv()
    mask = MASKS["causal"]
    with pytest.raises(ValueError, match="is_causal must be False"):
        ours.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    for wrong in (AttentionMask.causal(63, 64), AttentionMask.full(64, 65), MASKS["padding"]):
        with pytest.raises(ValueError, match=r"attn_mask is AttentionMask.*query is"):
            ours.scaled_dot_product_attention(q[:1], k[:1], v[:1], wrong)
    for arguments in ((q, k[:, :2], v[:, :2]), (q, k, v.double()), (q, k, v, SCATTERED[:5])):  # theirs
        with pytest.raises(RuntimeError):
            ours.scaled_dot_product_attention(*arguments)


def test_without_a_fused_backend_pytorch_runs(calls, monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name, device: "it is away")
    q, k, v = qkv()
    assert torch.equal(ours.scaled_dot_product_attention(q, k, v, is_causal=True), sdpa(q, k, v, is_causal=True))
    assert not calls


def test_an_order_for_a_backend_is_kept(calls):
    q, k, v = qkv(length=8)
    with genfast.backend("reference"):
        out = ours.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 1
    close(out, sdpa(q, k, v))


# --- flex_attention --------------------------------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch):
    """Their function as it is, without a compiler."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


@masks
def test_flex_with_a_block_mask_of_ours(mask, calls, eager, monkeypatch):
    monkeypatch.setattr(AttentionMask, "from_dense", None)  # nothing is evaluated
    block_mask = mask.to_block_mask(16)
    for key_heads in (4, 2):
        q, k, v = qkv(key_heads=key_heads)
        options = dict(scale=0.2, enable_gqa=key_heads != 4, block_mask=block_mask)
        (out, lse), (theirs, their_lse) = (
            f(q, k, v, return_lse=True, **options) for f in (ours.flex_attention, flex.flex_attention)
        )
        close(out, theirs)
        close(lse, their_lse)
        assert calls[-1] is mask
        close(ours.flex_attention(q, k, v, **options), theirs)
    close(ours.flex_attention(*qkv(), block_mask=mask), sdpa(*qkv(), mask.to_dense()[:, None]))


def test_flex_auxiliary_outputs(calls, eager):
    if not hasattr(flex, "AuxRequest"):
        pytest.skip("this release of PyTorch has no return_aux")
    q, k, v = qkv()
    for request in (flex.AuxRequest(lse=True), flex.AuxRequest()):
        (out, aux), (theirs, their_aux) = (
            f(q, k, v, return_aux=request) for f in (ours.flex_attention, flex.flex_attention)
        )
        close(out, theirs)
        for a, b in zip((aux.lse, aux.max_scores), (their_aux.lse, their_aux.max_scores)):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)
    assert len(calls) == 2
    with pytest.raises(NotImplementedError, match="max scores"):  # theirs, on CPUs
        ours.flex_attention(q, k, v, return_aux=flex.AuxRequest(max_scores=True))
    with pytest.raises(ValueError, match="both return_lse and return_aux"):
        ours.flex_attention(q, k, v, return_lse=True, return_aux=flex.AuxRequest(lse=True))


def made(mask_mod, **options):
    return flex.create_block_mask(mask_mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16, **options)


def test_flex_with_a_block_mask_of_theirs(calls, eager, monkeypatch):
    q, k, v = qkv()
    evaluated = []

    def document(b, h, i, j):
        evaluated.append(1)
        return (i // 20 == j // 20) | (j < 5)

    block_mask = made(document)
    evaluated.clear()
    for _ in range(2):
        out = ours.flex_attention(q, k, v, block_mask=block_mask)
    assert len(evaluated) == 1 and calls[0] is calls[1]
    close(out, flex.flex_attention(q, k, v, block_mask=block_mask))
    before = len(ours._of_block_masks)
    del block_mask
    gc.collect()
    assert len(ours._of_block_masks) == before - 1


def test_flex_with_blocks_that_say_more_than_their_function(calls, eager):
    q, k, v = qkv()
    counts = torch.tensor([1, 2, 1, 0], dtype=torch.int32)[None, None]
    indices = torch.tensor([[0, 3, 1, 2], [1, 2, 0, 3], [3, 0, 1, 2], [0, 1, 2, 3]], dtype=torch.int32)[None, None]
    for options in ({}, dict(mask_mod=lambda b, h, i, j: i >= j)):
        block_mask = flex.BlockMask.from_kv_blocks(
            counts, indices, counts.flip(-1), indices.flip(-2).flip(-1), BLOCK_SIZE=16, **options
        )
        # Blocks listed as seen in full are not asked about.
        close(
            ours.flex_attention(q, k, v, block_mask=block_mask),
            sdpa(q, k, v, AttentionMask.from_block_mask(block_mask).to_dense()[:, None]),
        )
        dense = torch.zeros(64, 64, dtype=torch.bool)
        for kind, many, which in (
            ("part", block_mask.kv_num_blocks, block_mask.kv_indices),
            ("full", block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        ):
            for i in range(4):
                for j in which[0, 0, i, : many[0, 0, i]].tolist():
                    tile = dense[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
                    rows, columns = torch.arange(16)[:, None] + 16 * i, torch.arange(16) + 16 * j
                    tile |= torch.ones(16, 16).bool() if kind == "full" or not options else rows >= columns
        assert torch.equal(calls[-1].to_dense()[0], dense)


def test_flex_falls_back(calls, eager):
    q, k, v = qkv()
    causal = MASKS["causal"].to_block_mask(16)
    table = torch.rand(4)
    cases = [
        dict(score_mod=lambda s, b, h, i, j: s + table[h]),
        dict(block_mask=made(lambda b, h, i, j: i % 3 == j % 3)),
        dict(block_mask=flex.create_block_mask(lambda b, h, i, j: i >= j + h, None, 4, 64, 64, device="cpu")),
    ]
    for options in cases:
        close(ours.flex_attention(q, k, v, **options), flex.flex_attention(q, k, v, **options))
    wide = [t.double() for t in (q, k, v)]
    close(ours.flex_attention(*wide, block_mask=causal), flex.flex_attention(*wide, block_mask=causal))
    assert not calls
    with pytest.raises(ValueError, match="BACKEND"):
        ours.flex_attention(q, k, v, kernel_options={"BACKEND": "none such"})
    with pytest.raises(ValueError, match="enable_gqa=True"):
        ours.flex_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match="block_mask was created for"):
        ours.flex_attention(q[:, :, :32], k, v, block_mask=causal)
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        ours.flex_attention(q, k, v, block_mask=made(lambda b, h, i, j: i >= j)[:, :, :2])


def test_flex_has_gradients_on_cpus(calls):
    mask = MASKS["block diffusion"]
    block_mask = mask.to_block_mask(16)
    agree(
        lambda *t: ours.flex_attention(*t, block_mask=block_mask),
        lambda *t: sdpa(*t, mask.to_dense()[:, None]),
        *qkv(grad=True),
    )


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_compiled_without_a_break(calls, monkeypatch):
    monkeypatch.undo()
    q, k, v = qkv(grad=True)
    mask = MASKS["block diffusion"]
    block_mask, dense = mask.to_block_mask(16), mask.to_dense()[:, None]

    def layers(q, k, v):
        x = ours.scaled_dot_product_attention(q, k, v, mask)
        x = ours.flex_attention(x, k, v, block_mask=block_mask)
        x = ours.scaled_dot_product_attention(x, k, v, is_causal=True)
        return ours.scaled_dot_product_attention(x, k, v, dense)

    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    agree(compiled, layers, q, k, v)
