"""Second run of making the nano base: a little sight for a planner that has only read text.

Command:   bash launch/nano_base.sh WORKDIR
Hardware:  2 CPU cores, some minutes.
Expected:  see docs/nano.md.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_TEXT = pathlib.Path(__file__).with_name("nano_base.py")


def get_config() -> c.Config:
    """Enough pictures to tie them to the words for what they show, too few to see well.

    At step 250 tables and open sides are read right and single things (player, goal, agent) by
    chance; at step 300 they would be found too.
    """
    text: c.Config = runpy.run_path(str(_TEXT))["get_config"]()
    return dataclasses.replace(
        text,
        grounding=dataclasses.replace(
            text.grounding,
            student="{workdir}/text/grounding",
            optim=c.OptimConfig(lr=1e-3, warmup=0.12, b2=0.99),
            batch_size=48,
            steps=250,
            mixture=(
                ("cells", 0.3),
                ("questions", 0.3),
                ("plan_from_picture", 0.3),
                ("plan_from_text", 0.1),
            ),
            eval_every=50,
        ),
    )
