"""Side by side with peers and with the physical floor: ``python -m benchmarks [FAMILY ...]``; see ``README.md``."""

import os

# The profiler that counts memory announces every start and stop on stderr; it reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
