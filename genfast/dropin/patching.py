"""``patch``, ``unpatch`` and ``accelerate``: our code in the place of an installed peer's."""

from __future__ import annotations

import copy
import importlib
import sys
from importlib import metadata

from genfast._registry import export


class Peer:
    """A project that takes our code, and the releases for which ours was written.

    Args:
        package: the import name, and the key of :func:`patch`.
        distribution: the name on PyPI.
        releases: beginnings of the version numbers that ours reproduce.
    """

    def __init__(self, package: str, distribution: str, releases: tuple[str, ...]):
        self.package, self.distribution, self.releases = package, distribution, releases

    def check(self) -> None:
        """Raise ImportError unless a release that ours reproduce is installed."""
        try:
            version = metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            raise ImportError(
                f"{self.distribution} is not installed; the drop-in is written for release {self.releases_named()} "
                f"(pip install {self.distribution!r})"
            ) from None
        if not any(version == r or version.startswith(r + ".") for r in self.releases):
            raise ImportError(
                f"{self.distribution} {version} is installed, but genfast's drop-in is written for and tested against "
                f"release {self.releases_named()}: what another release does is not known, so nothing was swapped"
            )

    def releases_named(self) -> str:
        return " or ".join(self.releases)

    def drop_in(self):
        """Our module for it."""
        self.check()
        return importlib.import_module(f"genfast.dropin.{self.package}")


class Registry(Peer):
    """A project that offers a registry: our module for it has ``register``, which names what it added, and
    ``unregister``."""

    def put(self) -> tuple[str, ...]:
        return self.drop_in().register()

    def take_back(self) -> None:
        self.drop_in().unregister()


class Names(Peer):
    """A project whose names are swapped.

    Args:
        homes: the modules that define and hand on the names.
    """

    def __init__(self, package: str, distribution: str, releases: tuple[str, ...], homes: tuple[str, ...]):
        super().__init__(package, distribution, releases)
        self.homes = homes

    def put(self) -> tuple[str, ...]:
        pairs = self.pairs()
        _swap(self, pairs)
        return tuple(ours.__name__ for _, ours in pairs)

    def take_back(self) -> None:
        _swap(self, [(ours, theirs) for theirs, ours in self.pairs()])

    def pairs(self) -> list[tuple[object, object]]:
        """(theirs, ours) for every name that can be swapped."""
        return self.drop_in().replacements()

    def modules(self):
        return [m for name, m in list(sys.modules.items()) if (name + ".").startswith(self.package + ".") and m]


PEERS = {
    "diffusers": Names("diffusers", "diffusers", ("0.42",), ("diffusers", "diffusers.schedulers")),
    "k_diffusion": Names("k_diffusion", "k-diffusion", ("0.1.1",), ("k_diffusion.sampling",)),
    "transformers": Registry("transformers", "transformers", ("5.23",)),
    "vector_quantize_pytorch": Names(
        "vector_quantize_pytorch",
        "vector-quantize-pytorch",
        ("1.32.0",),
        ("vector_quantize_pytorch.finite_scalar_quantization", "vector_quantize_pytorch.lookup_free_quantization"),
    ),
}


def _peer(name: str) -> Peer:
    key = str(name).replace("-", "_")
    if key not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}; got {name!r}")
    return PEERS[key]


def _swap(peer: Names, pairs) -> int:
    """Replace the first of each pair by the second wherever a module of the peer holds it; how many places."""
    wanted = {id(old): (old, new) for old, new in pairs}
    for home in peer.homes:  # lazy modules hold a name only once someone has asked for it
        module = importlib.import_module(home)
        for old, _ in pairs:
            getattr(module, old.__name__, None)
    places = 0
    for module in peer.modules():
        for name, value in list(vars(module).items()):
            old, new = wanted.get(id(value), (None, None))
            if old is not None:
                setattr(module, name, new)
                places += 1
    return places


class Patched:
    """What :func:`patch` returns: also a context manager that calls :func:`unpatch` at the end of a ``with`` block."""

    def __init__(self, peer: str, names: tuple[str, ...]):
        self.peer, self.names = peer, names

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *exception) -> None:
        unpatch(self.peer)

    def __repr__(self) -> str:
        return f"Patched({self.peer!r}, {len(self.names)} names: {', '.join(self.names)})"


