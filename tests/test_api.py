"""The public names change on purpose only; the README's tables are made from the code, and its examples run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import genfast
from genfast._registry import PUBLIC
from genfast.samplers.table import markdown

ROOT = Path(__file__).resolve().parent.parent


def names_table() -> str:
    rows = sorted(PUBLIC.values(), key=lambda e: (e.group, e.name))
    lines = ["| group | name | what it is |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {e.group} | `{e.name}` | {e.summary.replace('|', chr(92) + '|')} |" for e in rows)])


TABLES = {"names": names_table, "samplers": markdown}


def test_names_are_those_of_the_checked_in_list():
    listed = (ROOT / "tests" / "api_names.txt").read_text().split()
    assert sorted(PUBLIC) == listed, "a public name came or went: if that is meant, update tests/api_names.txt"
    assert sorted(genfast.__all__) == listed
    assert all(getattr(genfast, name) is entry.value for name, entry in PUBLIC.items())


def test_every_public_name_is_documented():
    for name, entry in PUBLIC.items():
        assert len(inspect.getdoc(entry.value)) > 40, name


def between(marker: str, text: str) -> tuple[str, str, str]:
    """What is before, between and after a pair of markers of the README."""
    before, found, after = text.split(f"<!-- {marker} -->\n")
    return before, found, after


@pytest.mark.parametrize("marker", TABLES)
def test_readme_has_the_tables_of_the_code(marker):
    found = between(marker, (ROOT / "README.md").read_text())[1]
    assert found.strip() == TABLES[marker]().strip(), "run `python tests/test_api.py` to write the tables"


def test_readme_examples_run():
    # In order and in one namespace, as a reader would type them.
    namespace: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    for block in blocks:
        if "genfast.patch" in block:
            try:
                genfast.dropin.patching.PEERS["diffusers"].check()
            except ImportError:
                continue  # another release than the one that the drop-ins stand in for
        exec(compile(block, "<example of the README>", "exec"), namespace)
    assert namespace["x"].isfinite().all() and namespace["x0"].abs().max() <= 1


if __name__ == "__main__":
    (ROOT / "tests" / "api_names.txt").write_text("\n".join(sorted(PUBLIC)) + "\n")
    readme = (ROOT / "README.md").read_text()
    for name, make in TABLES.items():
        before, _, after = between(name, readme)
        readme = f"{before}<!-- {name} -->\n{make().strip()}\n<!-- {name} -->\n{after}"
    (ROOT / "README.md").write_text(readme)
