"""launch/tpu.sh against a fake gcloud that records its arguments and plays the hosts.

The fake keeps one folder a host, which is that host's home: `ssh` runs the very command there, so
launch/host.sh is tested too, with a Python that stands in for the program.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from mgsd_jax import command_line, main

ROOT = pathlib.Path(__file__).parents[1]
HOSTS = 2  # of a slice
pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("flock", "setsid", "git", "tar")),
    reason="needs flock, setsid, git and tar, as on a TPU host",
)

GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, re, shutil, subprocess, sys

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
arguments = sys.argv[1:]
with (cloud / "calls.jsonl").open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
words = [word for word in arguments if not word.startswith("--")]
state = cloud / "state"


def homes(node, worker):
    chosen = range({HOSTS}) if worker == "all" else [int(worker)]
    return [cloud / f"{{node}}-w{{i}}" for i in chosen]


worker = next((w.partition("=")[2] for w in arguments if w.startswith("--worker=")), "")
if "describe" in words:
    if (cloud / "broken").exists():
        sys.exit((cloud / "broken").read_text())
    if not state.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.describe) NOT_FOUND: Resource 'x' was not found")
    left = state.read_text().split()
    print(left[0])
    state.write_text(" ".join(left[1:] or left))
elif "create" in words:
    state.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
elif "delete" in words:
    state.unlink()
elif "scp" in words:
    source, target = words[words.index("scp") + 1 :][:2]
    node, _, path = target.partition(":")
    for home in homes(node, worker):
        home.mkdir(exist_ok=True)
        shutil.copy(source, home / path)
elif "ssh" in words:
    node = words[words.index("ssh") + 1]
    command = next(w.partition("=")[2] for w in arguments if w.startswith("--command="))
    codes = []
    for home in homes(node, worker):
        home.mkdir(exist_ok=True)
        # A host has an environment of its own.
        env = {{key: value for key, value in os.environ.items() if not key.startswith("JAX_")}}
        env |= {{"HOME": str(home)}}
        codes.append(subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode)
    sys.exit(max(codes))
elif "rsync" in words:
    pathlib.Path(words[-1], "model.safetensors").write_text("")  # in the folder made for it
elif "storage" in words:
    source, target = words[-2:]
    (cloud / re.sub("[^A-Za-z0-9.-]", "_", target)).write_text(open(source).read())
"""
# Stands in for the program: says its arguments, then does what --do says.
PYTHON = f"""#!{sys.executable}
import os, pathlib, signal, sys, time

arguments = sys.argv[1:]
print("port", os.environ.get("JAX_COORDINATOR_PORT"))
print("program", *arguments, flush=True)
do = next((w.partition("=")[2] for w in arguments if w.startswith("--do=")), "")
if do == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(15)))
    time.sleep(60)
if do == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if do == "die once":
    mark = pathlib.Path(os.environ["HOME"], "died")
    if not mark.exists():
        mark.write_text("")
        sys.exit(7)
if do == "bad input":
    sys.exit(2)
"""


