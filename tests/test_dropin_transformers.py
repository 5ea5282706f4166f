"""Hugging Face models under attn_implementation="genfast" are what they are under "eager"."""

import pytest
import torch

import genfast
from genfast import AttentionMask
from genfast.dropin import patching

pytest.importorskip("transformers")
try:
    patching.PEERS["transformers"].check()
except ImportError as unsupported:
    pytest.skip(str(unsupported), allow_module_level=True)

import transformers
from transformers import masking_utils

import genfast.dropin.transformers as ours

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=37)
SMALL |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
LENGTH = 40


def built(kind, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    name = "BertForMaskedLM" if kind == "Bert" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # so that attention matters
    return model.eval()


@pytest.fixture
def calls(monkeypatch):
    """transformers with ours in its registry; the masks that genfast.attention was called with."""
    found = []

    def attention(*args, mask, **kwargs):
        found.append(mask)
        return genfast.attention(*args, mask=mask, **kwargs)

    monkeypatch.setattr(ours, "attention", attention)
    with genfast.patch("transformers"):
        yield found


def tokens(rows=2, length=LENGTH):
    return torch.randint(0, 37, (rows, length), generator=torch.Generator().manual_seed(1))


def padding(left, right):
    """int64 [2, L]: the second row lacks some at its ends."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, LENGTH - right :] = 0
    return mask


def answers(model, implementation, seen=None, **arguments):
    """(logits of what is no padding, gradients of all weights)."""
    model.set_attn_implementation(implementation)
    logits = model(tokens(), **arguments).logits
    if seen is not None:
        logits = logits[seen.bool()]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return logits, torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True)


def same(model, mask=None, theirs=None, **arguments):
    """Ours and eager's, of one model on one mask (as eager takes it: ``theirs``)."""
    seen = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    (a, grads), (b, their_grads) = (
        answers(model, name, seen, attention_mask=given, **arguments)
        for name, given in (("genfast", mask), ("eager", mask if theirs is None else theirs))
    )
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    for g, h in zip(grads, their_grads):
        assert (g is None) == (h is None)
        if g is not None:
            assert (g - h).norm() <= 1e-4 * h.norm() + 1e-6


MODELS = {
    "bidirectional": ("Bert", {}),
    "causal": ("Llama", dict(num_key_value_heads=2)),
    "a decoder without order": ("Qwen2", dict(num_key_value_heads=2, is_causal=False)),
    "sliding window": ("Mistral", dict(num_key_value_heads=4, sliding_window=9)),
}
models = pytest.mark.parametrize("name", MODELS)
ENDS = {"no padding": None, "right": (0, 11), "left": (7, 0), "both": (5, 6)}


@models
@pytest.mark.parametrize("ends", ENDS)
def test_same_logits_and_gradients(name, ends, calls):
    kind, changes = MODELS[name]
    model = built(kind, **changes)
    same(model, None if ENDS[ends] is None else padding(*ENDS[ends]))
    assert len(calls) == 2  # one per layer
    assert all(isinstance(mask, AttentionMask) and mask.q_len == LENGTH for mask in calls)
    assert calls[0] is calls[1]


def test_packed_documents(calls):
    position_ids = torch.cat([torch.arange(13), torch.arange(LENGTH - 13)])[None].expand(2, -1)
    same(built("Llama"), position_ids=position_ids, use_cache=False)
    expected = AttentionMask.varlen(torch.tensor([0, 13, LENGTH])) & AttentionMask.causal(LENGTH)
    assert torch.equal(calls[0].to_dense()[0], expected.to_dense()[0])


@pytest.mark.parametrize("form", ["BlockMask", "bool", "least number"])
def test_a_callers_own_mask(form, calls):
    mask = AttentionMask.block_causal(LENGTH, 8)
    dense = mask.to_dense()[:, None].expand(2, -1, -1, -1)
    least = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    given = {"BlockMask": mask.to_block_mask(), "bool": dense, "least number": least}[form]
    same(built("Llama"), given, least)
    assert len(calls) == 2 and (calls[0].ranges == mask.ranges).all() and calls[0] is calls[1]


def test_mask_functions_of_callers(calls):
    model = built("Llama").model
    model.set_attn_implementation("genfast")
    embeds = torch.zeros(2, LENGTH, 32)
    arguments = (model.config, embeds, padding(0, 5), None)
    prefix = dict(or_mask_function=lambda b, h, q, k: k < 6)
    scattered = dict(and_mask_function=lambda b, h, q, k: k % 3 == q % 3)
    for made, options in (
        (masking_utils.create_causal_mask, prefix),
        (masking_utils.create_bidirectional_mask, {}),
        (masking_utils.create_causal_mask, scattered),
        (masking_utils.create_causal_mask, dict(allow_is_causal_skip=False)),
    ):
        found = made(*arguments, **options) if made is masking_utils.create_causal_mask else made(*arguments[:3])
        model.config._attn_implementation = "sdpa"
        theirs = made(*arguments, **options) if made is masking_utils.create_causal_mask else made(*arguments[:3])
        model.config._attn_implementation = "genfast"
        structure = options in (prefix, {})
        assert isinstance(found, ours.StructuredMask) == structure
        assert found.shape == theirs.shape
        assert torch.equal(found.to_dense() if structure else found, theirs)
    mask = masking_utils.create_bidirectional_mask(*arguments[:3])
    assert "padding" in repr(mask) and mask.contiguous() is mask
    assert torch.equal(mask[:, :, :, :8], mask.to_dense()[..., :8])
    assert torch.equal(mask.to("cpu").to_dense(), mask.to_dense())


def test_holes_in_the_padding_run_on_sdpa(calls):
    mask = padding(3, 0)
    mask[1, 10:12] = mask[1, 20:22] = 0
    same(built("Bert"), mask)
    assert not calls


def test_what_runs_on_sdpa(calls, monkeypatch):
    model = built("Bert").train()  # dropout
    mask = padding(0, 9)
    results = []
    for name in ("genfast", "sdpa"):
        model.set_attn_implementation(name)
        torch.manual_seed(0)
        results.append(model(tokens(), attention_mask=mask).logits)
    assert torch.equal(*results)
    model = built("Bert").double()
    assert torch.equal(answers(model, "genfast", mask, attention_mask=mask)[0],
                       answers(model, "sdpa", mask, attention_mask=mask)[0])  # fmt: skip
    assert not calls
    q, k, v = (torch.randn(2, 4, LENGTH, 8) for _ in range(3))
    module, bias = torch.nn.Module(), torch.randn(1, 4, LENGTH, LENGTH)
    given = AttentionMask.block_causal(LENGTH, 8)
    out, _ = ours.genfast_attention_forward(module, q, k, v, given, scaling=0.3, position_bias=bias)
    scores = (q @ k.mT * 0.3 + bias).masked_fill(~given.to_dense()[:, None], -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2))
    # A BlockMask of no structure is flex_attention's.
    seen = []
    monkeypatch.setattr(ours, "flex_attention_forward", lambda *args, **kwargs: (seen.append(args), None))
    scattered = torch.nn.attention.flex_attention.create_block_mask(
        lambda b, h, i, j: i % 3 == j % 3, None, None, LENGTH, LENGTH, device="cpu"
    )
    ours.genfast_attention_forward(module, q, k, v, scattered, scaling=0.3)
    assert len(seen) == 1 and seen[0][4] is scattered and not calls


