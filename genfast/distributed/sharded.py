"""ZeRO-1: every rank reduces, and steps, its share of the parameters, and all gather the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from genfast._registry import export
from genfast.distributed.buckets import Buckets
from genfast.distributed.engine import Engine
from genfast.distributed.finished import Finished
from genfast.distributed.readiness import Readiness, grouped
from genfast.distributed.reducer import FIRST_BUCKET
from genfast.gradient_wire import BucketLayout
from genfast.ops.gradient_bucket import unpack_gradients


class Shard:
    """One bucket of parameters: all of it in ``flat``, in their dtype, and this rank's chunk in float32."""

    def __init__(self, parameters: list[Tensor], layout: BucketLayout, rank: int):
        self.parameters, self.layout, self.rank = parameters, layout, rank
        first = parameters[0]
        self.flat = torch.zeros(layout.ranks * layout.chunk, dtype=first.dtype, device=first.device)
        for p, part in zip(parameters, self.parts(self.flat)):
            part.copy_(p.detach())
            p.data = part
        self.weight = nn.Parameter(self.mine(self.flat).to(torch.float32, copy=True))
        self.weight.grad = torch.zeros_like(self.weight)

    def mine(self, flat: Tensor) -> Tensor:
        """This rank's chunk of something flat."""
        return flat[self.rank * self.layout.chunk : (self.rank + 1) * self.layout.chunk]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """What is each parameter's of something flat, in its shape."""
        places = zip(self.parameters, self.layout.offsets, self.layout.numels)
        return [flat[o : o + n].view(p.shape) for p, o, n in places]


