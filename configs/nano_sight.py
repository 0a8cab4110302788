"""Second run of making the nano base: sight for a planner that has only read text.

Command:   bash launch/nano_base.sh WORKDIR
Hardware:  2 CPU cores, ten minutes.
Expected:  see docs/nano.md.

The boards are drawn in colours that no real board has (`data.channels`). What the base learns of
where things are and how to name them carries over; what they look like does not. So it sees real
boards, but poorly, as a large model sees boards that it was never trained on.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_TEXT = pathlib.Path(__file__).with_name("nano_base.py")


def get_config() -> c.Config:
    """Places are learned from FrozenLake, the board with the most to see.

    Levels that stand more than once are drawn more often. Level 5 of FrozenLake is there for its
    geometry, which is MiniBehaviour's.
    """
    text: c.Config = runpy.run_path(str(_TEXT))["get_config"]()
    boards = (
        c.LevelSet("frozenlake", levels=(3, 4, 4, 5, 5, 5), train=0, val=0, test=0),
        c.LevelSet("maze", levels=(3, 3), train=0, val=0, test=0),
        c.LevelSet("minibehaviour", levels=(5, 5, 5), train=0, val=0, test=0),
    )
    return dataclasses.replace(
        text,
        data=dataclasses.replace(
            text.data, boards=boards, sequence_buckets=(98, 120), channels=(1, 2, 0)
        ),
        grounding=dataclasses.replace(
            text.grounding,
            student="{workdir}/text/grounding",
            optim=c.OptimConfig(lr=1e-3, warmup=0.05, b2=0.99),
            batch_size=48,
            steps=600,
            mixture=(
                ("cells", 0.3),
                ("questions", 0.3),
                ("plan_from_picture", 0.3),
                ("plan_from_text", 0.1),
            ),
            eval_every=100,
        ),
    )
