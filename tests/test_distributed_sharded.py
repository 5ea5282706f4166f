"""ShardedReducer beside an optimizer on all parameters, and its state at other numbers of ranks."""

import io

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import all_well
from torch import nn

import genfast


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 7)).to(dtype)


def decay_matrices(name, p):
    return {"weight_decay": 0.1 if p.dim() > 1 else 0.0}


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, dict(lr=0.01)),
    "Adam": (torch.optim.Adam, dict(lr=0.01, amsgrad=True, fused=True)),
    "SGD": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "plain SGD": (torch.optim.SGD, dict(lr=0.1)),
}


def made(net, wire="fp32", name="AdamW"):
    kind, options = OPTIMIZERS[name]
    return genfast.ShardedReducer(
        net, kind, wire=wire, max_norm=0.5, options_of=decay_matrices, bucket_bytes=10_000, timeout=10, **options
    )


def batch(step):
    return torch.randn(24, 20, generator=torch.Generator().manual_seed(step))


def mine(x, rank):
    return x[rank :: dist.get_world_size()]


def trained(rank, wire, steps, state=None, name="AdamW"):
    net = network()
    sharded = made(net, wire, name)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sharded.optimizer, 0.9)
    if state is not None:
        sharded.load_state_dict(state)
    norms = []
    for step in steps:
        x = mine(batch(step), rank).to(next(net.parameters()).dtype)
        half = len(x) // 2
        with sharded.no_sync():
            (net(x[:half]).square().mean() / 2).backward()
        (net(x[half:]).square().mean() / 2).backward()
        finished = sharded.step()
        norms.append(float(finished.norm))
        schedule.step()
        assert finished.finite and all(p.grad is None for p in net.parameters())
    share = sum(s.weight.numel() for s in sharded.shards.values())
    return [p.detach().numpy() for p in net.parameters()], norms, share, sharded.state_dict()


def alone(steps, name="AdamW"):
    net = network()
    groups = [{"params": [p], **decay_matrices(n, p)} for n, p in net.named_parameters()]
    kind, options = OPTIMIZERS[name]
    optimizer = kind(groups, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    norms = []
    for step in steps:
        optimizer.zero_grad()
        net(batch(step)).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        optimizer.step()
        schedule.step()
    return [p.detach() for p in net.parameters()], norms


@pytest.mark.parametrize(
    "ranks, wire, name, bound",
    [
        (1, "fp32", "AdamW", 1e-5),
        (2, "fp32", "AdamW", 1e-5),
        (2, "fp32", "Adam", 1e-5),
        (2, "fp32", "SGD", 1e-5),
        (4, "fp32", "plain SGD", 1e-5),
        (3, "bf16", "AdamW", 0.01),
    ],
)
def test_like_one_optimizer_on_everything(ranks, wire, name, bound):
    found = all_well(ranks, trained, wire, range(4), None, name)
    expected, norms = alone(range(4), name)
    for parameters, got, share, _ in found:
        assert got == found[0][1] and torch.allclose(torch.tensor(got), torch.tensor(norms), rtol=bound)
        assert share <= sum(p.numel() for p in expected) / ranks + 4 * 256
        for p, q, first in zip(parameters, expected, found[0][0]):
            error = (torch.from_numpy(p) - q).abs()
            assert error.mean() <= bound / 10 and error.max() <= 4 * bound and (p == first).all()


@pytest.mark.parametrize("name, ranks", [("AdamW", 1), ("AdamW", 3), ("SGD", 3)])
def test_state_at_another_number_of_ranks(name, ranks):
    """Saved after two of four steps by two ranks, through a file, and loaded by others: the parameters come out the
    same, and so does the learning rate, which a schedule has changed."""
    *_, state = all_well(2, trained, "fp32", range(2), None, name)[0]
    (straight, *_), *_ = all_well(2, trained, "fp32", range(4), None, name)
    file = io.BytesIO()
    torch.save(state, file)
    state = torch.load(io.BytesIO(file.getvalue()))
    for found in [all_well(ranks, trained, "fp32", range(2, 4), state, name)]:
        for p, q in zip(found[-1][0], straight):
            assert abs(p - q).max() <= 1e-5
        assert set(found[0][3]) == set(state)


def corners(rank):
    net = network(torch.bfloat16)
    sharded = made(net, "int8")
    for step in range(2):
        net(mine(batch(step), rank).bfloat16()).float().square().mean().backward()
        sharded.step()
    for p in net.parameters():
        found = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(found, p.detach())
        assert all(torch.equal(p, other) for other in found)
    # A gradient that is not finite: nothing moves, and its parameter is named.
    before = [p.detach().clone() for p in net.parameters()]
    handle = net[2].bias.register_hook(lambda g: g * torch.nan if rank == 1 else g)
    net(mine(batch(3), rank).bfloat16()).float().square().mean().backward()
    handle.remove()
    finished = sharded.step()
    assert not finished.finite and finished.bad_parameters() == {"2.bias": [1]}
    assert all(map(torch.equal, before, net.parameters()))
    state = sharded.state_dict()
    state["2.bias"]["tensors"]["weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"2.bias is \[3\]"):
        sharded.load_state_dict(state)
    del state["2.bias"]
    with pytest.raises(ValueError, match=r"other parameters: 2\.bias"):
        sharded.load_state_dict(state)
    return True


def test_half_precision_and_what_is_not_finite():
    assert all_well(2, corners) == [True, True]
