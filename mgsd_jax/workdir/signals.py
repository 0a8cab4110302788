"""SIGTERM and Ctrl-C ask a run to stop after its step; asked again, it ends at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator, Sequence

_ASKING = (signal.SIGTERM, signal.SIGINT)  # the second one is Ctrl-C


@contextlib.contextmanager
def asked_to_stop() -> Generator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets instead of ending the process; a second one ends it.

    At once, with 143 or 130: the main thread, where Python runs handlers, may be compiling for
    minutes. So the number of every signal also goes through a pipe to a thread that waits for it.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # Python takes signals in the main thread only
        return
    # One that is ignored (Ctrl-C by a job of the background) stays so.
    asking = [one for one in _ASKING if signal.getsignal(one) is not signal.SIG_IGN]
    # None: a handler that Python knows nothing of, which cannot be set again.
    before = {one: signal.signal(one, lambda *_: event.set()) or signal.SIG_DFL for one in asking}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    pipe_before = signal.set_wakeup_fd(writer)
    listener = threading.Thread(target=_listen, args=(reader, asking), daemon=True)
    listener.start()
    try:
        yield event
    finally:
        signal.set_wakeup_fd(pipe_before)
        for one, handler in before.items():
            signal.signal(one, handler)
        os.close(writer)
        listener.join()
        os.close(reader)


def _listen(reader: int, asking: Sequence[int]) -> None:
    """Tells the user that the first signal was heard, and ends the process at the second."""
    is_asked = False
    while number := os.read(reader, 1):
        if number[0] not in asking:
            continue
        if is_asked:
            os._exit(128 + number[0])
        is_asked = True
        os.write(2, b"\nasked to stop: this step is finished and saved; once more ends at once\n")
