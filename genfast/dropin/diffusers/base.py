"""What every fused scheduler shares: a plan of coefficients that follows the scheduler's state, and one call per step.

A drop-in class inherits from :class:`Fused` and from the scheduler it stands in for, in this order. It makes its
coefficient tables in ``set_timesteps`` (:meth:`Fused.make_rows`), looks them up in ``step`` and makes one call of
:func:`fused`, which answers ``NotImplemented`` for anything that the kernels do not take (gradients, tensors that must
broadcast, tensor subclasses, other devices): ``step`` then hands the call to the peer's own code. The
attributes that the peer keeps (``sigmas``, ``model_outputs``, ``step_index``, ...) stay live and mean what they mean
there, so the two kinds of step can be mixed within one loop.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from genfast.dropin.tensors import plain, promoted
from genfast.ops.sampler_step import hot_path, object_path, plain_path, sampler_step
from genfast.step_table import StepTable

INTEGERS = (torch.int64, torch.int32)


def is_level(timestep) -> bool:
    """Whether a timestep may index a schedule of real numbers; whole numbers are refused by these peers."""
    if isinstance(timestep, Tensor):
        return timestep.dtype not in INTEGERS
    return not isinstance(timestep, int)


class Rows(NamedTuple):
    """A table and the rows of it that may run."""

    table: StepTable
    whole: bool  # every row may run
    usable: tuple[bool, ...]  # the rows that may: False where the peer's own arithmetic is not finite
    draws: tuple[bool, ...] | None  # where the peer draws noise, be its weight zero or not; None: at every row


def rows(coefficients, *, usable=True, draws=None, **parts) -> Rows:
    """A :class:`Rows` of the arguments of :class:`StepTable`; rows that are not finite are left to the peer.

    Args:
        usable: [rows], False for rows that have no fused form.
        draws: [rows], where the peer draws noise (all of them by default).
    """
    coefficients = np.atleast_2d(np.asarray(coefficients, np.float64))
    count = len(coefficients)
    given = {name: np.asarray(value, np.float64) for name, value in parts.items() if value is not None}
    good = np.isfinite(coefficients).all(1) & usable
    for name, value in given.items():
        finite = np.isfinite(value)
        if name in ("second", "to_x0", "log_std"):
            finite = np.atleast_2d(finite).all(1)
        good = good & np.broadcast_to(finite, (count,))
    if not good.all():
        coefficients = np.where(good[:, None], coefficients, 0.0)
        for name, value in given.items():
            matrix = name in ("second", "to_x0", "log_std")
            given[name] = np.where(good[:, None] if matrix else good, value, 0.0)
    table = StepTable(coefficients, **given)
    table.describe_to_host()
    return Rows(table, bool(good.all()), tuple(good.tolist()), None if draws is None else tuple(draws.tolist()))


class Plan:
    """The coefficients of one schedule, and what they were made from.

    Attributes:
        tables: one :class:`Rows` per setting that a call of ``step`` chooses (eta, churn, ...), or None where the
            setting has no fused form.
        clip, threshold, possible: see :func:`limits`.
        plain_table: the table of the default setting, if every row of it runs, draws nothing and is not thresholded.
        Anything else that a scheduler's ``build`` wants to keep.
    """

    differences: Tensor | None = None

    @functools.cached_property
    def dt(self) -> list[Tensor]:
        """``differences``, [steps], as 0-d tensors: the step sizes that some peers keep. Made at the first step."""
        return list(self.differences)

    MOST_TABLES = 64  # a caller that changes eta at every step must not fill the memory
    plain_table: StepTable | None = None

    def __init__(self, **extra: Any):
        self.tables: dict[Any, Rows | None] = {}
        self.__dict__.update(extra)

    def rows(self, key, make) -> Rows | None:
        """The table for ``key``, made by ``make(plan, *key)`` at its first use; None where there is no fused form."""
        if not self.possible:
            return None
        try:
            return self.tables[key]
        except KeyError:
            if len(self.tables) >= self.MOST_TABLES:
                self.tables.clear()
            made = self.tables[key] = make(self, *key)
            return made
        except TypeError:  # a key that cannot be hashed
            return None


class DropIn:
    """What every drop-in scheduler is: saved as the peer's own, and able to read a timestep without asking the device.

    Attributes:
        noise_seed: None, or the seed of in-kernel noise (see ``genfast.random``) for every step that draws; noise is
            then drawn inside the kernel and ``step``'s generator is not used.
    """

    noise_seed: int | Tensor | None = None
    _index: HostTimesteps | None = None
    _unsaved: tuple[str, ...] = ("_index",)

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.adopt()
        return self

    def adopt(self) -> None:
        """Let pipelines save this scheduler as the peer's: they write down the module that an instance names."""
        self.__dict__["__module__"] = peer_class(type(self)).__module__

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in self._unsaved}

    # --- the position in the schedule, without `nonzero` or a copy to the host -------------------------------------

    def host_timestep(self, timestep):
        """The number in a timestep: a number, or a tensor whose memory is that of one of ``timesteps``; else None.

        A loop over ``timesteps`` hands out views of it, so the address tells the position without a copy to the host.
        """
        if type(timestep) is not Tensor:
            return None if isinstance(timestep, Tensor) else timestep
        known = HostTimesteps.of(self)
        place = known.place(timestep)
        if place is not None:
            return known.values[place]
        return timestep.item() if timestep.is_cpu and timestep.numel() == 1 else None


