"""What all tests share: compiled programs are kept, for every process of a run and for the next.

Set before jax is imported; child processes inherit it. A cache of another place is left as it is.
"""

import os
import pathlib
import signal

_KEPT = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_KEPT))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A run in the background of a script begins with SIGINT ignored, and so would all its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
