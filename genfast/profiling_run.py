"""``python -m genfast.profiling_run OUTPUT script.py ...`` (or ``-m module ...``): run it with ranges on.

OUTPUT is a file for torch.profiler's trace, or ``-`` for ranges alone (under nsys). ``genfast profile`` starts this.
"""

from __future__ import annotations

import os
import runpy
import sys

from genfast.profiling import profile


def main(output: str, target: list[str]) -> None:
    """Run a script, or with ``-m`` a module, as ``__main__`` inside :func:`genfast.profile`."""
    with profile(None if output == "-" else output):
        if target[0] == "-m":
            sys.argv = target[1:]
            runpy.run_module(target[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = target
            # As when Python itself runs a script: modules beside it can be imported, those of this folder cannot.
            sys.path[0] = os.path.dirname(os.path.abspath(target[0]))
            runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