class Fused(DropIn):
    """Mixin for a scheduler of diffusers whose ``step`` runs as one kernel.

    Subclasses set ``watched``, the names of the attributes that the tables are computed from, tensors first,
    ``default_key``, the setting of a plain call of ``step``, and write ``make_rows`` and ``build``. A table is made in
    ``set_timesteps``, and again when one of the watched attributes is replaced, when the first is changed in place, and
    when the configuration changes; a schedule that was seen before finds its tables again.
    """

    watched: tuple[str, ...] = ("sigmas",)
    default_key: tuple = ()
    _plan: Plan | None = None
    _unsaved = ("_plan", "_index", "_known_plans")

    MOST_PLANS = 8

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        peer = peer_class(cls)
        if peer is None:  # a mixin between this one and the classes
            return
        for name in cls.watched:
            setattr(cls, name, Watched(name))
        cls.num_inference_steps = WatchedCount("num_inference_steps")
        if "set_timesteps" not in vars(cls) and hasattr(peer, "set_timesteps"):
            cls.set_timesteps = _planning(peer.set_timesteps)
        if "index_for_timestep" not in vars(cls) and hasattr(peer, "index_for_timestep"):
            cls.index_for_timestep = _finding_index(peer.index_for_timestep)

    def build(self) -> Plan:
        """A new :class:`Plan` of the present schedule, with what the steps need beside tables."""
        return Plan()

    def make_rows(self, plan: Plan, *key) -> Rows | None:
        """The table for one setting of ``step``; None if it has no fused form."""
        raise NotImplementedError

    def planned_keys(self, plan: Plan) -> Iterable[tuple]:
        """The settings that plain calls of ``step`` go through in a run: their tables are made in ``set_timesteps``."""
        return (self.default_key,)

    def current_plan(self) -> Plan:
        """The plan of the present schedule, which is made anew if anything it was made from has changed."""
        plan = self._plan
        if plan is None or plan.config is not self._internal_dict or plan.version != plan.source._version:
            return self.new_plan()
        return plan

    def current_rows(self, *key) -> Rows | None:
        """The table of the present schedule for one setting of ``step``."""
        return self.current_plan().rows(key, self.make_rows)

    def new_plan(self) -> Plan:
        attributes = self.__dict__
        values = [attributes.get(name) for name in (*self.watched, "num_inference_steps")]
        config = self._internal_dict
        key = tuple(map(_content, values))
        known = attributes.setdefault("_known_plans", {})
        plan = known.pop(key, None)
        if plan is None or plan.config is not config:
            if isinstance(values[0], Tensor):
                plan = self.build()
                plan.clip, plan.threshold, plan.possible = limits(config)
            else:
                plan = Plan(clip=None, threshold=None, possible=False)
            plan.config = config
        known[key] = plan
        if len(known) > self.MOST_PLANS:
            del known[next(iter(known))]
        plan.version = version_of(values[0])
        plan.source = values[0] if plan.version is not None else _unversioned
        self._plan = plan
        return plan