def test_few_queries_of_a_decoding_step(calls):
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, LENGTH, 8), torch.randn(2, 2, LENGTH, 8)
    mask = AttentionMask.causal(3, LENGTH, q_offset=torch.tensor([30, 12]))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    expected = genfast.attention(q, k, v, mask=mask).transpose(1, 2)
    for given in (mask, mask.to_block_mask(), ours.StructuredMask(mask), mask.to_dense()[:, None]):
        out, _ = ours.genfast_attention_forward(module, q, k, v, given)
        torch.testing.assert_close(out, expected)
    assert len(calls) == 4


def test_checkpointed_layers(calls):
    model = built("Llama").train()
    mask = padding(0, 9)
    expected = answers(model, "genfast", mask, attention_mask=mask)
    model.gradient_checkpointing_enable()
    found = answers(model, "genfast", mask, attention_mask=mask)
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1])):
        assert torch.equal(a, b)
    assert len(calls) == 2 + 4


def test_no_mask_is_causal_where_the_module_is(calls):
    q, k, v = (torch.randn(2, 4, LENGTH, 8) for _ in range(3))
    module = torch.nn.Module()
    for attribute, argument, causal in ((False, None, False), (True, None, True), (True, False, False)):
        module.is_causal = attribute
        out, _ = ours.genfast_attention_forward(module, q, k, v, None, is_causal=argument)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


