"""First run of making the nano base model, which plans well from text and sees poorly.

Command:   bash launch/nano_base.sh WORKDIR
Hardware:  2 CPU cores, half an hour.
Expected:  see docs/nano.md.

It teaches the decoder to plan from text. `nano_sight.py` and `nano_finish.py` are the other two.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_NANO = pathlib.Path(__file__).parent / "nano.py"


def get_config() -> c.Config:
    """Text plans alone; every other setting is that of the quickstart."""
    nano: c.Config = runpy.run_path(str(_NANO))["get_config"]()
    return dataclasses.replace(
        nano,
        model=dataclasses.replace(nano.model, path="{workdir}/init"),
        data=dataclasses.replace(nano.data, source="stream"),
        nano=c.NanoConfig(folder="{workdir}/init", max_level=6),
        grounding=c.GroundingConfig(
            optim=c.OptimConfig(
                lr=2e-3, schedule="cosine", warmup=0.03, b2=0.99, trainable="^language"
            ),
            steps=2000,
            batch_size=64,
            mixture=(("plan_from_text", 1.0),),
            eval_every=100,
        ),
        export=c.ExportConfig(source="{workdir}/grounding", folder="{workdir}/export"),
        checkpoint=c.CheckpointConfig(every=100),
    )
