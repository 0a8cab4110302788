"""Several processes are one program: settings, agreement, equal results; no one waits in vain."""

import pytest

from mgsd_jax import processes
from mgsd_jax.metrics import Mean

NONE = (None, None, None)
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def test_flags_come_before_the_environment_and_nothing_means_ask_the_cluster() -> None:
    flags = ("localhost:1234", 4, 3)
    environ = {ADDRESS: "10.0.0.1:80", COUNT: "2", INDEX: "1"}
    assert processes.settings(flags, environ) == flags
    assert processes.settings(NONE, environ) == ("10.0.0.1:80", 2, 1)
    assert processes.settings(NONE, {}) == NONE
    assert processes.settings(NONE, {ADDRESS: "10.0.0.1:80"}) == NONE  # jax reads it by itself


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        (("a:1", None, None), {}, "got --coordinator a:1 but no --processes, no --process; want"),
        ((None, 2, 0), {}, "got --processes 2 and --process 0 but no --coordinator; want all"),
        (("a:1", None, 0), {COUNT: "2"}, "but no --processes; want"),  # the two do not mix
        (NONE, {COUNT: "2", INDEX: "0"}, f"but no {ADDRESS}; want"),
        (NONE, {ADDRESS: "a:1", COUNT: "two", INDEX: "0"}, f"{COUNT}: got 'two', want a whole"),
        (("a", 2, 0), {}, "--coordinator: got 'a', want host:port"),
        (("a:b", 2, 0), {}, "--coordinator: got 'a:b', want host:port"),
        (("a:1", 2, 2), {}, "--process: got 2 of 2 processes, want 0 to 1"),
        (("a:1", 2, -1), {}, "--process: got -1, want a whole number"),
    ],
)
def test_settings_half_given_or_senseless_are_refused(
    given: processes.Settings, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        processes.settings(given, environ)
    assert message in str(raised.value)


def test_means_of_all_processes_are_added_by_name() -> None:
    parts = [{"a": (1.0, 2.0), "b": (3.0, 1.0)}, {"a": (5.0, 1.0), "c": (0.0, 0.0)}]
    sums = processes.add_means(parts)
    assert sums == {"a": Mean(6.0, 3.0), "b": Mean(3.0, 1.0), "c": Mean(0.0, 0.0)}


def test_one_process_agrees_with_itself() -> None:
    assert processes.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert processes.largest((3, 1)) == (3, 1)
