"""A whole run small enough for a test: a 30,000-parameter model on 3x3 boards."""

import dataclasses
import pathlib

from mgsd_jax import config as c
from mgsd_jax.command_line import load_config

ROOT = pathlib.Path(__file__).parents[1]


def train_all(optim: c.OptimConfig) -> c.OptimConfig:
    """The same optimizer for every parameter."""
    return dataclasses.replace(optim, trainable=".*")


def tiny_config(workdir: pathlib.Path, layers: int = 2) -> c.Config:
    """The nano pipeline with everything made small; the base is `{workdir}/init`."""
    nano = load_config(str(ROOT / "configs" / "nano.py"), [])
    base = str(workdir / "init")
    return dataclasses.replace(
        nano,
        model=dataclasses.replace(nano.model, path=base),
        nano=c.NanoConfig(
            folder=base,
            width=32,
            layers=layers,
            heads=2,
            kv_heads=1,
            head_width=16,
            mlp=32,
            vision_width=16,
            vision_layers=layers,
            vision_heads=2,
            vision_mlp=16,
            deepstack=(0,),
            max_level=5,
        ),
        data=dataclasses.replace(
            nano.data,
            boards=(
                c.LevelSet("frozenlake", (3,), train=12, val=4, test=3),
                c.LevelSet("maze", (3,), train=12, val=4, test=3),
            ),
            patch_buckets=(36,),
            augment=0.0,
        ),
        grounding=dataclasses.replace(
            nano.grounding,
            optim=train_all(nano.grounding.optim),
            steps=4,
            batch_size=4,
            microbatches=1,
            eval_every=2,
            eval_batches=1,
        ),
        distillation=dataclasses.replace(
            nano.distillation,
            optim=train_all(nano.distillation.optim),
            objective="reverse_kl",
            grounding_share=0.0,
            steps=4,
            batch_size=4,
            microbatches=1,
            eval_every=2,
            eval_boards=4,
            sampling=dataclasses.replace(nano.distillation.sampling, max_new_tokens=12),
        ),
        evaluate=dataclasses.replace(
            nano.evaluate,
            batch_size=4,
            sampling=dataclasses.replace(nano.evaluate.sampling, max_new_tokens=12),
        ),
        checkpoint=c.CheckpointConfig(every=2, keep_last=3),
    )
