"""The public names: they change on purpose only, and the README's table is made from them."""

from __future__ import annotations

import inspect
from pathlib import Path

import genfast
from genfast._registry import PUBLIC

ROOT = Path(__file__).resolve().parent.parent


def table() -> str:
    rows = sorted(PUBLIC.values(), key=lambda e: (e.group, e.name))
    lines = ["| group | name | what it is |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {e.group} | `{e.name}` | {e.summary.replace('|', chr(92) + '|')} |" for e in rows)])


def test_names_are_those_of_the_checked_in_list():
    listed = (ROOT / "tests" / "api_names.txt").read_text().split()
    assert sorted(PUBLIC) == listed, "a public name came or went: if that is meant, update tests/api_names.txt"
    assert sorted(genfast.__all__) == listed
    assert all(getattr(genfast, name) is entry.value for name, entry in PUBLIC.items())


def test_every_public_name_is_documented():
    for name, entry in PUBLIC.items():
        assert len(inspect.getdoc(entry.value)) > 40, name


def test_readme_lists_the_public_names():
    text = (ROOT / "README.md").read_text()
    _, found = text.split("<!-- names -->\n")[0], text.split("<!-- names -->\n")[1]
    assert found.strip() == table(), "run `python tests/test_api.py` to write the table"


if __name__ == "__main__":
    (ROOT / "tests" / "api_names.txt").write_text("\n".join(sorted(PUBLIC)) + "\n")
    before, _, after = (ROOT / "README.md").read_text().split("<!-- names -->\n")
    (ROOT / "README.md").write_text(f"{before}<!-- names -->\n{table()}\n<!-- names -->\n{after}")
