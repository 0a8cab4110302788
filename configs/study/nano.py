"""What all rows of the nano study share: the boards, the base and the schedule of the quickstart.

Command:   bash launch/study.sh WORKDIR   (runs every row of configs/study/rows.py with this file)
Hardware:  2 CPU cores.
Expected:  see docs/study.md.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_NANO = pathlib.Path(__file__).parents[1] / "nano.py"


def get_config() -> c.Config:
    """The quickstart by the published divergence and without its options.

    Every update of both stages has 64 rows.
    """
    nano: c.Config = runpy.run_path(str(_NANO))["get_config"]()
    return dataclasses.replace(
        nano,
        data=dataclasses.replace(nano.data, augment=0.0),
        grounding=dataclasses.replace(nano.grounding, batch_size=64, eval_every=40),
        distillation=dataclasses.replace(
            nano.distillation, objective="reverse_kl", grounding_share=0.0, steps=120
        ),
        evaluate=dataclasses.replace(nano.evaluate, models=(("base", "{model}"),)),
        checkpoint=c.CheckpointConfig(every=1000, keep_last=1, keep_best=0),
    )