class Cloud:
    """A fake Google Cloud: its folder, and how to call launch/tpu.sh with it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        # Hosts are told apart by their names, which are those of their homes here.
        scripts = {"gcloud": GCLOUD, "hostname": '#!/bin/sh\nbasename "$HOME"\n'}
        for name, text in scripts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        venv = folder / "venv" / "bin"
        venv.mkdir(parents=True)
        (venv / "python").write_text(PYTHON)
        (venv / "python").chmod(0o755)
        (folder / "venv" / ".installed-tpu,gcs").write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_"))}
        kept.pop("PYTHON", None)  # the interpreter that launch/test.sh was asked to take
        self.env = kept | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(folder),
            "VENV": str(folder / "venv"),
            "TMPDIR": str(folder),
            "TPU_NAME": "slice",
            "TPU_PROJECT": "project",
            "TPU_ZONE": "us-west4-a",
            "TPU_TYPE": "v5litepod-16",
            "TPU_POLL_SECONDS": "0",
            "RESTART_SECONDS": "0",
        }

    def tpu(self, *arguments: str, code: int = 0, **env: str) -> str:
        """What launch/tpu.sh says, standard output and error together."""
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "tpu.sh"), *arguments],
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ready(self, slices: int = 1) -> list[pathlib.Path]:
        """An active slice whose hosts hold launch/; the homes of the hosts."""
        (self.folder / "state").write_text("ACTIVE")
        names = ["slice"] if slices == 1 else [f"slice-{i}" for i in range(slices)]
        homes = [self.folder / f"{name}-w{i}" for name in names for i in range(HOSTS)]
        for home in homes:
            shutil.copytree(ROOT / "launch", home / "mgsd_jax" / "launch")
        return homes

    def idle(self, home: pathlib.Path) -> bool:
        lock = home / ".mgsd_jax" / "lock"
        return subprocess.run(["flock", "-n", str(lock), "true"]).returncode == 0


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Cloud:
    return Cloud(tmp_path)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_create_asks_for_the_slice_once(cloud: Cloud) -> None:
    cloud.tpu("create", "--spot")
    described, created = cloud.calls()
    place = ["--project=project", "--zone=us-west4-a"]
    resources = ["compute", "tpus", "queued-resources"]
    assert described == [*resources, "describe", "slice", *place, "--format=value(state.state)"]
    shape = ["--node-id", "slice", "--accelerator-type", "v5litepod-16"]
    image = ["--runtime-version", "v2-alpha-tpuv5-lite"]
    assert created == [*resources, "create", "slice", *place, *shape, *image, "--spot"]
    assert "slice is there already, state WAITING_FOR_RESOURCES" in cloud.tpu("create")
    assert len(cloud.calls()) == 3, "the second create asks for nothing"


def test_create_waits_until_the_slice_is_there(cloud: Cloud) -> None:
    said = cloud.tpu("create", "--wait")
    assert said.index("WAITING_FOR_RESOURCES") < said.index("PROVISIONING")
    assert said.endswith("slice is ACTIVE\n")
    (cloud.folder / "state").write_text("PROVISIONING FAILED")
    assert "got state FAILED, want ACTIVE" in cloud.tpu("create", "--wait", code=2)
    assert "run 'bash launch/tpu.sh delete' first" in cloud.tpu("create", code=2)


def test_several_slices_are_one_request_and_every_node_is_reached(cloud: Cloud) -> None:
    cloud.tpu("create", "--slices=2", "--reserved")
    created = cloud.calls()[-1]
    assert created[created.index("--node-count") :][:4] == [
        "--node-count",
        "2",
        *("--node-prefix", "slice"),
    ]
    assert "--node-id" not in created
    homes = cloud.ready(slices=2)
    cloud.tpu("run", "--slices=2", "--", "--stage=report", "--config=c.py", "--workdir=w")
    for home in homes:
        log = home / "mgsd_jax" / "w" / "logs" / f"{home.name}.log"
        wait_for(lambda log=log: log.exists() and "ended with code 0" in log.read_text())


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_the_image_follows_from_the_type(cloud: Cloud, kind: str, image: str) -> None:
    said = cloud.tpu("create", "--dry-run", f"--type={kind}")
    assert f"--accelerator-type {kind} --runtime-version {image}\n" in said


def test_a_dry_run_prints_commands_that_can_be_pasted_and_runs_none(cloud: Cloud) -> None:
    program = ["--config=c.py", "--workdir=gs://b/r", "--set", "a.b=(1, 'it''s $HOME')"]
    for command in ("create", "status", "setup", "logs", "stop", "delete"):
        assert "gcloud " in cloud.tpu(command, "--dry-run")
    said = cloud.tpu("run", "--dry-run", "--stages=grounding,export", "--", *program)
    assert cloud.calls() == []
    *_, line = said.splitlines()
    words = shlex.split(line)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    command = words[-1].removeprefix("--command=")
    remote = shlex.split(command)
    assert remote[-len(program) :] == program, "what the host's shell makes of it"
    assert "--stages=grounding,export" in remote


def test_a_dry_run_prints_what_a_real_run_does(cloud: Cloud) -> None:
    cloud.ready()
    for command in ("status", "stop", "delete"):
        said = cloud.tpu(command, "--dry-run")
        before = len(cloud.calls())
        cloud.tpu(command)
        made = [shlex.split(line)[1:] for line in said.splitlines()]
        assert made == cloud.calls()[before:], command


def test_setup_sends_the_checkout_to_every_host_and_leaves_results_alone(cloud: Cloud) -> None:
    (cloud.folder / "state").write_text("ACTIVE")
    cloud.tpu("setup")
    homes = [cloud.folder / f"slice-w{i}" for i in range(HOSTS)]
    for home in homes:
        assert (home / "mgsd_jax" / "mgsd_jax" / "main.py").is_file()
        assert not (home / "mgsd_jax" / ".git").exists()
    code = homes[0] / "mgsd_jax"
    (code / "runs").mkdir()
    (code / "runs" / "result").write_text("kept")
    (code / ".sent").write_text((code / ".sent").read_text() + "gone.py\n")
    (code / "gone.py").write_text("a file that the checkout no longer has")
    cloud.tpu("setup")
    assert (code / "runs" / "result").read_text() == "kept"
    assert not (code / "gone.py").exists()
    assert not list(cloud.folder.glob("*.tgz")), "the archive is removed"


def test_ssh_runs_a_command_where_the_code_is_with_its_python_first(cloud: Cloud) -> None:
    homes = cloud.ready()
    said = cloud.tpu("ssh", "--", "python", "a b", "$HOME 'c'").splitlines()
    assert said.count("program a b $HOME 'c'") == HOSTS
    said = cloud.tpu("ssh", "--worker=1", "--", "pwd").splitlines()
    assert [line for line in said if line.startswith("/")] == [str(homes[1] / "mgsd_jax")]
    assert "the command failed on slice" in cloud.tpu("ssh", "--", "false", code=2)


def test_a_run_is_detached_one_a_host_and_stops_when_asked(cloud: Cloud) -> None:
    homes = cloud.ready()
    program = ["--", "--stage=grounding", "--config=c.py", "--workdir", "w w", "--do=wait"]
    began = time.monotonic()
    said = cloud.tpu("run", *program)
    assert time.monotonic() - began < 15, "the program sleeps for a minute"
    assert said.count("started, log") == HOSTS
    logs = [home / "mgsd_jax" / "w w" / "logs" / f"{home.name}.log" for home in homes]
    for log in logs:
        wait_for(lambda log=log: log.exists() and "program -m mgsd_jax.main" in log.read_text())

    assert cloud.tpu("run", *program).count("runs already") == HOSTS
    other = cloud.tpu("run", *program, "--set", "a=1", code=2)
    assert other.count("under way, want it stopped before") == HOSTS
    assert "the command failed on slice" in other
    assert "want it stopped first" in cloud.tpu("setup", code=2)

    said = cloud.tpu("logs", "--lines=1")
    assert said.count(": running, log") == HOSTS and "program -m mgsd_jax.main" in said
    assert cloud.tpu("logs", "--worker=1").count(": running, log") == 1

    assert cloud.tpu("stop").count("stopped after") == HOSTS
    for home, log in zip(homes, logs, strict=True):
        assert cloud.idle(home)
        text = log.read_text()
        assert "saved\n" in text and text.count("program") == 1, "asked, not killed, not restarted"
    assert cloud.tpu("stop").count("nothing runs") == HOSTS
    assert cloud.tpu("logs").count("ended with code 15, as asked, log") == HOSTS


def test_a_run_that_does_not_leave_is_killed(cloud: Cloud) -> None:
    homes = cloud.ready()
    cloud.tpu("run", "--", "--stage=report", "--config=c.py", "--workdir=w", "--do=hang")
    for home in homes:
        log = home / "mgsd_jax" / "w" / "logs" / f"{home.name}.log"
        wait_for(lambda log=log: log.exists() and "program" in log.read_text())
    assert cloud.tpu("stop", "--seconds=1").count("killed") == HOSTS
    assert all(cloud.idle(home) for home in homes)
    assert cloud.tpu("logs").count(": killed, log") == HOSTS


def test_stages_run_in_turn_and_one_that_died_starts_anew(cloud: Cloud) -> None:
    homes = cloud.ready()
    cloud.tpu(
        *("run", "--stages=grounding,export", "--restarts=1"),
        *("--", "--config=c.py", "--workdir=gs://bucket/run", "--do=die once"),
    )
    for home in homes:
        copy = cloud.folder / f"gs___bucket_run_logs_{home.name}.log"
        wait_for(lambda copy=copy: copy.exists() and "ended with code 0" in copy.read_text())
        lines = [line for line in copy.read_text().splitlines() if line.startswith("program")]
        assert [line.split()[3] for line in lines] == [
            *("--stage=grounding", "--stage=grounding", "--stage=export"),
        ]
        assert not (home / "mgsd_jax" / "gs:").exists()


def test_bad_input_is_not_tried_again_and_ends_the_stages(cloud: Cloud) -> None:
    homes = cloud.ready()
    program = ["--config=c.py", "--workdir=w", "--do=bad input"]
    cloud.tpu("run", "--stages=grounding,export", "--restarts=5", "--", *program)
    for home in homes:
        log = home / "mgsd_jax" / "w" / "logs" / f"{home.name}.log"
        wait_for(lambda log=log: log.exists() and "ended with code 2" in log.read_text())
        assert log.read_text().count("program") == 1


def test_delete_gives_the_slice_back_and_may_come_twice(cloud: Cloud) -> None:
    cloud.ready()
    cloud.tpu("delete")
    assert cloud.calls()[-1][3:] == [
        *("delete", "slice", "--project=project", "--zone=us-west4-a", "--force", "--quiet"),
    ]
    assert "slice is not there, nothing to delete" in cloud.tpu("delete")
    assert "slice is ABSENT" in cloud.tpu("status")


def test_up_does_all_and_leaves_alone_what_is_done(cloud: Cloud) -> None:
    program = ["--", "--stage=grounding", "--config=c.py", "--workdir=w", "--do=wait"]
    said = cloud.tpu("up", "--spot", "--weights=gs://bucket/models/small", *program)
    parts = ["queued-resources create", "slice is ACTIVE", "is set up", "rsync", "started, log"]
    assert sorted(parts, key=said.index) == parts
    logs = [cloud.folder / f"slice-w{i}/mgsd_jax/w/logs/slice-w{i}.log" for i in range(HOSTS)]
    for log in logs:
        wait_for(lambda log=log: log.exists() and "program" in log.read_text())
    before = len(cloud.calls())
    for home in (cloud.folder / f"slice-w{i}" for i in range(HOSTS)):
        assert (home / "mgsd_jax" / "models" / "small" / "model.safetensors").exists()
    assert "slice runs already" in cloud.tpu("up", "--spot", *program)
    asked = [call for call in cloud.calls()[before:] if "create" in call or "scp" in call]
    assert not asked, "the slice is there, and its hosts are at work"
    cloud.tpu("stop")


def test_up_asks_anew_for_a_slice_that_was_taken_away(cloud: Cloud) -> None:
    """A Spot slice stays in the list as SUSPENDED, and its run goes on from the bucket."""
    (cloud.folder / "state").write_text("SUSPENDED")
    program = ["--", "--stage=grounding", "--config=c.py", "--workdir=gs://b/r"]
    said = cloud.tpu("up", "--wait", "--spot", *program, TPU_POLL_SECONDS="1")
    parts = ["is SUSPENDED, asking", "resources delete", "resources create", "started, log"]
    assert sorted(parts, key=said.index) == parts
    assert said.endswith("tpu: the run of slice has ended\n")
    (cloud.folder / "state").write_text("SUSPENDING")
    assert "got state SUSPENDING, want it gone" in cloud.tpu("up", *program, code=2)


def test_up_waits_for_the_end_goes_on_after_a_kill_and_not_after_a_failure(cloud: Cloud) -> None:
    program = ["--", "--stage=grounding", "--config=c.py", "--workdir=w"]
    said = cloud.tpu("up", "--wait", *program, "--do=die once", TPU_POLL_SECONDS="1")
    assert said.count("started, log") == 2 * HOSTS, "exit code 7 is none of a bad input"
    assert said.endswith("tpu: the run of slice has ended\n")
    said = cloud.tpu("up", "--wait", *program, "--do=bad input", code=2, TPU_POLL_SECONDS="1")
    assert "ended with code 2, log" in said and "slice: the run has failed" in said


def test_create_hands_on_account_labels_and_disk(cloud: Cloud) -> None:
    disk = "source=projects/p/zones/us-west4-a/disks/weights,mode=read-only"
    account = "--service-account=me@p.iam.gserviceaccount.com"
    cloud.tpu("create", account, TPU_LABELS="team=a,run=4b", TPU_DATA_DISK=disk)
    assert cloud.calls()[-1][-6:] == [
        *("--service-account", "me@p.iam.gserviceaccount.com"),
        *("--labels", "team=a,run=4b", "--data-disk", disk),
    ]


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["up"], {}, "up: --stage after --, or --stages, is required"),
        (["up", "--", "--stage=a", "--config=c"], {}, "up: --workdir is required after --"),
        (["create", "--type=tpu7x-8"], {}, "which Google rents through GKE alone"),
        (["create"], {"TPU_NAME": ""}, "--name is required, or TPU_NAME"),
        (["setup"], {"TPU_PROJECT": ""}, "--project is required, or TPU_PROJECT"),
        (["delete"], {"TPU_ZONE": ""}, "--zone is required, or TPU_ZONE"),
        (["create"], {"TPU_TYPE": ""}, "--type is required, or TPU_TYPE"),
        (["create", "--type=v9-8"], {}, "--runtime is required, the VM image of type v9-8"),
        (["create", "--slices=two"], {}, "--slices: got 'two', want a whole number"),
        (["create", "--slices=0"], {}, "--slices: got 0, want at least 1"),
        (["create", "--spot", "--reserved"], {}, "want at most one of them"),
        (["create", "--colour=red"], {}, "got --colour, want one of the options"),
        (["create", "--zone"], {}, "--zone: a value is required"),
        (["fly"], {}, "got command 'fly', want up, create, status, setup, ssh, run, logs, stop or"),
        (["setup"], {}, "slice: got state ABSENT, want ACTIVE"),
        (["ssh"], {}, "ssh: a command for the hosts is required after --"),
        (["run"], {}, "run: --stage after --, or --stages, is required"),
        (["run", "--stage=export"], {}, "got --stage, want one of the options"),
        (["run", "--", "--stage=export"], {}, "run: --config is required after --"),
        (["run", "--", "--stage=a", "--config=c"], {}, "run: --workdir is required after --"),
        (["run", "--stages=a", "--", "--stage=a"], {}, "want one of them"),
    ],
)
def test_what_is_missing_or_wrong_is_said(
    cloud: Cloud, arguments: list[str], env: dict[str, str], message: str
) -> None:
    assert message in cloud.tpu(*arguments, code=2, **env)


@pytest.mark.parametrize(
    ("command", "variable", "value"),
    [
        (command, flag, value)
        for command, flag, values in [
            (
                "ssh",
                "--slices",
                ("08", "007", "00", "0", "-1", "1.5", "1e3", "0x2", "9" * 20, " 1"),
            ),
            ("ssh", "--worker", ("*", "01", "-1", "0,1", "ALL", "0 1", "1;ls", "9" * 10)),
            ("run", "--restarts", ("08", "-1", "ten", "9" * 20, "a[$(touch x)]")),
            ("run", "--stages", (",", "a,,b", "a,", "a b", "*", "a;b", "A")),
            ("logs", "--lines", ("08", "-5", "+5", "5k", "9" * 20)),
            ("stop", "--seconds", ("08", "1.5", "inf", "9" * 20)),
            ("create", "TPU_POLL_SECONDS", ("08", "-1", "1.5", "1m")),
            ("create", "--type", ("*", "v5p", "v5p-", "v5p-16 ", "V5P-16", "v5p-16;ls")),
            ("create", "--runtime", ("*", "a b", "-x", "$HOME")),
            ("create", "--network", ("*", "a b", "-x", "a;b")),
            ("create", "--service-account", ("*", "me", "a b@c", "a@b;ls", "A@B")),
            ("create", "--labels", ("a", "a=b,", "A=b", "a=b c", "a=$HOME", "=b")),
            ("create", "--data-disk", ("disk", "source=", "source=a;ls", "source=a,mode=ro")),
            ("up", "--weights", ("a", "a/b/c", "/a/b", "gs://b", "gs://b/a b", "a/b;ls", "-a/b")),
            (
                "delete",
                "--name",
                ("*", "a b", "-a", "a-", "A", "1a", "a_b", "a/b", "a" * 64, "\u00e4"),
            ),
            ("delete", "--name", ("a\nb", "a\n", "..", "~", "$(touch x)")),
            ("delete", "--project", ("*", "a b", "-a", "a/b", "a\n", "a;b")),
            ("delete", "--zone", ("*", "us", "us west", "us-west4-", "US-WEST4-A", "us-west4-a\n")),
        ]
        for value in values
    ],
)
def test_every_number_and_name_is_looked_at(
    cloud: Cloud, command: str, variable: str, value: str
) -> None:
    """One line with the flag and what was found, exit code 2, and nothing asked of the cloud."""
    cloud.ready()
    words = ["--", "--stage=report", "--config=c", "--workdir=w"] if command in "run ssh up" else []
    flags = [f"{variable}={value}"] if variable.startswith("--") else []
    env: dict[str, Any] = {} if flags else {variable: value}
    said = cloud.tpu(command, *flags, *words, code=2, **env)
    assert said.startswith(f"tpu: {variable}: got ") and said.count("\n") == 1 and "want" in said
    assert cloud.calls() == []


@pytest.mark.parametrize(
    "arguments",
    [
        *(["run", f"--{flag}", "--"] for flag in ("restarts=08", "restarts=", "stages=a,,b")),
        *(["logs", f"--lines={value}"] for value in ("08", "-1", "x", "")),
        *(["stop", f"--seconds={value}"] for value in ("08", "-1", "x", "")),
        ["stop", "--seconds=1", "now"],
        ["install", "tpu gcs"],
        ["install", "tpu", "gcs"],
        ["idle", "now"],
    ],
)
def test_a_host_looks_at_its_arguments_itself(cloud: Cloud, arguments: list[str]) -> None:
    home, _ = cloud.ready()
    done = subprocess.run(
        ["bash", str(home / "mgsd_jax" / "launch" / "host.sh"), *arguments],
        env=cloud.env | {"HOME": str(home)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout.count("\n") == 1, done.stdout
    assert ": got " in done.stdout and "want" in done.stdout


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("delete", "--worker=1"),
        ("stop", "--worker=1"),
        ("run", "--worker=1"),
        ("stop", "--wait"),
        ("status", "--seconds=5"),
        ("ssh", "--lines=5"),
        ("create", "--restarts=1"),
        ("create", "--weights=a/b"),
        ("run", "--wait"),
        ("stop", "--"),
        ("delete", "--spot"),
    ],
)
def test_an_option_that_a_command_has_no_use_for_is_refused(
    cloud: Cloud, command: str, option: str
) -> None:
    """`delete --worker=1` would delete the other hosts too."""
    cloud.ready()
    said = cloud.tpu(command, option, code=2)
    assert f"{command}: got {option.partition('=')[0]}, which it has no use for" in said
    assert cloud.calls() == []


def test_jax_variables_go_to_the_hosts(cloud: Cloud) -> None:
    homes = cloud.ready()
    program = ["--", "--stage=report", "--config=c.py", "--workdir=w"]
    given: dict[str, Any] = {"JAX_COORDINATOR_PORT": "8476", "JAX_TRACEBACK_FILTERING": "o'f f"}
    said = cloud.tpu("run", *program, **given)
    assert "JAX_COORDINATOR_PORT=8476" in said, "the command shows what is handed over"
    for home in homes:
        log = home / "mgsd_jax" / "w" / "logs" / f"{home.name}.log"
        wait_for(lambda log=log: log.exists() and "ended with code 0" in log.read_text())
        assert "port 8476\n" in log.read_text()
        command = (home / ".mgsd_jax" / "command").read_text()
        assert "JAX_COORDINATOR_PORT=8476 JAX_TRACEBACK_FILTERING=o'f f\n" in command
    assert "env" not in cloud.tpu("run", "--dry-run", *program)


@pytest.mark.parametrize(("variable", "value"), [("JAX_PROCESS_ID", "0"), ("JAX_PLATFORMS", "cpu")])
def test_a_jax_variable_that_no_host_should_get_is_refused(
    cloud: Cloud, variable: str, value: str
) -> None:
    cloud.ready()
    program = ["--", "--stage=report", "--config=c.py", "--workdir=w"]
    env: dict[str, Any] = {variable: value}
    assert f"{variable}: got " in cloud.tpu("run", *program, code=2, **env)
    assert cloud.calls() == []
    cloud.tpu("status", **env)


@pytest.mark.parametrize(
    "message",
    [
        "ERROR: (gcloud.alpha.describe) PERMISSION_DENIED: no access",
        "ERROR: (gcloud.alpha.describe) PERMISSION_DENIED: Project 'p' not found or deleted",
        "ERROR: (gcloud.alpha.describe) INVALID_ARGUMENT: zone NOT_FOUND: x was not found",
        "ERROR: gcloud crashed (ModuleNotFoundError): NOT_FOUND",
        "gcloud: credentials not found",
        "WARNING: NOT_FOUND: an update was not found\nERROR: (gcloud.x) UNAVAILABLE: try again",
        "",
    ],
)
@pytest.mark.parametrize("command", ["create", "delete", "setup"])
def test_only_the_status_not_found_is_an_absent_slice(
    cloud: Cloud, command: str, message: str
) -> None:
    (cloud.folder / "broken").write_text(message)
    said = cloud.tpu(command, code=2)
    assert message in said and "could not say" in said
    assert all("describe" in call for call in cloud.calls())


def test_scripts_are_clean() -> None:
    programs = os.pathsep.join((str(pathlib.Path(sys.executable).parent), os.environ["PATH"]))
    shellcheck = shutil.which("shellcheck", path=programs)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    files = sorted(map(str, (ROOT / "launch").glob("*.sh")))
    done = subprocess.run([shellcheck, *files], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_the_jobset_starts_a_stage_that_there_is() -> None:
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (program,), (weights,) = pod["containers"], pod["initContainers"]
    flags = dict(word.split("=", 1) for word in program["command"] if word.startswith("--stage="))
    assert flags["--stage"] in main.STAGES
    config, setting = "qwen3vl:4b", program["command"][-1]
    assert f"--config=configs/{config.replace(':', '.py:')}" in program["command"]
    folder = command_line.load_config(config, [setting]).model.path
    assert weights["command"][-1] == folder
    (mount,) = program["volumeMounts"]
    assert folder.startswith(mount["mountPath"] + "/") and weights["volumeMounts"] == [mount]
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
    # Kubernetes takes a failure policy only of pods that are never restarted in place.
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": program["name"], "operator": "In", "values": [2, 3]}
    assert pod["restartPolicy"] == "Never" and rule["onExitCodes"] == codes


def test_the_image_takes_folders_and_extras_that_there_are() -> None:
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"mgsd_jax", "configs", "launch"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = [line.partition("=")[2] for line in lines if line.startswith("ARG EXTRAS=")]
    assert set(extras.split(",")) <= known["optional-dependencies"].keys()
