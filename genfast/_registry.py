"""The one list of public names.

A public function or class is declared where it is defined, with ``@export``. ``genfast.__all__``, the table in
the README and ``genfast ops`` are all read from here, and ``tests/test_api.py`` compares the list with a
checked-in copy, so a name appears or disappears only on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class PublicName:
    """One exported object: where it lives, what group it belongs to, and the first line of its docstring."""

    name: str
    module: str
    group: str
    summary: str
    value: Any


PUBLIC: dict[str, PublicName] = {}


def export(group: str):
    """Mark a function or class as public, under ``group`` (a family, or ``"package"``)."""

    def register(obj: T) -> T:
        name = obj.__name__
        if name in PUBLIC and PUBLIC[name].module != obj.__module__:
            raise RuntimeError(f"the public name {name!r} is declared in {PUBLIC[name].module} and {obj.__module__}")
        summary = (obj.__doc__ or "").strip().split("\n", 1)[0]
        if not summary:
            raise RuntimeError(f"the public name {name!r} in {obj.__module__} has no docstring")
        PUBLIC[name] = PublicName(name, obj.__module__, group, summary, obj)
        return obj

    return register
