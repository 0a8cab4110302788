"""The program with a toy for its grounding stage: the session of a real one, and no model.

Twelve steps subtract the step and the batch from eight weights that lie on all devices. Run with
the flags of the program; `TOY=1:5:words` makes process 1 raise a RuntimeError of these words at
step 5, `TOY=1:6:killed` has it killed in the save of step 6.
"""

import os
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app
from etils import epath
from orbax.checkpoint._src.multihost import multihost

from mgsd_jax import main
from mgsd_jax.config import Config
from mgsd_jax.parallel import processes, sharding
from mgsd_jax.parallel.means import Mean
from mgsd_jax.training import optimizer, sessions
from mgsd_jax.workdir import folders

STEPS = 12


class Batches:
    """1, 2, 3, ... with a position."""

    def __init__(self) -> None:
        self.last = 0

    def get_state(self) -> dict[str, int]:
        return {"last": self.last}

    def set_state(self, state: dict[str, int]) -> None:
        self.last = state["last"]


def die_in_a_save() -> None:
    """Kills this process in its next save, when all arrays are on their way to the disk."""
    sync = multihost.sync_global_processes

    def until(name: str, *args: Any, **options: Any) -> None:
        if "old_steps_to_remove" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(name, *args, **options)

    multihost.sync_global_processes = until


def run(config: Config, workdir: str) -> None:
    """A stage as main calls it."""
    folder = epath.Path(workdir) / "grounding"
    with folders.claimed(folder, config, ("grounding", "seed")) as claim:
        train(config, claim)


def train(config: Config, claim: folders.Claim) -> None:
    """Its steps."""
    mesh = sharding.open_mesh(config.mesh)
    params, loader = {"norm": {"scale": jnp.zeros(8)}}, Batches()
    if mesh is not None:
        params = jax.device_put(params, sharding.state_shardings(params, mesh))
    tx = optax.sgd(1.0)
    state = optimizer.init(params, tx, mesh)

    @jax.jit
    def update(state: Any, number: jax.Array) -> Any:
        grads = jax.tree.map(lambda x: jnp.full_like(x, number), state.params)
        return optimizer.update(state, grads, tx)

    data: Any = loader
    failing, step_of, words = os.environ.get("TOY", "-1:0:").split(":")
    opened = sessions.open_session(
        claim, config, state, data, metric="m", best_mode="min", steps=STEPS
    )
    with opened as session:
        state = session.state
        for step in range(session.start + 1, STEPS + 1):
            loader.last += 1
            if (int(failing), int(step_of)) == (jax.process_index(), step):
                if words != "killed":
                    raise RuntimeError(words)
                die_in_a_save()
            largest = processes.largest((jax.process_index(), -step))
            assert largest == (jax.process_count() - 1, -step)
            state, measured = update(state, jnp.float32(loader.last))
            own = Mean(float(jax.process_index()), 1.0)  # its mean is over the processes
            session.finish_step(step, state, measured | {"loss": measured["grad_norm"], "own": own})
            time.sleep(0.1)


if __name__ == "__main__":
    processes.LOST_AFTER = 12  # the tests wait for it
    main.STAGES["grounding"] = run
    sys.exit(app.run(main.main))
