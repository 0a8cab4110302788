"""Makes the nano base model: plans well from text, sees poorly.

Command:   bash launch/nano_base.sh
Hardware:  2 CPU cores, about an hour.
Expected:  see docs/nano.md.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_NANO = pathlib.Path(__file__).parent / "nano.py"


def get_config() -> c.Config:
    """Random weights, then supervised records: planning from text, and little sight."""
    nano: c.Config = runpy.run_path(str(_NANO))["get_config"]()
    boards = tuple(
        dataclasses.replace(b, levels=levels)
        for b, levels in zip(nano.data.boards, ((3, 4), (3, 4), (5,)), strict=True)
    )
    return dataclasses.replace(
        nano,
        model=dataclasses.replace(nano.model, path="{workdir}/init"),
        data=dataclasses.replace(nano.data, boards=boards, source="stream"),
        nano=c.NanoConfig(folder="{workdir}/init", max_level=6),
        grounding=c.GroundingConfig(
            optim=c.OptimConfig(lr=2e-3, schedule="cosine", warmup=0.02, weight_decay=0.01),
            steps=3000,
            batch_size=64,
            mixture=(("plan_from_text", 0.9), ("questions", 0.05), ("plan_from_picture", 0.05)),
            eval_every=250,
        ),
        export=c.ExportConfig(source="{workdir}/grounding", folder="{workdir}/export"),
    )
