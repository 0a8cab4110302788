"""The whole method on a laptop: every stage of the nano pipeline.

Command:   bash launch/quickstart.sh   (runs all the stages with this file)
Hardware:  2 CPU cores, or whatever accelerator JAX sees.
Expected:  see docs/nano.md.
"""

import pathlib

from mgsd_jax import config as c

BASE = str(pathlib.Path(c.__file__).parent / "assets" / "nano_base")

BOARDS = (
    c.LevelSet("frozenlake", levels=(3,), train=600, val=48, test=100),  # 1,218 exist in all
    c.LevelSet("frozenlake", levels=(4,), train=1200, val=48, test=100),
    c.LevelSet("maze", levels=(3,), train=1200, val=96, test=200),
    c.LevelSet("minibehaviour", levels=(5,), train=2400, val=96, test=200),
)


def get_config() -> c.Config:
    """All stages, float32, on pictures with one visual token a cell."""
    return c.Config(
        model=c.ModelConfig(path=BASE, compute_dtype="float32", remat="none"),
        data=c.DataConfig(
            boards=BOARDS,
            picture_size=0,
            cell_pixels=32,
            # Boards are planned in other colours and with other sprites too; docs/study.md.
            augment=0.5,
            prompt_buckets=(44,),
            teacher_buckets=(44,),
            sequence_buckets=(98,),
            patch_buckets=(100,),
        ),
        grounding=c.GroundingConfig(
            # The tower alone: what the decoder knows of planning stays as it is, to the bit.
            optim=c.OptimConfig(lr=1e-3, schedule="cosine", warmup=0.05, trainable="^visual"),
            steps=40,  # short on purpose: see docs/nano.md
            batch_size=48,
            microbatches=8,  # a CPU is a quarter faster where a part fits its cache
            eval_every=20,
        ),
        distillation=c.DistillationConfig(
            optim=c.OptimConfig(
                lr=1e-3, schedule="cosine", warmup=0.05, b2=0.99, trainable="^visual"
            ),
            teacher_context="state",
            objective="jsd",  # varied least between the seeds of docs/study.md
            sampling=c.SamplingConfig(max_new_tokens=62),
            token_chunk=1024,
            grounding_share=0.125,  # what stage 1 taught stays in place
            steps=60,
            batch_size=64,
            microbatches=8,
            eval_every=20,
            eval_boards=100,
        ),
        evaluate=c.EvaluateConfig(
            models=(
                ("base", "{model}"),
                ("grounded", "{workdir}/grounding"),
                ("distilled", "{workdir}/distillation"),
            ),
            sampling=c.SamplingConfig(max_new_tokens=62, temperature=0.0),
            batch_size=100,
        ),
        checkpoint=c.CheckpointConfig(every=10),  # 14 s of work; a save costs 0.2 of them
    )
