"""`python -m mgsd_jax` and the command `mgsd_jax`: both run main.py as the program."""

import runpy


def run() -> None:
    """The console script. It imports nothing itself, so that `--help` takes a moment."""
    runpy.run_module("mgsd_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run()