@export("distributed")
class ShardedReducer:
    """Reduces gradients during backward, each rank its share, and steps a sharded optimizer (ZeRO-1).

        sharded = genfast.ShardedReducer(model, torch.optim.AdamW, lr=1e-3, max_norm=1.0)
        ...
        loss.backward()
        sharded.step()

    Each rank holds the optimizer's state, and float32 weights, of one part in ``ranks``. Gradients are summed in
    float32 from the wire and are not rounded again. Parameters are sent in their dtype. ``step`` leaves no gradients
    behind.

    Args:
        module_or_named_parameters, wire, process_group, error_feedback, average, max_norm, timeout: as of
            :class:`HookState`. The parameters become views of flat buffers, contiguous.
        optimizer_class: of ``torch.optim``, one that treats every number by itself (SGD, Adam, AdamW, ...); not one
            that looks at whole matrices or norms of parameters.
        options_of: (name, parameter) to a dict of options of the optimizer for it, as a parameter group has.
        bucket_bytes: of gradients that leave together.
        options: of the optimizer.

    Raises:
        TypeError, ValueError, RankFailure: as of :class:`HookState`.

    Source: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054).
    """

    def __init__(
        self,
        module_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        optimizer_class: type[torch.optim.Optimizer],
        *,
        wire: str = "bf16",
        options_of: Callable[[str, Tensor], dict[str, Any]] | None = None,
        bucket_bytes: int = 25 * 2**20,
        process_group=None,
        error_feedback: bool | None = None,
        average: bool = True,
        max_norm: float | None = None,
        timeout: float = 600.0,
        **options,
    ):
        self.engine = engine = Engine(
            module_or_named_parameters, wire, process_group, error_feedback, average, None, max_norm, timeout,
            f"ShardedReducer of {optimizer_class.__name__}, bucket_bytes {bucket_bytes}",
        )  # fmt: skip
        names, parameters = engine.parameters.names, engine.parameters.parameters
        own = [options_of(name, p) if options_of else {} for name, p in zip(names, parameters)]
        kind = lambda k: (parameters[k].dtype, repr(sorted(own[k].items())))  # noqa: E731
        size = lambda k: parameters[k].numel() * parameters[k].element_size()  # noqa: E731
        order = sorted(range(len(parameters)), key=lambda k: (str(kind(k)), -k))
        groups = grouped(order, size, (min(FIRST_BUCKET, bucket_bytes), bucket_bytes), kind)
        exchange = engine.exchange
        # The first rounding's error is fed back; that of a chunk's sum is undone in `_unpacked`.
        engine.buckets = Buckets(
            engine.numels, exchange.ranks, exchange.rank, wire, exchange.device, engine.error_feedback, direct=False
        )
        self.shards: dict[tuple[int, ...], Shard] = {}
        for indices in groups:
            bucket = engine.buckets.get(indices)
            if exchange.ranks > 1:
                bucket.sum_residual = torch.zeros(bucket.layout.chunk, device=exchange.device)
            self.shards[indices] = Shard([parameters[k] for k in indices], bucket.layout, exchange.rank)
        self.optimizer = optimizer_class(
            [{"params": [s.weight], **own[indices[0]]} for indices, s in self.shards.items()], **options
        )
        self._readiness = Readiness(engine.parameters, groups, engine.start, self._launch)

    def _launch(self, indices: tuple[int, ...], gradients: list[Tensor]) -> None:
        engine = self.engine
        bucket = engine.buckets.get(indices)
        weight = self.shards[indices].weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        what = f"the gradients from {engine.parameters.names[indices[0]]} on"
        engine.running[indices] = engine.exchange.begin(
            bucket, gradients, 1.0, lambda: _unpacked(bucket, weight.grad), what, engine.average, gather=False
        )

    def no_sync(self):
        """Backward passes in this context only accumulate."""
        return self._readiness.paused()

    def step(self) -> Finished:
        """After ``backward``: waits for the gradients, clips them, steps, and gathers the parameters.

        A parameter without gradient counts as zeros. A step whose gradients are not finite changes nothing, on any
        rank.
        """
        engine, exchange = self.engine, self.engine.exchange
        self._readiness.complete()
        engine.settle()
        square = torch.stack([s.weight.grad.double().square().sum() for s in self.shards.values()]).sum()
        norm = exchange.gather(square.reshape(1), "the norm of the gradients").sum().sqrt()
        flags = torch.cat([p.finite for p in engine.running.values()])
        order = [k for indices in engine.running for k in indices]
        finished = Finished(
            norm.float(), norm.isfinite(), engine.max_norm, False, lambda: engine.bad(order, flags, flags)
        )
        finished.apply_to(self.optimizer)
        self.optimizer.step()
        self._gather_parameters()
        for p in engine.parameters.parameters:
            p.grad = None
        return finished

    def _gather_parameters(self) -> None:
        for s in self.shards.values():
            s.mine(s.flat).copy_(s.weight.detach())
            self.engine.exchange.gather_rows(s.flat, "the parameters")

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state of every whole parameter, by name, with float32 weights: the same on all ranks, which
        must all call it, and for any number of them to load."""
        found: dict[str, Any] = {}
        for (indices, s), group in zip(self.shards.items(), self.optimizer.param_groups):
            options = {key: value for key, value in group.items() if key != "params"}
            whole = {"weight": self._whole(s, s.weight.detach())}
            plain = {}
            for key, value in self.optimizer.state[s.weight].items():
                if isinstance(value, Tensor) and value.shape == s.weight.shape:
                    whole[key] = self._whole(s, value)
                else:
                    plain[key] = value.clone() if isinstance(value, Tensor) else value
            for j, k in enumerate(indices):
                tensors = {key: parts[j].clone() for key, parts in whole.items()}
                found[self.engine.parameters.names[k]] = {"tensors": tensors, "plain": plain, "options": options}
        return found

    def _whole(self, s: Shard, chunk: Tensor) -> list[Tensor]:
        return s.parts(self.engine.exchange.gather(chunk, "the optimizer's state").view(-1))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, on any number of ranks; the module's parameters are set, too.

        Raises:
            ValueError: names or shapes of parameters are others; nothing is then changed.
        """
        names, parameters = self.engine.parameters.names, self.engine.parameters.parameters
        if set(state) != set(names):
            odd = sorted(set(state) ^ set(names))
            raise ValueError(f"state has other parameters: {', '.join(odd[:5])}")
        for name, p in zip(names, parameters):
            if state[name]["tensors"]["weight"].shape != p.shape:
                shape = list(state[name]["tensors"]["weight"].shape)
                raise ValueError(f"{name} is {shape} in state; expected {list(p.shape)}")
        for (indices, s), group in zip(self.shards.items(), self.optimizer.param_groups):
            given = [state[names[k]] for k in indices]
            group.update(given[0]["options"])
            loaded = {}
            for key in given[0]["tensors"]:
                flat = torch.zeros(s.flat.numel(), device=s.flat.device)
                for part, one in zip(s.parts(flat), given):
                    part.copy_(one["tensors"][key])
                loaded[key] = s.mine(flat).clone()
            s.weight.data.copy_(loaded.pop("weight"))
            plain = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given[0]["plain"].items()}
            self.optimizer.state[s.weight] = {**loaded, **plain}
        self._gather_parameters()

    def close(self) -> None:
        """End the thread that shows the other ranks that this one lives; also done when the process ends."""
        self.engine.close()


def _unpacked(bucket, to: Tensor) -> None:
    """The sum of this rank's chunk: its rounded value, and what the rounding has just left out."""
    layout = BucketLayout([bucket.layout.chunk], 1, bucket.layout.wire)
    unpack_gradients(bucket.sum[None], layout, [to])
    if bucket.sum_residual is not None:
        to += bucket.sum_residual
        bucket.sum_residual.zero_()