class Watched:
    """An attribute whose replacement makes the plan void. Reading it is not slower: there is no ``__get__``."""

    def __init__(self, name: str):
        self.name = name

    def __set__(self, scheduler, value):
        attributes = scheduler.__dict__
        if attributes.get(self.name, self) is not value:
            attributes[self.name] = value
            scheduler._plan = None


class WatchedCount(Watched):
    """The same for one that some peers do not set before ``set_timesteps``: None until then."""

    def __get__(self, scheduler, owner=None):
        return self if scheduler is None else scheduler.__dict__.get(self.name)


class _unversioned:
    _version = None


def _content(value):
    """What identifies a watched value: the numbers of a tensor."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float, bool, type(None))) else id(value)
    return value.dtype, value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _planning(peer_set_timesteps):
    @functools.wraps(peer_set_timesteps)  # pipelines look at the signature
    def set_timesteps(self, *args, **kwargs):
        peer_set_timesteps(self, *args, **kwargs)
        plan = self.new_plan()
        for key in self.planned_keys(plan):
            rows = plan.rows(key, self.make_rows)
            if rows is not None and self.timesteps.is_cuda:
                rows.table.to(self.timesteps.device)  # now, for a step may be captured in a CUDA graph
        rows = plan.tables.get(self.default_key)
        if rows is not None and rows.whole and not rows.table.has_noise and plan.threshold is None:
            plan.plain_table = rows.table

    return set_timesteps


def _finding_index(peer_index_for_timestep):
    @functools.wraps(peer_index_for_timestep)
    def index_for_timestep(self, timestep, schedule_timesteps=None):
        if schedule_timesteps is None or schedule_timesteps is self.timesteps:
            value = self.host_timestep(timestep)
            if value is not None and value == value:  # the peer finds no NaN
                places = HostTimesteps.of(self).places.get(value)
                if places is not None:
                    # A schedule that visits a level twice starts at the second visit: an image-to-image run that
                    # enters there must not take the first half of a step it has not begun.
                    return places[1] if len(places) > 1 else places[0]
        if schedule_timesteps is None:
            return peer_index_for_timestep(self, timestep)
        return peer_index_for_timestep(self, timestep, schedule_timesteps)

    return index_for_timestep


def peer_class(cls: type) -> type | None:
    """The class of diffusers that a drop-in class stands in for."""
    return next((base for base in cls.__mro__ if base.__module__.startswith("diffusers.")), None)


class HostTimesteps:
    """The values of a ``timesteps`` tensor, every position of each value, and where in memory they lie."""

    def __init__(self, timesteps: Tensor):
        self.timesteps, self.version = timesteps, version_of(timesteps)
        self.source = timesteps if self.version is not None else _unversioned
        self.values = timesteps.tolist()
        self.places: dict[float, list[int]] = {}
        for i, value in enumerate(self.values):
            self.places.setdefault(value, []).append(i)
        addressable = timesteps.is_contiguous() and timesteps.dim() == 1
        self.dtype = timesteps.dtype if addressable else None
        self.address, self.size = timesteps.data_ptr(), timesteps.element_size()

    @staticmethod
    def of(scheduler) -> HostTimesteps:
        """Those of a scheduler, read once per schedule."""
        known = scheduler._index
        timesteps = scheduler.timesteps
        if known is None or known.timesteps is not timesteps or known.version != known.source._version:
            known = scheduler._index = HostTimesteps(timesteps)
        return known

    def place(self, timestep: Tensor) -> int | None:
        """The position of a 0-d view of ``timesteps``; None for any other tensor."""
        if timestep.dtype is not self.dtype or timestep.dim():
            return None
        place, rest = divmod(timestep.data_ptr() - self.address, self.size)
        return place if not rest and 0 <= place < len(self.values) else None


def version_of(t) -> int | None:
    """The counter of in-place changes of a tensor; None where there is none (inference mode, a list)."""
    return t._version if isinstance(t, Tensor) and not t.is_inference() else None


def fused(
    inputs: tuple,
    rows: Rows | None,
    row: int,
    dtype: torch.dtype,
    second_dtype: torch.dtype | None = None,
    clip=None,
    threshold=None,
    log_variance: Tensor | None = None,
    draw=None,
    seed: int | Tensor | None = None,
):
    """``sampler_step`` for a scheduler's step: the result, or ``NotImplemented`` if the peer must do it.

    Args:
        inputs: the state first, then the model's output, then history.
        rows, row: the coefficients; no rows, or a row that is missing or not usable, is left to the peer.
        dtype, second_dtype: what the peer returns for these inputs; ``second_dtype`` is ``dtype`` by default.
        draw: makes the peer's noise; called only when the row draws, no seed is in force and the step will run fused.
        The rest: as in :func:`genfast.sampler_step`.
    """
    if rows is None:
        return NotImplemented
    if not rows.whole and not (0 <= row < len(rows.usable) and rows.usable[row]):
        return NotImplemented
    table = rows.table
    same = dtype is inputs[0].dtype and (second_dtype is None or second_dtype is dtype) and not is_compiling()
    if same and draw is None and threshold is None and log_variance is None:
        result = plain_path.run(table, row, clip, *inputs)
        if result is not NotImplemented:
            return result
    if not 0 <= row < table.rows:
        return NotImplemented
    noise = None
    if draw is None or not (rows.draws is None or rows.draws[row]):
        seed = None
    elif seed is None:
        if not plain(*inputs):
            return NotImplemented
        noise = draw()
    if not table.has_noise:  # the peer draws, and multiplies with zero
        noise = seed = None
    if same:
        result = hot_path.run(
            inputs,
            table,
            row,
            None,
            None,
            0.0,
            clip,
            threshold,
            log_variance,
            noise,
            None,
            seed,
            0,
            0,
            None,
            None,
            None,
        )
        if result is not NotImplemented:
            return result
    if not plain(*inputs, *(t for t in (log_variance, noise) if t is not None)) or (
        threshold is not None and inputs[0].dim() < 2
    ):
        return NotImplemented
    second = None
    if table.has_second and second_dtype is not None and second_dtype is not dtype:
        second = torch.empty_like(inputs[0], dtype=second_dtype)
    return sampler_step(
        inputs,
        table.to(inputs[0].device),
        step=row,
        clip=clip,
        threshold=threshold,
        log_variance=log_variance,
        noise=noise,
        seed=seed,
        dtype=dtype,
        second_out=second,
    )


def batched(inputs: tuple, rows: Rows | None, timesteps: Tensor, clip=None, threshold=None):
    """A step of every sample by a row of its own, ``timesteps`` [B]; ``NotImplemented`` if the peer must do it.

    The result is float32 for half-precision inputs: the peers' coefficients have a batch dimension there, so that they
    take part in the promotion of dtypes.
    """
    like = inputs[0]
    if rows is None or not rows.whole or not plain(*inputs) or like.dim() == 0:
        return NotImplemented
    if timesteps.dtype not in INTEGERS or timesteps.shape != like.shape[:1] or timesteps.device != like.device:
        return NotImplemented
    if threshold is not None and like.dim() < 2:
        return NotImplemented
    if timesteps.is_cpu and ((timesteps < 0) | (timesteps >= len(rows.usable))).any():
        return NotImplemented
    dtype = torch.promote_types(promoted(*inputs), torch.float32)
    table = rows.table.to(like.device)
    second = {} if not table.has_second or dtype is like.dtype else dict(second_out=torch.empty_like(like, dtype=dtype))
    return sampler_step(inputs, table, step=timesteps, clip=clip, threshold=threshold, dtype=dtype, **second)


def plain_object(output, plan: Plan, row: int, sample, model_output):
    """The peer's output object of a plain step of two tensors of one dtype; ``NotImplemented`` for anything else.

    For the schedulers whose step takes no longer than a few operations in the peer, where the host's share decides.
    """
    if plan.plain_table is None or is_compiling():
        return NotImplemented
    return object_path.run(output.spec, plan.plain_table, row, plan.clip, sample, model_output)


def check_seed(scheduler: DropIn, generator, seed):
    """The seed in force for in-kernel noise, or None for the peer's draws."""
    if seed is None:
        return scheduler.noise_seed
    if generator is not None:
        raise ValueError("seed and generator exclude each other: give one source of noise")
    return seed


