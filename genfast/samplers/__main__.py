"""``python -m genfast.samplers``: print the table of samplers."""

from genfast.samplers.table import markdown

print(markdown())
