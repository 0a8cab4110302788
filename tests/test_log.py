"""The log has our lines, warnings, and what compiles for long; not what libraries say."""

import io
import logging as std_logging
import sys
import time

import pytest
import tqdm
from absl import logging
from jax import monitoring

from mgsd_jax.workdir import log


@pytest.mark.parametrize(
    ("path", "level", "shown"),
    [
        ("/site-packages/orbax/checkpoint/manager.py", std_logging.INFO, False),
        ("/site-packages/orbax/checkpoint/manager.py", std_logging.ERROR, False),
        ("/site-packages/httpx/client.py", std_logging.INFO, False),
        ("/dist-packages/jax/bridge.py", std_logging.WARNING, True),
        (f"{log.PACKAGE}/workdir/metrics.py", std_logging.INFO, True),
        ("/home/me/config.py", std_logging.INFO, True),
    ],
)
def test_the_log_leaves_out_what_libraries_say(path: str, level: int, shown: bool) -> None:
    record = std_logging.LogRecord("absl", level, path, 1, "a line", None, None)
    assert log.is_shown(record) == shown


def test_verbosity_1_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "vlog_is_on", lambda level: level == 1)
    path = "/site-packages/orbax/checkpoint/manager.py"
    assert log.is_shown(std_logging.LogRecord("absl", 20, path, 1, "a line", None, None))


def test_lines_are_short_and_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.ABSLHandler(logging.PythonFormatter())
    monkeypatch.setattr(logging, "get_absl_handler", lambda: handler)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    log.set_up()
    with tqdm.tqdm(total=3, file=stream, bar_format="the bar"):
        for level, text in ((std_logging.INFO, "usual"), (std_logging.WARNING, "odd")):
            handler.handle(std_logging.LogRecord("absl", level, "a.py", 1, text, None, None))
    lines = [line.split("\r")[-1] for line in stream.getvalue().splitlines()]
    at = time.strftime("%H:", time.localtime())
    assert [line[8:] for line in lines if line.startswith(at)] == [" usual", " warning: odd"]


@pytest.mark.parametrize(
    ("given", "device", "is_installed", "want"),
    [
        (None, "", True, "cpu"),
        (None, "", False, None),
        (None, "/dev/accel*", True, None),
        (None, "/dev/nvidia*", True, None),
        ("cuda", "", True, "cuda"),
    ],
)
def test_libtpu_is_not_asked_where_there_is_no_accelerator(
    given: str | None,
    device: str,
    is_installed: bool,
    want: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log.glob, "glob", lambda path: [path] if path == device else [])
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda _: is_installed or None)
    assert log.platforms(given) == want


def test_a_compilation_is_told_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "_SLOW", 0.2)

    def compile_for(name: str, seconds: float) -> None:  # as jax says it
        monitoring.record_scalar(log._COMPILE, 0.0, fun_name=name)
        time.sleep(seconds)
        monitoring.record_event_duration_secs(log._COMPILE, 31.4, fun_name=name)

    with caplog.at_level("INFO", logger="absl"), log.compilations_told():
        compile_for("tiny", 0.0)
        compile_for("jit(_update)", 0.6)
    compile_for("after", 0.6)
    assert caplog.messages == ["compiling update ...", "compiled update in 31 s"]
