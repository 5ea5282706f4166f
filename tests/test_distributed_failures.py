"""Ranks that die, stop, differ or give up: the error, its time, whom it names, and that nobody stays behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from distributed_ranks import all_well, free_port, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genfast
from genfast.dropin import ddp_hooks

TIMEOUT = 2.0


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def hooked(module, **options):
    state = genfast.HookState(module, timeout=TIMEOUT, **options)
    ddp = DistributedDataParallel(module)
    ddp.register_comm_hook(state, genfast.comm_hook)
    return ddp, state


def fall(rank, victim, how):
    ddp, _ = hooked(network())
    x = torch.randn(4, 6)
    for _ in range(2):  # DDP has collectives of its own until it has rebuilt its buckets
        ddp(x).sum().backward()
    if rank == victim:
        if how == "raise":
            raise KeyError("data")
        if how == "busy":
            time.sleep(60)
        os.kill(os.getpid(), how)
    begin = time.monotonic()
    try:
        ddp(x).sum().backward()
    except genfast.RankFailure as error:
        return error.ranks, str(error), time.monotonic() - begin
    return "nothing was raised"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, "busy"], ids=["killed", "stopped", "busy"])
@pytest.mark.parametrize("ranks, victim", [(3, 1), (3, 0)], ids=["member", "store"])
def test_a_rank_that_falls_is_named_in_time(ranks, victim, how):
    found = run(ranks, fall, victim, how, may_die=(victim,))
    for rank in set(range(ranks)) - {victim}:
        named, message, seconds = found[rank]
        assert named == (victim,) and f"rank {victim}" in message
        # The machine may be busy; what is promised is the timeout.
        assert seconds < TIMEOUT + 1, message


def fall_under_a_drop_in(rank):
    ddp = DistributedDataParallel(network())
    ddp.register_comm_hook(None, ddp_hooks.fp16_compress_hook)
    x = torch.randn(4, 6)
    for _ in range(2):
        ddp(x).sum().backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        ddp(x).sum().backward()
    except genfast.RankFailure as error:
        return error.ranks


def test_the_hooks_of_pytorch_name_a_rank_that_falls():
    assert run(2, fall_under_a_drop_in, may_die=(1,)) == [(1,), None]


def differ(rank, what):
    module = network(9 if what == "shape" and rank == 1 else 8)
    if what == "more" and rank == 1:
        module.append(nn.Linear(3, 3))
    return genfast.HookState(module, wire="int8" if what == "wire" and rank == 1 else "bf16", timeout=5)


@pytest.mark.parametrize(
    "what, message",
    [
        ("shape", r"number 0 is 0.weight \[9, 6\] float32 on rank 1, and 0.weight \[8, 6\] float32 on rank 0"),
        ("more", r"number 4, 3.weight \[3, 3\] float32, is on rank 1 only"),
        ("wire", "different options: DDP hook, wire int8.* on rank 1, and DDP hook, wire bf16"),
    ],
)
def test_ranks_that_differ_are_refused_with_the_first_difference(what, message):
    found = run(2, differ, what)
    assert str(found[0]) == str(found[1])
    with pytest.raises(ValueError, match=message):
        raise found[0]


def come(rank, absent):
    if rank == absent:
        time.sleep(60)
    begin = time.monotonic()
    try:
        genfast.HookState(network(), timeout=1.0)
    except genfast.RankFailure as error:
        return error.ranks, str(error), time.monotonic() - begin


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_makes_its_state_is_named(absent):
    found = run(3, come, absent, may_die=(absent,))
    for ranks, message, seconds in found[:absent] + found[absent + 1 :]:
        assert ranks == (absent,) and f"rank {absent} d" in message and seconds < 2


SCRIPT = """
import os, signal, sys, torch, torch.distributed as dist, genfast
dist.init_process_group("gloo")
net = torch.nn.Linear(3, 2)
reducer = genfast.GradientReducer(net, timeout=2)
for step in range(9):
    net.zero_grad()
    net(torch.ones(4, 3)).sum().backward()
    reducer.finish()
    if step == 3 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_script_ends_by_itself_when_a_rank_stops():
    """With the error of the rank on its last line, and no thread, connection or exit handler that holds it up."""
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    jobs = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env=common | {"RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    try:
        _, said = jobs[0].communicate(timeout=30)
        assert jobs[0].returncode == 1 and jobs[1].poll() is None
        assert b"RankFailure: rank 1 died or stopped" in said.splitlines()[-1]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def refuse(rank):
    found = []
    for make in (
        lambda: genfast.HookState(nn.Embedding(3, 4, sparse=True)),
        lambda: genfast.HookState(nn.Linear(2, 2).double()),
        lambda: genfast.HookState(nn.ReLU()),
        lambda: genfast.HookState(network(), wire="int4"),
        lambda: genfast.HookState(network(), timeout=0),
        lambda: genfast.HookState(network()).finish(),
    ):
        try:
            make()
        except (TypeError, ValueError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    # Sparse gradients that no module announces.
    weight = nn.Parameter(torch.randn(5, 3))

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = weight

        def forward(self, x):
            return nn.functional.embedding(x, self.table, sparse=True)

    ddp, _ = hooked(Rows())
    try:
        ddp(torch.tensor([1, 2])).sum().backward()
    except RuntimeError as error:
        found.append(str(error))
    return found


def test_refusals():
    (found,) = all_well(1, refuse)
    expected = [
        "TypeError: weight has sparse gradients",
        "TypeError: weight is torch.float64",
        "ValueError: module_or_named_parameters has no",
        "ValueError: wire must be one of",
        "ValueError: timeout must be",
        "RuntimeError: finish() follows",
    ]
    assert [text[: len(start)] for text, start in zip(found, expected)] == expected
    assert "table" in found[6] or "sparse" in found[6].lower()


def test_without_torch_distributed_set_up():
    with pytest.raises(RuntimeError, match="init_process_group"):
        genfast.HookState(network())
