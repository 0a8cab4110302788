"""Sokoban alone, at nano size: what a new environment needs besides its module.

Command:   for s in init generate grounding distillation evaluate report; do
               mgsd_jax --stage=$s --config=configs/sokoban.py --workdir=WORKDIR; done
Hardware:  2 CPU cores.
Expected:  not measured.

The model starts from random weights with a tokenizer made for Sokoban's prompts, so that grounding
has everything to teach: to plan from text, and to see.
"""

from mgsd_jax import config as c


def get_config() -> c.Config:
    """All stages, float32, on pictures with one visual token a cell."""
    optim = c.OptimConfig(lr=1e-3, schedule="cosine", warmup=0.05, b2=0.99)
    sampling = c.SamplingConfig(max_new_tokens=96)
    return c.Config(
        model=c.ModelConfig(path="{workdir}/init", compute_dtype="float32", remat="none"),
        nano=c.NanoConfig(folder="{workdir}/init", max_level=6),
        data=c.DataConfig(
            boards=(
                c.LevelSet("sokoban", levels=(5,), train=600, val=48, test=80),  # of 932 in all
                c.LevelSet("sokoban", levels=(6,), train=1200, val=48, test=100),
            ),
            picture_size=0,
            cell_pixels=32,
            prompt_buckets=(56,),
            teacher_buckets=(80,),
            sequence_buckets=(160,),
            patch_buckets=(144,),
        ),
        grounding=c.GroundingConfig(
            optim=optim,
            steps=2000,
            batch_size=48,
            microbatches=8,
            mixture=(
                *(("cells", 0.3), ("questions", 0.2)),
                *(("plan_from_picture", 0.2), ("plan_from_text", 0.3)),
            ),
            eval_every=100,
        ),
        distillation=c.DistillationConfig(
            optim=optim,
            teacher="{workdir}/grounding",  # the random base plans nothing, even from text
            teacher_context="state",
            objective="jsd",
            sampling=sampling,
            token_chunk=1024,
            steps=120,
            batch_size=64,
            microbatches=8,
            eval_every=20,
            eval_boards=96,
        ),
        evaluate=c.EvaluateConfig(
            models=(
                ("base", "{model}"),
                ("grounded", "{workdir}/grounding"),
                ("distilled", "{workdir}/distillation"),
            ),
            sampling=c.SamplingConfig(max_new_tokens=96, temperature=0.0),
            batch_size=100,
        ),
        checkpoint=c.CheckpointConfig(every=100),
    )
