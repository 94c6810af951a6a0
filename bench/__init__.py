"""What shows and measures compileclip; not installed with it."""

import os

# Of torch's profiler, which says when it starts and stops. It reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