def needs_generator(seed) -> None:
    """Called before a step is left to the peer's code, which cannot draw in-kernel noise."""
    if seed is not None:
        raise ValueError(
            "in-kernel noise (seed=) needs a step that runs fused: dense float tensors of one shape on cpu or cuda, "
            "without gradients, and a configuration that has a fused form; use generator= here"
        )


def levels(t: Tensor) -> Tensor:
    """A schedule tensor on the host in float32, where the peers do their scalar arithmetic.

    Coefficients are made from it with the peer's own operators and in its order (``** 0.5`` is not ``sqrt`` to the
    last bit, and NumPy's logarithm is not torch's): one sequence of roundings for the whole schedule at once. What a
    row combines from them is float64.
    """
    return t.detach().to("cpu", torch.float32)


# --- what several schedulers compute alike ---------------------------------------------------------------------------


def limits(config) -> tuple[tuple | None, tuple | None, bool]:
    """(clip, threshold, whether the kernels can do it) of a configuration with the usual clipping options."""
    if config.get("thresholding"):
        ratio, most = config.dynamic_thresholding_ratio, config.sample_max_value
        return None, (ratio, most), 0 <= ratio <= 1 and 1 <= most < float("inf")
    if config.get("clip_sample"):
        most = config.get("clip_sample_range", 1.0)
        return (-float(most), float(most)), None, 0 <= most < float("inf")
    return None, None, True