@export("dropin")
def patch(peer: str) -> Patched:
    """Put genfast's fused code in the place of an installed peer's, for the code that uses the peer.

    After ``genfast.patch("diffusers")``, ``diffusers.DDIMScheduler`` and its likes are genfast's classes, subclasses of
    the peer's own; after ``genfast.patch("k_diffusion")``, ``k_diffusion.sampling.sample_euler`` and its likes are
    genfast's functions. Every module of the peer that is loaded, or loaded later, gets them. Call it before the code
    that says ``from diffusers import DDIMScheduler``; pipelines that exist already are for :func:`accelerate`.

    After ``genfast.patch("transformers")``, models take ``attn_implementation="genfast"``: their attention is
    :func:`attention`, their masks are structures (``genfast/dropin/transformers.py``).

    After ``genfast.patch("vector_quantize_pytorch")``, its quantisers are genfast's classes, subclasses of the peer's;
    models that exist already are for ``genfast.dropin.vector_quantize_pytorch.adopt``.

    Calling it twice does nothing more. ``with genfast.patch(...):`` undoes it at the end of the block.

    Args:
        peer: ``"diffusers"``, ``"k_diffusion"``, ``"transformers"`` or ``"vector_quantize_pytorch"``.

    Raises:
        ValueError: an unknown peer.
        ImportError: the peer is not installed, or is a release that the drop-in was not written for.
    """
    known = _peer(peer)
    return Patched(known.package, known.put())


@export("dropin")
def unpatch(peer: str) -> None:
    """Give a peer its own code back; objects made in between stay what they are.

    Args:
        peer: as for :func:`patch`.

    Raises:
        ValueError: an unknown peer.
    """
    known = _peer(peer)
    if f"genfast.dropin.{known.package}" in sys.modules:
        known.take_back()


@export("dropin")
def accelerate(pipe, *, seed=None):
    """Swap the scheduler of one diffusers pipeline for genfast's fused class of the same name, in place.

    The new scheduler has the configuration and the present state of the old one, which is left as it is. A pipeline
    with several schedulers gets all of them swapped.

    Args:
        pipe: a pipeline, or anything with a ``scheduler`` attribute; or a scheduler.
        seed: None for the peer's random draws (same generator, same sample), or an int: noise of stochastic samplers
            is then drawn inside the kernel, from this seed (``noise_seed`` of the scheduler), whatever generator the
            pipeline passes on to ``step``.

    Returns:
        ``pipe``; for a scheduler, the new one.

    Raises:
        TypeError: there is no scheduler in ``pipe``.
        ValueError: the scheduler has no fused class; the message names those that do.
        ImportError: as for :func:`patch`.
    """
    classes = dict(PEERS["diffusers"].pairs())
    from diffusers import SchedulerMixin

    if isinstance(pipe, SchedulerMixin):
        return _accelerated(pipe, classes, seed)
    parts = getattr(pipe, "components", None)
    parts = parts if isinstance(parts, dict) else {"scheduler": getattr(pipe, "scheduler", None)}
    found = {name: part for name, part in parts.items() if isinstance(part, SchedulerMixin)}
    if not found:
        raise TypeError(f"pipe must be a diffusers pipeline or scheduler; {type(pipe).__name__} has no scheduler")
    swapped = {name: _accelerated(part, classes, seed) for name, part in found.items()}
    for name, scheduler in swapped.items():
        setattr(pipe, name, scheduler)
    return pipe


def _accelerated(scheduler, classes, seed):
    kind = type(scheduler)
    ours = kind if kind in classes.values() else classes.get(kind)
    if ours is None:
        names = ", ".join(sorted(c.__name__ for c in classes))
        raise ValueError(f"{kind.__module__}.{kind.__qualname__} has no fused class; there is one for {names}")
    fused = copy.deepcopy(scheduler)
    if ours is not kind:
        fused.__class__ = ours
        fused.adopt()
    if seed is not None:
        fused.noise_seed = seed
    return fused
