"""Third run of making the nano base: mostly MiniBehaviour, and the planner brushed up.

Command:   bash launch/nano_base.sh WORKDIR
Hardware:  2 CPU cores, six minutes.
Expected:  see docs/nano.md.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_SIGHT = pathlib.Path(__file__).with_name("nano_sight.py")


def get_config() -> c.Config:
    """Places are known by now; agent and printer are found between updates 150 and 250."""
    sight: c.Config = runpy.run_path(str(_SIGHT))["get_config"]()
    boards = (
        c.LevelSet("frozenlake", levels=(3, 4, 5), train=0, val=0, test=0),
        c.LevelSet("maze", levels=(3,), train=0, val=0, test=0),
        c.LevelSet("minibehaviour", levels=(5, 5, 5, 5, 5), train=0, val=0, test=0),
    )
    return dataclasses.replace(
        sight,
        data=dataclasses.replace(sight.data, boards=boards),
        grounding=dataclasses.replace(
            sight.grounding,
            student="{workdir}/sight/grounding",
            optim=c.OptimConfig(lr=1e-3, warmup=0.05, b2=0.99),
            steps=300,
            mixture=(
                ("cells", 0.4),
                ("questions", 0.2),
                ("plan_from_picture", 0.2),
                ("plan_from_text", 0.2),
            ),
        ),
        seed=1,
    )