def x0_eps_columns(prediction: str, alpha_bar: Tensor, root=lambda v: v**0.5):
    """(k, m, e, f) of x0 = k x + m output and eps = e x + f output, float64 [rows]; None for an unknown prediction.

    As in the peers, eps comes from x0 where the model predicts x0. ``root`` is how the peer writes its square roots.
    """
    sa, sb = root(alpha_bar).double(), root(1 - alpha_bar).double()
    zero, one = torch.zeros_like(sa), torch.ones_like(sa)
    if prediction == "epsilon":
        return 1 / sa, -sb / sa, zero, one
    if prediction == "sample":
        return zero, one, 1 / sb, -sa / sb
    if prediction == "v_prediction":
        return sa, -sb, sb, sa
    return None


def columns(*parts: Tensor) -> Tensor:
    """float64 [rows, columns] of one tensor [rows] per column."""
    return torch.stack([part.double() for part in parts], 1)


# --- output objects --------------------------------------------------------------------------------------------------

_set_item = OrderedDict.__setitem__


def output_maker(cls):
    """A function that makes a peer's output object of tensors; its ``spec`` is what :data:`object_path` wants.

    The result is what ``cls(...)`` gives: an ordered dictionary whose items are attributes too. The peer's constructor
    finds that out with ``dataclasses.fields`` at every call, which costs as much as a small step.
    """
    names = tuple(f.name for f in fields(cls))
    new = cls.__new__

    def make(*values):
        output = new(cls)
        attributes = output.__dict__
        for name, value in zip(names, values):
            _set_item(output, name, value)
            attributes[name] = value
        return output

    make.spec = (cls, *names)
    return make
