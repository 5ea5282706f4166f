"""The packages that genfast is compared with: imported where they are installed, named where they are not."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from types import ModuleType


class Missing(Exception):
    """A peer that cannot run here; the message says which, and why."""


@functools.cache
def version(package: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{package} is not installed") from None


def package(name: str, module: str | None = None) -> ModuleType:
    """The imported ``module`` (by default ``name``) of a distribution.

    Raises:
        Missing: it is not installed, or its import fails.
    """
    version(name)
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise Missing(f"{name} does not import: {error}") from None
