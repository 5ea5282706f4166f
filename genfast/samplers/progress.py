"""The progress bar of a sampling loop."""

from __future__ import annotations

import contextlib
import warnings

_bar_missing_said = False


@contextlib.contextmanager
def bar(name: str, total: int | None, wanted: bool):
    """Yields the function that advances the progress bar by one step."""
    global _bar_missing_said
    tqdm = None
    if wanted:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            if not _bar_missing_said:
                warnings.warn("progress=True needs tqdm, which is not installed (pip install tqdm); no bar is shown")
                _bar_missing_said = True
    if tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc=name, leave=False) as shown:
        yield shown.update
