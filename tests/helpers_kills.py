"""Ends a function before any one of its changes to files, as a kill at that moment would."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Killed(BaseException):
    """The end of the program: no `except Exception` may survive it."""


class Killer:
    """Ends the program before the n-th change to files below a folder, and at all after it.

    An audit hook sees every way of changing a file, but cannot be taken away: it is told to rest.
    """

    EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")

    def __init__(self) -> None:
        self.root, self.left = "", -1
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.root or event not in (*self.EVENTS, "open"):
            return
        is_writing = event != "open" or (isinstance(args[1], str) and not args[1].startswith("r"))
        is_removing = event in ("os.remove", "os.rmdir")
        is_relative = is_removing and int(args[1]) >= 0  # rmtree, by descriptor
        if is_writing and (is_relative or str(args[0]).startswith(self.root)):
            self.left -= 1
            if self.left < 0:
                raise Killed

    def run(self, function: Callable[[], object], root: Path, operations: int) -> bool:
        """Whether the function came to its end within so many operations."""
        self.root, self.left = str(root), operations
        gc.freeze()  # what is there now need not be looked through afterwards: half a second
        try:
            function()
        except Killed:
            pass
        else:
            return True
        finally:
            self.root = ""
            gc.collect()  # closes what it held open, as the end of a process does
            gc.unfreeze()
        return False
