"""``select_transfer`` and ``commit_``: backends against the reference, the reference against published loops."""

import pytest
import torch

import genfast
from genfast import backends
from genfast.checks import token_transfer as checks
from genfast.ops import token_transfer as transfer

CONFIDENCE = torch.rand(4, 50, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(4, 50, generator=torch.Generator().manual_seed(2)) < 0.6


@pytest.mark.parametrize("isa", backends.machine_isas())
def test_every_instruction_set(isa):
    with backends.instruction_set(isa):
        assert [case.name for case in checks.cases() if checks.check(case, "cpu") != (0, 0)] == []


def test_top_n_is_lladas_loop():
    n = torch.tensor([3, 0, 7, 50])
    published = torch.zeros_like(MASK)
    left = torch.where(MASK, CONFIDENCE, -torch.inf)
    for j in range(4):
        published[j, left[j].topk(int(n[j])).indices] = True
    assert torch.equal(genfast.select_transfer(CONFIDENCE, MASK, n), published & MASK)


def test_factor_is_fast_dllms_loop():
    """The published loop, its acceptance of a last failure included."""
    for factor in (0.3, 0.8, 1.0, 1.6):
        published = torch.zeros_like(MASK)
        for j in range(4):
            values = CONFIDENCE[j][MASK[j]].sort(descending=True).values
            limits = [1 - factor / (k + 1) for k in range(1, len(values) + 1)]
            limits[0] = -1
            for top in range(len(limits)):
                if values[top] < limits[top]:
                    break
            if top in (0, len(limits) - 1):
                top += 1
            published[j, torch.where(MASK[j], CONFIDENCE[j], -torch.inf).topk(top).indices] = True
        got = genfast.select_transfer(CONFIDENCE, MASK, strategy="factor", factor=factor, accept_last=True)
        assert torch.equal(got, published)


def test_threshold_commits_all_that_reach_it_or_the_best():
    got = genfast.select_transfer(CONFIDENCE, MASK, strategy="threshold", threshold=0.95)
    best = torch.where(MASK, CONFIDENCE, -torch.inf).argmax(1)
    assert torch.equal(got, (MASK & (CONFIDENCE >= 0.95)).scatter(1, best[:, None], True))


def test_slack_is_dinfers_rule():
    """The published threshold: no higher than just below a row's best, in one comparison and without a fallback."""
    confidence = torch.where(MASK, CONFIDENCE, -torch.inf)
    confidence[2] *= 0.5
    for threshold, slack in ((0.9, 1e-5), (0.6, 1e-5), (0.99, 0.05)):
        limit = (confidence.amax(1) - slack).clamp(-1000, threshold)[:, None]
        got = genfast.select_transfer(confidence, MASK, 0, strategy="threshold", threshold=threshold, slack=slack)
        assert torch.equal(got, confidence >= limit)
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    assert not genfast.select_transfer(CONFIDENCE[:1, :5], nothing, strategy="threshold", threshold=1, slack=0).any()


def test_random_and_perturbed_order():
    """10000 draws of one of 5 positions: chi-square with 4 degrees of freedom, a false alarm once in 10^5 seeds."""
    confidence = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3]).expand(10000, 5)
    mask = torch.ones(10000, 5, dtype=torch.bool)
    for options, law in (
        (dict(strategy="random"), torch.full((5,), 0.2)),
        (dict(temperature=0.5), (confidence[0] / 0.5).softmax(0)),
    ):
        got = genfast.select_transfer(confidence, mask, seed=11, **options)
        assert (got.sum(1) == 1).all()
        expected = law * 10000
        assert ((got.sum(0) - expected) ** 2 / expected).sum() < 28.5
        half = genfast.select_transfer(confidence[5000:], mask[5000:], seed=11, offset=5000, **options)
        assert torch.equal(half, got[5000:])


