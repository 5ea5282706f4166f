"""Text without a download: Python's licence and the documentation strings of its standard library, as characters."""

from __future__ import annotations

import ast
import builtins
import re
import string
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ALPHABET = "\n " + string.ascii_lowercase + string.digits + ".,:;'\"!?()[]<>-_=+*/\\#%&@|"
"""What text is made of, lower-cased; a newline ends a paragraph. Fixed, so that ids mean the same on every machine."""
MASK = len(ALPHABET)
"""The mask's id: the last one, as SEDD's absorbing graph has it."""
VOCABULARY = MASK + 1
HELD_OUT = 12
"""One document in this many is held out."""
_NOT_PROSE = re.compile(r">>>|^\s*[-=~+|]{4,}\s*$|\s{3,}\S", re.MULTILINE)
_SKIPPED = re.compile(r"(^|/)(tests?|idle_test|site-packages|dist-packages|turtledemo|lib2to3|__pycache__|config-.*)/")


@dataclass(frozen=True)
class Corpus:
    """Paragraphs that begin and end with a newline, as int64 ids [N]: of the training documents and of the others."""

    train: Tensor
    held_out: Tensor
    documents: tuple[int, int]
    """How many documents each part is made of."""


def encode(text: str) -> Tensor:
    """int64 [N] ids of a text that has characters of the alphabet only."""
    return torch.tensor([ALPHABET.index(c) for c in text], dtype=torch.int64)


def decode(ids: Tensor, mask: str = "\N{LIGHT SHADE}") -> str:
    """The text of ids [N]; ``mask`` stands for what is masked still."""
    return "".join((ALPHABET + mask)[i] for i in ids.tolist())


def load_corpus(root: Path | None = None) -> Corpus:
    """The text on this machine, a twelfth of the documents held out.

    The order is that of the files' names, so a Python installation always gives the same corpus. A paragraph that
    occurs twice counts once, wherever it occurs first; held-out documents come first, so that none of their text is
    trained on.
    """
    documents = list(_documents(root or Path(sysconfig.get_path("stdlib"))))
    held_out = [d for i, d in enumerate(documents) if i % HELD_OUT == HELD_OUT // 2]
    train = [d for i, d in enumerate(documents) if i % HELD_OUT != HELD_OUT // 2]
    seen: set[str] = set()
    parts = [_join(part, seen) for part in (held_out, train)]
    if min(map(len, parts)) < 1000:
        raise RuntimeError(
            f"genfast demo --text learns from the documentation strings of Python's standard library, and there are "
            f"next to none in {root or sysconfig.get_path('stdlib')}"
        )
    return Corpus(encode(parts[1]), encode(parts[0]), (len(train), len(held_out)))


def paragraphs(text: str) -> list[str]:
    """The prose of a text: paragraphs in one line each, lower-cased, without examples, tables and lists of values."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        if _NOT_PROSE.search(block.strip()):
            continue
        line = " ".join(block.lower().split())
        words = sum(c in string.ascii_lowercase or c == " " for c in line)
        if len(line) >= 24 and " " in line and words >= 0.9 * len(line) and set(line) <= set(ALPHABET):
            found.append(line)
    return found


def _join(documents: list[list[str]], seen: set[str]) -> str:
    """New paragraphs of all documents, each ended by a newline."""
    kept = []
    for document in documents:
        for paragraph in document:
            if paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
    return "".join("\n" + line for line in kept) + "\n"


def _documents(root: Path) -> Iterator[list[str]]:
    """Paragraphs of every document: the licence, then the sources that have documentation strings."""
    licence = next((p for name in _licence_files() if (p := Path(name)).is_file()), None)
    if licence is not None:
        yield paragraphs(licence.read_text(encoding="utf-8", errors="replace"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED.search(path.relative_to(root).as_posix()):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        document = [line for text in strings if text for line in paragraphs(text)]
        if document:
            yield document


def _licence_files() -> list[str]:
    """Where ``license()`` of an interactive Python looks, except in the current folder, which may hold another one."""
    names = getattr(getattr(builtins, "license", None), "_Printer__filenames", [])
    return [name for name in names if Path(name).is_absolute()]