def test_refusals(calls):
    q = torch.randn(1, 2, LENGTH, 8)
    for name in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f"does not compute {name}"):
            ours.genfast_attention_forward(torch.nn.Module(), q, q, q, None, **{name: torch.ones(2)})
    with pytest.raises(ValueError, match=r"attention_mask is AttentionMask.*query is"):
        ours.genfast_attention_forward(torch.nn.Module(), q, q, q, AttentionMask.causal(LENGTH + 1))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_left_padding(cache, calls):
    model = built("Llama", num_key_value_heads=2)
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=padding(7, 0), cache_implementation=cache)
    texts = []
    for name in ("genfast", "eager"):
        model.set_attn_implementation(name)
        texts.append(model.generate(tokens(), disable_compile=True, pad_token_id=0, **options))
    assert torch.equal(*texts) and texts[0].shape == (2, LENGTH + 6)
    assert calls  # the prompt; steps of one token run on PyTorch
    before = len(calls)
    with genfast.backend("cpu"):
        model.set_attn_implementation("genfast")
        assert torch.equal(model.generate(tokens(), disable_compile=True, pad_token_id=0, **options), texts[0])
    assert len(calls) - before == 12  # two layers, six calls of the model


def test_half_precision_and_autocast(calls):
    model = built("Llama")
    wide = answers(model, "eager")[0]
    for how in ("autocast", "cast"):
        if how == "cast":
            model = model.bfloat16()
        errors = {}
        for name in ("genfast", "sdpa"):
            model.set_attn_implementation(name)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                errors[name] = (model(tokens()).logits - wide).norm() / wide.norm()
        assert errors["genfast"] < 1.5 * errors["sdpa"] + 0.01
    assert len(calls) == 4


def test_compiled_without_a_break(calls, monkeypatch):
    monkeypatch.setattr(ours, "attention", genfast.attention)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    # A decoder without a cache is asked whether its positions are of packed documents.
    for kind, options in (("Llama", dict(use_cache=True)), ("Bert", {})):
        model = built(kind)
        model.set_attn_implementation("genfast")
        for mask in (None, padding(0, 9)):
            torch.compiler.reset()
            compiled = torch.compile(model, backend=backend, fullgraph=True)
            with torch.no_grad():
                a, b = (m(tokens(), attention_mask=mask, **options).logits for m in (compiled, model))
            # Padding cannot be looked at there.
            assert graphs[-1].count("genfast.attention.default") == (2 if mask is None else 0)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_patch_and_unpatch():
    with pytest.raises(ValueError, match="genfast"):
        built("Llama").set_attn_implementation("genfast")
    with genfast.patch("transformers") as done:
        assert done.names == ("genfast",) and "1 names: genfast" in repr(done)
        genfast.patch("transformers")  # once more: nothing new
        model = built("Llama")
        model.set_attn_implementation("genfast")
        model(tokens())
    genfast.unpatch("transformers")
    for mapping in (transformers.AttentionInterface(), masking_utils.ALL_MASK_ATTENTION_FUNCTIONS):
        assert "genfast" not in mapping
    with pytest.raises(KeyError, match="genfast"):
        model(tokens())