def test_commit_writes_in_place_and_counts():
    x = torch.tensor([[1, 9, 9, 2], [9, 3, 9, 9]])
    tokens = torch.tensor([[5, 6, 7, 8], [2, 2, 2, 2]])
    selected = torch.tensor([[False, True, False, False], [True, False, False, False]])
    left, finished = genfast.commit_(x, tokens, selected, mask_id=9, eos_id=3)
    assert x.tolist() == [[1, 6, 9, 2], [2, 3, 9, 9]]
    assert left.tolist() == [1, 2] and finished.tolist() == [False, True]
    transposed = torch.full((4, 2), 9).T
    left, finished = genfast.commit_(transposed, tokens, torch.ones(2, 4, dtype=torch.bool), mask_id=9)
    assert torch.equal(transposed, tokens) and left.tolist() == [0, 0] and finished.all()


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(strategy="best"), "strategy"),
        (dict(strategy="threshold"), "threshold"),
        (dict(threshold=0.5), "threshold"),
        (dict(strategy="hierarchy", threshold=0.5), "low_threshold"),
        (dict(strategy="factor", factor=float("nan")), "factor"),
        (dict(slack=0.1), "slack"),
        (dict(strategy="threshold", threshold=0.5, slack=-1e-5), "slack"),
        (dict(strategy="threshold", threshold=0.5, slack=float("nan")), "slack"),
        (dict(n=1.5), "n must"),
        (dict(n=torch.ones(3, dtype=torch.int64)), "n is"),
        (dict(start=torch.ones(4)), "start"),
        (dict(temperature=-1.0), "temperature"),
        (dict(seed=torch.zeros(5, dtype=torch.int64), strategy="random"), "seed"),
        (dict(offset=-1), "offset"),
    ],
)
def test_refusals(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        genfast.select_transfer(CONFIDENCE, MASK, **options)


def test_refused_tensors():
    with pytest.raises(ValueError, match="mask"):
        genfast.select_transfer(CONFIDENCE, MASK[:2])
    with pytest.raises(TypeError, match="confidence"):
        genfast.select_transfer(MASK, MASK)
    with pytest.raises(TypeError, match="x must"):
        genfast.commit_(CONFIDENCE, MASK, MASK, mask_id=0)
    with pytest.raises(ValueError, match="expanded"):
        tokens = torch.zeros(4, 50, dtype=torch.int64)
        genfast.commit_(torch.zeros(1, 50, dtype=torch.int64).expand(4, 50), tokens, MASK, mask_id=0)


@pytest.mark.skipif(not backends.machine_isas(), reason="needs a native module")
def test_plain_calls_are_one_native_call():
    plain = dict(
        n=3, strategy="top", threshold=None, low_threshold=None, strict=False, factor=None, accept_last=False,
        bound=None, inclusive=False, start=0, end=None, temperature=0.0, seed=None, stream=0, offset=0,
    )  # fmt: skip

    def direct(confidence=CONFIDENCE, mask=MASK, **options):
        return transfer.select_path.run(confidence, mask, *{**plain, **options}.values())

    n = torch.tensor([3, 0, 7, 50])
    for options in (
        {},
        dict(n=n, end=n),
        dict(strategy="threshold", threshold=0.5),
        dict(strategy="hierarchy", threshold=0.9, low_threshold=0.2),
        dict(strategy="factor", factor=1, strict=True),
        dict(mask=MASK.repeat(1, 2)[:, :50]),
    ):
        with genfast.backend("reference"):
            expected = genfast.select_transfer(**{"confidence": CONFIDENCE, "mask": MASK, "n": 3, **options})
        assert torch.equal(direct(**options), expected)
    odd = (
        dict(strategy="random"),
        dict(temperature=1.0),
        dict(threshold=0.5),
        dict(strategy="threshold"),
        dict(strategy="best"),
        dict(n=n[:2]),
        dict(n=n.float()),
        dict(n=True),
        dict(seed=1),
        dict(stream=-1),
        dict(mask=MASK[:2]),
        dict(mask=MASK.T.contiguous().T),
        dict(mask=CONFIDENCE),
        dict(confidence=CONFIDENCE.double()),
        dict(confidence=CONFIDENCE.clone().requires_grad_()),
        dict(confidence=CONFIDENCE[None]),
    )
    assert [options for options in odd if direct(**options) is not NotImplemented] == []
    x = torch.zeros(4, 50, dtype=torch.int64)
    assert transfer.commit_path.run(x, x, MASK, 9, None) is not NotImplemented
    for call in ((x[:1].expand(4, 50), x, MASK, 9, None), (x, x, CONFIDENCE, 9, None), (x, x, MASK, 1.5, None)):
        assert transfer.commit_path.run(*call) is NotImplemented
    with genfast.backend("reference"):
        assert direct() is NotImplemented


def test_equal_scores_go_by_position_at_any_count():
    confidence = torch.tensor([[0.5, 0.25, 0.5, -0.0, 0.5, 0.0, 0.25, 1e30]])
    order = [7, 0, 2, 4, 1, 6, 3, 5]
    confidence[0, 3] = 0.0
    for n in range(9):
        got = genfast.select_transfer(confidence, torch.ones(1, 8, dtype=torch.bool), n)
        assert sorted(order[:n]) == got[0].nonzero()[:, 0].tolist()


def test_compiles_without_a_break():
    def step(x, confidence, tokens):
        selected = genfast.select_transfer(confidence, x == 9, 2, temperature=0.3, seed=1)
        return (x, *genfast.commit_(x, tokens, selected, mask_id=9))

    tokens = torch.arange(20).view(2, 10)
    confidence = CONFIDENCE[:2, :10].clone()
    expected = step(torch.full((2, 10), 9), confidence, tokens)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(torch.full((2, 10), 9), confidence, tokens)
    assert all(map(torch.equal, got, expected)) and expected[1].tolist() == [8, 8]
