"""Runs a function on some ranks: processes of this machine, joined by Gloo, forked from a server that knows torch."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "genfast", "torch._dynamo"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(ranks: int, function, *arguments, timeout: float = 30, may_die: tuple[int, ...] = ()) -> list:
    """What ``function(rank, *arguments)`` returned on every rank; an exception that it raised is returned too.

    Ranks in ``may_die`` give None, and are killed once the others have ended.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            CONTEXT.Process(target=_rank, args=(r, ranks, port, folder, timeout, function, arguments), daemon=True)
            for r in range(ranks)
        ]
        for job in jobs:
            job.start()
        try:
            end = time.monotonic() + timeout
            for rank, job in enumerate(jobs):
                if rank not in may_die:
                    job.join(max(0.0, end - time.monotonic()))
                    assert job.exitcode is not None, f"rank {rank} had not ended after {timeout} s"
        finally:
            for job in jobs:
                job.kill()
                job.join()
        found = []
        for rank in range(ranks):
            file = Path(folder, str(rank))
            assert rank in may_die or file.exists(), f"rank {rank} ended with {jobs[rank].exitcode} and said nothing"
            found.append(pickle.loads(file.read_bytes()) if file.exists() else None)
        return found


def all_well(ranks: int, function, *arguments, **options) -> list:
    """:func:`run`, raising what a rank raised."""
    found = run(ranks, function, *arguments, **options)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def _rank(rank: int, ranks: int, port: int, folder: str, timeout: float, function, arguments) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * timeout)  # says where a rank hangs
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, timeout=timedelta(seconds=30)
    )
    try:
        result = function(rank, *arguments)
    except Exception as error:
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}") if hasattr(error, "add_note") else None
        result = error
    # Through a file and as numbers, so that nothing is held by a process that has ended.
    Path(folder, f"{rank}.part").write_bytes(pickle.dumps(result))
    Path(folder, f"{rank}.part").rename(Path(folder, str(rank)))
    os._exit(0) if isinstance(result, Exception) else dist.destroy_process_group()
