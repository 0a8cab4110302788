"""What child processes find: this checkout, and no torch, which is there for tests alone.

So they run as a user's programs do, and start in two thirds of the time.
"""

import os
import pathlib

TESTS = pathlib.Path(__file__).parent
WITHOUT_TORCH = str(TESTS / "without_torch")
PATH = os.pathsep.join((str(TESTS.parent), WITHOUT_TORCH))
