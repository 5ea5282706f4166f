"""The hook and the reducers beside DDP's own result, on every wire."""

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import all_well, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genfast
from genfast.distributed import exchange
from genfast.gradient_wire import WIRES

# Of the largest gradient: two roundings (of what a rank sends, and of the average).
BOUND = {"fp32": 1e-5, "bf16": 2.0**-7, "fp16": 2.0**-10, "int8": 3 / 127, "fp8_e4m3": 2.2 / 16, "fp8_e5m2": 2.2 / 8}


class Network(nn.Module):
    """With a shared layer, an unused one, and two in half precision."""

    def __init__(self, unused=False, half=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(20, 300), nn.Linear(300, 300), nn.Linear(300, 7)
        self.unused = nn.Linear(5, 5) if unused else None
        self.low = nn.Linear(7, 40, dtype=torch.bfloat16) if half else None
        self.lower = nn.Linear(40, 6, dtype=torch.float16) if half else None

    def forward(self, x, use=False):
        x = self.b(self.b(self.a(x).tanh()).tanh()).tanh()
        x = self.c(x)
        if use:
            x = x + self.unused(x[..., :5]).sum()
        return x if self.low is None else self.lower(self.low(x.bfloat16()).half()).float()


def data(rank, step, rows=16):
    return torch.randn(rows, 20, generator=torch.Generator().manual_seed(100 * step + rank))


def gradients(module):
    return [p.grad for p in module.parameters()]


def hooked(module, wire="bf16", ddp=None, **options):
    state = genfast.HookState(module, wire, timeout=10, **options)
    wrapped = DistributedDataParallel(module, **{"bucket_cap_mb": 0.1, **(ddp or {})})
    wrapped.register_comm_hook(state, genfast.comm_hook)
    return wrapped, state


def same_everywhere(tensors):
    """Whether all ranks have the same bits."""
    for t in tensors:
        found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(found, t.contiguous())
        if not all(torch.equal(t, other) for other in found):
            return False
    return True


def close(got, expected, wire, slack=0.0):
    largest = max(float(e.abs().max()) for e in expected if e is not None)  # tensors share blocks of 256 values
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            bound = BOUND[wire] + (0 if g.dtype == torch.float32 else torch.finfo(g.dtype).eps)
            assert (g.float() - e.float()).abs().max() <= bound * largest + slack, wire


def beside_ddp(rank, wires):
    exchange.HELD = 2**17  # the large layer leaves at once on most wires, the others wait for it
    return {wire: beside_ddp_on(rank, wire) for wire in wires}


def beside_ddp_on(rank, wire):
    """Steps with accumulation, through DDP's rebuild of its buckets, with and without views of them."""
    bits = []
    for view, half in [(True, False), (False, True)][: 2 if wire in ("bf16", "int8") else 1]:
        plain = DistributedDataParallel(Network(half=half), bucket_cap_mb=0.1, gradient_as_bucket_view=view)
        ours, state = hooked(
            Network(half=half), wire, dict(gradient_as_bucket_view=view), error_feedback=False, max_norm=0.1
        )
        reducer_net = Network(half=half)
        reducer = genfast.GradientReducer(
            reducer_net, wire, error_feedback=False, max_norm=0.1, bucket_bytes=100_000, timeout=10
        )
        for step in range(3):
            for module, quiet in ((plain, plain.no_sync), (ours, ours.no_sync), (reducer_net, reducer.no_sync)):
                module.zero_grad()
                if step == 1:
                    with quiet():
                        module(data(rank, 9)).square().mean().backward()
                module(data(rank, step)).square().mean().backward()
            for module, finished in ((ours, state.finish()), (reducer_net, reducer.finish())):
                close(gradients(module), gradients(plain), wire)
                assert same_everywhere(gradients(module))
                norm = torch.nn.utils.get_total_norm([g.float() for g in gradients(module)])
                assert torch.allclose(finished.norm, norm, rtol=1e-2 if half else 1e-5)
                assert finished.finite and finished.bad_parameters() == {}
                assert torch.allclose(finished.clip_coefficient, (0.1 / (finished.norm + 1e-6)).clamp(max=1))
                bits += [finished.norm.item(), *(g.double().sum().item() for g in gradients(module))]
    return bits


@pytest.mark.parametrize("ranks, wires", [(1, ("bf16", "int8")), (2, tuple(WIRES)), (3, tuple(WIRES)), (4, ("int8",))])
def test_beside_ddp(ranks, wires):
    first = all_well(ranks, beside_ddp, wires)
    assert all(bits == first[0] for bits in first)
    assert all_well(ranks, beside_ddp, wires[-1:])[0][wires[-1]] == first[0][wires[-1]], "from run to run"


# Of rounding a number onto the wire: relative to it, and absolute, for int8 and fp8 in parts of its block's largest.
HALF_STEP = {
    "fp32": (2.0**-24, 0), "bf16": (2.0**-8, 0), "fp16": (2.0**-11, 2.0**-25), "int8": (0, 0.5 / 127),
    "fp8_e4m3": (2.0**-4, 2.0**-10 / 448), "fp8_e5m2": (2.0**-3, 2.0**-17 / 57344),
}  # fmt: skip


def half_step(numbers, wire):
    relative, absolute = HALF_STEP[wire]
    if WIRES[wire].largest is not None:
        blocks = nn.functional.pad(numbers.abs(), (0, -numbers.shape[-1] % 256)).unflatten(-1, (-1, 256))
        absolute = absolute * blocks.amax(-1).repeat_interleave(256, -1)[..., : numbers.shape[-1]]
    return relative * numbers.abs() + absolute


def exact_sums(rank):
    return {wire: exact_sum(rank, wire) for wire in WIRES}


def exact_sum(rank, wire):
    """The largest error against the sum or average in float64, in parts of what the two roundings may leave."""
    ranks = dist.get_world_size()
    n = 256 * 40 + 77
    given = torch.stack([
        torch.randn(n, generator=torch.Generator().manual_seed(r)) * torch.logspace(-5, 2, n).roll(999 * r)
        for r in range(ranks)
    ])  # fmt: skip
    p = nn.Parameter(torch.zeros(n))
    worst = []
    for average in (True, False):
        reducer = genfast.GradientReducer([("p", p)], wire, error_feedback=False, average=average, timeout=10)
        p.grad = None
        (p * given[rank]).sum().backward()
        reducer.finish()
        numbers = given.double() / (ranks if average else 1)
        sent = half_step(numbers, wire).sum(0)
        allowed = sent + half_step(numbers.sum(0).abs() + sent, wire) + 2.0**-23 * ranks * numbers.abs().sum(0)
        worst.append(float(((p.grad - numbers.sum(0)).abs() / allowed).max()))
        assert same_everywhere([p.grad])
    return worst


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_wire_beside_the_sum_in_float64(ranks):
    for found in all_well(ranks, exact_sums):
        for wire, worst in found.items():
            assert (0.2 if wire != "fp32" else -1) < max(worst) <= 1, (wire, worst)


def options_of_ddp(rank):
    def step(module, x, **inputs):
        module.zero_grad()
        module(x, **inputs).square().mean().backward()

    # A parameter that no rank uses, then one that rank 0 alone uses.
    plain = DistributedDataParallel(Network(unused=True), find_unused_parameters=True)
    ours, state = hooked(Network(unused=True), "fp32", dict(find_unused_parameters=True, bucket_cap_mb=25))
    for k, use in enumerate((False, rank == 0)):
        for module in (plain, ours):
            step(module, data(rank, 0), use=use)
        close(gradients(ours), gradients(plain), "fp32")
        assert state.finish().finite
        assert (ours.module.unused.weight.grad is None) == (k == 0)

    plain = DistributedDataParallel(Network(), static_graph=True)
    ours, state = hooked(Network(), "fp32", dict(static_graph=True))
    for k in range(3):
        for module in (plain, ours):
            step(module, data(rank, k))
        close(gradients(ours), gradients(plain), "fp32")
        state.finish()

    net = Network()
    ours, state = hooked(net, "fp32", dict(bucket_cap_mb=25))
    compiled = torch.compile(ours, backend="aot_eager")
    plain = DistributedDataParallel(Network())
    for k in range(2):
        step(compiled, data(rank, k))
        step(plain, data(rank, k))
        close(gradients(net), gradients(plain), "fp32")
        state.finish()


def test_options_of_ddp():
    all_well(2, options_of_ddp)


def scaled(rank, wire):
    """Under a GradScaler: norms without its scale, a step with NaN skipped by all, named, and made good."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net = Network()
    ours, state = hooked(net, wire, grad_scaler=scaler, max_norm=0.05)
    plain = DistributedDataParallel(Network())
    outcomes = []
    for fused in (True, False):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
        for step in range(2):
            for module in (ours, plain):
                module.zero_grad()
            x = data(rank, step)
            plain.module.load_state_dict(net.state_dict())
            plain(x).square().mean().backward()
            expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
            scaler.scale(ours(x).square().mean()).backward()
            finished = state.finish()
            assert torch.allclose(finished.norm, expected, rtol=0.02)
            before = [p.detach().clone() for p in net.parameters()]
            finished.apply_to(optimizer)
            scaler.step(optimizer)
            scaler.update()
            close([(old - p) / 0.1 for p, old in zip(net.parameters(), before)], gradients(plain), wire, slack=1e-6)
        ours.zero_grad()
        x = data(rank, 5)
        if rank == 1:
            net.c.register_forward_hook(lambda m, i, o: o * torch.nan)
        before = [p.detach().clone() for p in net.parameters()]
        scaler.scale(ours(x).square().mean()).backward()
        net.c._forward_hooks.clear()
        finished = state.finish()
        finished.apply_to(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not finished.finite and all(map(torch.equal, before, net.parameters()))
        outcomes.append((finished.bad_parameters(), scaler.get_scale()))
        assert all(r.isfinite().all() for r in state.residuals().values())
    return outcomes


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_under_a_grad_scaler(wire):
    first, second = all_well(2, scaled, wire)
    assert first == second
    everything = {name: [1] for name, _ in Network().named_parameters()}
    assert first == [(everything, 512.0), (everything, 256.0)]


def bad_parameter(rank, wire):
    found = []
    for make in ("hook", "reducer"):
        net = Network()
        if make == "hook":
            module, reducer = hooked(net, wire)
        else:
            module, reducer = net, genfast.GradientReducer(net, wire, timeout=10)
        net.b.bias.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), torch.inf) if rank == 1 else g)
        module(data(rank, 0)).sum().backward()
        finished = reducer.finish()
        for fused in (True, False):
            optimizer = torch.optim.AdamW(net.parameters(), fused=fused)
            before = [p.detach().clone() for p in net.parameters()]
            finished.apply_to(optimizer)
            optimizer.step()
            assert all(map(torch.equal, before, net.parameters()))
            assert not hasattr(optimizer, "found_inf")
        found.append((bool(finished.finite), finished.bad_parameters()))
    return found


@pytest.mark.parametrize("wire", ["bf16", "fp8_e4m3"])
def test_a_gradient_that_is_not_finite_is_named(wire):
    assert all_well(3, bad_parameter, wire) == [[(False, {"b.bias": [1]})] * 2] * 3


def in_a_group(rank):
    """Two of three ranks: averages over them, and their global numbers in reports."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return "none of its business"
    net, sharded_net, reduced_net = Network(), Network(), Network()
    ddp, state = hooked(net, "fp32", dict(process_group=group), process_group=group)
    plain = DistributedDataParallel(Network(), process_group=group)
    reducer = genfast.GradientReducer(reduced_net, "fp32", process_group=group, timeout=10)
    sharded = genfast.ShardedReducer(sharded_net, torch.optim.SGD, lr=0.1, wire="fp32", process_group=group, timeout=10)
    before = [p.detach().clone() for p in sharded_net.parameters()]
    for module in (ddp, plain, reduced_net, sharded_net):
        module(data(rank, 0)).square().mean().backward()
    norm, norm_of_reducer = state.finish().norm, reducer.finish().norm
    assert norm == norm_of_reducer and torch.allclose(sharded.step().norm, norm)
    close(gradients(net), gradients(plain), "fp32")
    close(gradients(reduced_net), gradients(plain), "fp32")
    close([(old - p) / 0.1 for p, old in zip(sharded_net.parameters(), before)], gradients(plain), "fp32", slack=1e-6)
    net.b.bias.register_hook(lambda g: g * torch.nan if rank == 2 else g)
    ddp(data(rank, 0)).sum().backward()
    return state.finish().bad_parameters()


def test_in_a_group_of_some_ranks():
    assert all_well(3, in_a_group) == [{"b.bias": [2]}, "none of its business", {"b.bias": [2]}]


def regression(rank, wire, feedback):
    """Plain gradient descent on a badly scaled problem, which int8 alone does not resolve."""
    torch.manual_seed(0)
    scale = torch.logspace(0, -2, 64)
    x = torch.randn(256, 64) * scale
    y = x @ torch.randn(64)
    net = nn.Linear(64, 1, bias=False)
    nn.init.zeros_(net.weight)
    ddp, state = hooked(net, wire, error_feedback=feedback)
    mine = slice(rank, None, dist.get_world_size())
    for _ in range(100):
        net.zero_grad()
        ddp(x[mine])[:, 0].sub(y[mine]).square().mean().backward()
        with torch.no_grad():
            net.weight -= 0.3 * net.weight.grad
    loss = (net(x)[:, 0] - y).square().mean().item()
    return loss, {n: float(r.abs().sum()) for n, r in state.residuals().items()}


def test_error_feedback_trains_like_fp32():
    (exact, none), _ = all_well(2, regression, "fp32", None)
    (fed, kept), _ = all_well(2, regression, "int8", None)
    (starved, _), _ = all_well(2, regression, "int8", False)
    assert none == {} and kept["weight"] > 0
    assert abs(fed / exact - 1) < 0.001 < abs(starved / exact - 1), (exact, fed, starved)


def residuals_survive(rank):
    """Through DDP's rebuild, which happens after the first step, what was left out moves with its parameter."""
    net = Network()
    ddp, state = hooked(net, "int8", dict(bucket_cap_mb=0.3))
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    given = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    layouts = set()
    for step in range(4):
        net.zero_grad()
        local = torch.autograd.grad(net(data(rank, step)).square().mean(), list(net.parameters()))
        for n, g in zip(given, local):
            given[n] += g
        ddp(data(rank, step)).square().mean().backward()
        layouts.add(tuple(state.engine.running))
        for n, p in net.named_parameters():
            total[n] += p.grad
    assert len(layouts) == 2, "DDP rebuilds its buckets once"
    left = state.residuals()
    for n in given:
        mine = given[n].flatten() - left[n]
        dist.all_reduce(mine)
        # What arrived is the sum of what was sent, but for the second rounding's last residuals: one step of int8 each.
        assert (mine / dist.get_world_size() - total[n].flatten()).abs().max() <= 4 * total[n].abs().max() / 127
    return {n: float(r.norm()) for n, r in left.items()}


def test_residuals_survive_the_rebuild_of_buckets():
    for found in all_well(3, residuals_survive):
        assert all(norm > 0 for norm in found.values())


def unused_parameters(rank, how):
    net = Network(unused=True)
    reducer = genfast.GradientReducer(net, "fp32", unused=how, timeout=3)
    found = []
    for use in (False, rank == 0):
        net.zero_grad()
        net(data(rank, 0), use=use).square().mean().backward()
        finished = reducer.finish()
        g = net.unused.weight.grad
        found.append(None if g is None else float(g.abs().sum()))
        assert torch.allclose(
            finished.norm, torch.nn.utils.get_total_norm([p for p in gradients(net) if p is not None])
        )
    return found


def test_unused_parameters():
    zero, none = all_well(2, unused_parameters, "zero"), all_well(2, unused_parameters, "keep_none")
    assert zero[0] == zero[1] and zero[0][0] == 0 and zero[0][1] > 0
    assert none[0] == none[1] and none[0][0] is None and none[0][1] == zero[0][1]
    for error in run(2, unused_parameters, "error"):
        assert isinstance(error, RuntimeError) and "no gradient for unused.weight, unused.bias" in str(error)


def one_rank_without(rank):
    net = Network(unused=True)
    reducer = genfast.GradientReducer(net, "fp32", timeout=3)
    net(data(rank, 0), use=rank == 0).square().mean().backward()
    try:
        reducer.finish()
    except RuntimeError as error:
        return type(error).__name__, getattr(error, "ranks", None), str(error)


def test_a_rank_without_a_gradient_tells_the_others():
    first, second = all_well(2, one_rank_without)
    assert second[0] == "RuntimeError" and "no gradient for unused.weight" in second[2]
    assert first[:2] == ("RankFailure", (1,)) and "no gradient for unused.weight" in first[2]


def reducer_misused(rank):
    net = Network()
    reducer = genfast.GradientReducer(net, "fp32")
    net(data(rank, 0)).sum().backward()
    found = []
    try:
        net(data(rank, 0)).sum().backward()
    except RuntimeError as error:
        found.append(str(error))
    table = nn.ParameterDict({"table": nn.Parameter(torch.randn(5, 3))})
    sparse = genfast.GradientReducer(table, "fp32")
    try:
        nn.functional.embedding(torch.tensor([1]), table["table"], sparse=True).sum().backward()
    except TypeError as error:
        found.append(str(error))
    for options in (dict(unused="maybe"), dict(bucket_bytes=0)):
        try:
            genfast.GradientReducer(net, **options)
        except ValueError as error:
            found.append(str(error))
    reducer.close(), sparse.close()
    return found


def test_reducer_misused():
    (found,) = all_well(1, reducer_misused)
    second, table, unused, size = found
    assert "got a second gradient" in second and "table has a sparse gradient" in table
    assert "unused must be" in unused and "bucket_bytes must be" in size


def dropped_in(rank):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    from genfast.dropin import ddp_hooks

    def result(hook, half=False, group=None):
        ddp = DistributedDataParallel(Network(half=half), bucket_cap_mb=0.1, process_group=group)
        if hook is not None:
            ddp.register_comm_hook(group, hook)
        for step in range(2):
            ddp.zero_grad()
            ddp(data(rank, step)).square().mean().backward()
        assert same_everywhere(gradients(ddp))
        return gradients(ddp)

    exact = result(None)
    for name, wire in {
        "allreduce_hook": "fp32", "fp16_compress_hook": "fp16", "bf16_compress_hook": "bf16",
        "quantization_pertensor_hook": "int8", "quantization_perchannel_hook": "int8",
    }.items():  # fmt: skip
        close(result(getattr(ddp_hooks, name)), exact, wire)
    # Not farther from DDP's own than what PyTorch's hook of the same name gives. (DDP looks at the name of bf16's.)
    for name in ("fp16_compress_hook", "bf16_compress_hook"):
        theirs = getattr(default_hooks, name)
        mine, peer = (
            sum((g - e).double().square().sum() for g, e in zip(result(hook), exact))
            for hook in (getattr(ddp_hooks, name), lambda state, bucket: theirs(state, bucket))  # noqa: B023
        )
        assert 0 < mine <= 1.1 * peer, name
    for name, wire in {"fp16_compress_wrapper": "fp16", "bf16_compress_wrapper": "bf16"}.items():
        close(result(getattr(ddp_hooks, name)(ddp_hooks.allreduce_hook)), exact, wire)
        close(result(getattr(ddp_hooks, name)(default_hooks.allreduce_hook)), exact, wire)
    # Buckets in half precision, and a group that is named.
    close(result(ddp_hooks.allreduce_hook, half=True), result(None, half=True), "fp32")
    close(result(ddp_hooks.allreduce_hook, group=dist.new_group([0, 1])), exact, "fp32")
    return True


def test_drop_ins():
    assert all_well(2, dropped_in) == [True, True]


def test_drop_ins_have_the_names_and_parameters_of_pytorch():
    import inspect

    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, quantization_hooks

    from genfast.dropin import ddp_hooks

    for name in ddp_hooks.__all__:
        theirs = getattr(quantization_hooks if "quantization" in name else default_hooks, name)
        assert list(inspect.signature(getattr(ddp_hooks, name)).parameters) == list(
            inspect.signature(theirs).parameters
        )
    with pytest.raises(ValueError, match="bucket_size"):
        ddp_hooks.quantization_perchannel_hook(None, None, bucket_size=100)
